import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { TLSSocket } from 'node:tls';
import { fakeCa } from './fake-certificates.ts';
import { type Answer, fakeDaemon, reply } from './fake-daemon.ts';
import { connectNode, fingerprintOf } from './node.ts';

const ca = await fakeCa();
const server = await ca.issue('edge1');
const tls = { cert: server.certificate, key: server.key };
const emptyList: Answer = (_, response) => reply(response, 200, { items: [], next: null });

test('a daemon with a certificate of the fleet CA is trusted, and its connection is kept', async () => {
  await using daemon = await fakeDaemon(emptyList, tls);
  await using viper = connectNode({ url: daemon.url, token: 'secret', ca: ca.certificate });
  for (let call = 0; call < 20; call += 1) await viper.listVms();
  assert.equal(daemon.requests.length, 20);
  assert.equal(daemon.requests[0]?.headers.authorization, 'Bearer secret');
  // The second call may begin before the first connection is free again.
  assert.ok(daemon.connections() <= 2, `${daemon.connections()} connections`);
});

test('a daemon of another CA gets nothing, not even the token', async () => {
  await using daemon = await fakeDaemon(emptyList, tls);
  const other = await fakeCa();
  for (const trusted of [{ ca: other.certificate }, {}]) {
    await using viper = connectNode({ url: daemon.url, token: 'secret', ...trusted });
    await assert.rejects(
      viper.listVms(),
      /not signed by the CA that this client trusts; pass the CA of its fleet/,
    );
  }
  assert.equal(daemon.requests.length, 0);
});

test('the certificate must be for the host of the URL', async () => {
  await using daemon = await fakeDaemon(emptyList, tls);
  const url = daemon.url.replace('127.0.0.1', '127.0.0.2');
  await using viper = connectNode({ url, ca: ca.certificate });
  // Some systems do not route 127.0.0.2; then the connection itself fails.
  await assert.rejects(viper.listVms(), { code: 'unreachable' });
  const local = connectNode({ url: daemon.url.replace('127.0.0.1', 'localhost'), ca: ca.certificate });
  assert.deepEqual((await local.listVms()).items, []);
  await local.close();
});

test('a pinned fingerprint lets one certificate in, with a CA or without', async () => {
  await using daemon = await fakeDaemon(emptyList, tls);
  const right = fingerprintOf(server.certificate);
  const wrong = fingerprintOf(ca.certificate);
  for (const trusted of [{ ca: ca.certificate }, {}]) {
    await using viper = connectNode({ url: daemon.url, fingerprint: right, ...trusted });
    assert.deepEqual((await viper.listVms()).items, []);
    await using other = connectNode({ url: daemon.url, token: 'secret', fingerprint: wrong, ...trusted });
    await assert.rejects(other.listVms(), /another certificate than the pinned one/);
  }
  assert.ok(daemon.requests.every(({ headers }) => headers.authorization === undefined));
});

test('a client certificate speaks for the caller', async () => {
  const names: unknown[] = [];
  const answer: Answer = (_, response, raw) => {
    names.push((raw.socket as TLSSocket).getPeerCertificate().subject.CN);
    reply(response, 200, { items: [], next: null });
  };
  const asking = { ...tls, requestCert: true, rejectUnauthorized: true, ca: ca.certificate };
  await using daemon = await fakeDaemon(answer, asking);
  const clientCertificate = await ca.issue('operator');
  await using viper = connectNode({ url: daemon.url, ca: ca.certificate, clientCertificate });
  await viper.listVms();
  assert.deepEqual(names, ['operator']);
  await using nameless = connectNode({ url: daemon.url, ca: ca.certificate });
  await assert.rejects(nameless.listVms(), { code: 'unreachable' });
});

test('an older TLS than 1.3 is refused', async () => {
  await using daemon = await fakeDaemon(emptyList, { ...tls, maxVersion: 'TLSv1.2' });
  await using viper = connectNode({ url: daemon.url, ca: ca.certificate });
  await assert.rejects(viper.listVms(), { code: 'unreachable' });
});
