import assert from 'node:assert/strict';
import { X509Certificate } from 'node:crypto';
import { describe, test } from 'node:test';
import fc from 'fast-check';
import { certificateFingerprint } from '../fleet/fingerprint.ts';
import { newId } from '../model/ids.ts';
import { Credentials, type CredentialsOptions, expandScopes } from './credentials.ts';
import { credentialScopes } from './store/credentials.ts';
import { testStore } from './store/fixtures.ts';
import 'reflect-metadata';
import * as x509 from '@peculiar/x509';

const hourMs = 3_600_000;

function testCredentials(options: Partial<CredentialsOptions> = {}) {
  const fixture = testStore();
  const clock = { nowMs: Date.parse('2026-01-01T00:00:00.000Z') };
  const refusals: string[] = [];
  const credentials = new Credentials({
    store: fixture.store,
    onRefusal: (reason) => refusals.push(reason),
    now: () => clock.nowMs,
    ...options,
  });
  return { ...fixture, credentials, clock, refusals };
}

const unauthenticated = (message: string) => ({ code: 'unauthenticated', message });
const notValid = unauthenticated('The credential is not valid.');

describe('a bearer token', () => {
  test('names its credential and the scopes that it includes', () => {
    using fixture = testCredentials();
    const { token, secret } = fixture.credentials.create({ name: 'ops', scopes: ['operate'] });
    assert.match(secret!, /^vpr_[A-Za-z0-9_-]{43}$/);
    assert.deepEqual(fixture.credentials.authenticate({ bearer: secret }), {
      kind: 'credential',
      credentialId: token.id,
      name: 'ops',
      scopes: ['operate', 'read'],
    });
  });

  test('is stored as a hash only, and listed without it', () => {
    using fixture = testCredentials();
    const { secret } = fixture.credentials.create({ name: 'ops', scopes: ['read'] });
    const stored = JSON.stringify(fixture.store.credentials.active());
    assert.ok(!stored.includes(secret!.slice(4)));
    assert.ok(!('hash' in fixture.credentials.list({ limit: 5 }).items[0]!));
  });

  test('that nobody made is refused, whatever it looks like, and only by its reason counted apart', () => {
    using fixture = testCredentials();
    assert.throws(
      () => fixture.credentials.authenticate({}),
      unauthenticated('The request shows no credential.'),
    );
    for (const bearer of ['', 'vpr_', `vpr_${'a'.repeat(43)}`, `vpr_${'a'.repeat(9000)}`]) {
      assert.throws(() => fixture.credentials.authenticate({ bearer }), notValid);
    }
    assert.deepEqual(fixture.refusals, ['missing', 'unknown', 'unknown', 'unknown', 'unknown']);
  });

  test('is refused from the moment it expires, also when it is cached', () => {
    using fixture = testCredentials();
    const { secret } = fixture.credentials.create({ name: 'ci', scopes: ['read'], expiresInS: 3600 });
    fixture.clock.nowMs += hourMs - 1;
    fixture.credentials.authenticate({ bearer: secret });
    fixture.clock.nowMs += 1;
    assert.throws(
      () => fixture.credentials.authenticate({ bearer: secret }),
      unauthenticated('The credential has expired.'),
    );
    assert.deepEqual(fixture.refusals, ['expired']);
  });

  test('is refused from the moment it is revoked, and looks then as if it had never been', () => {
    using fixture = testCredentials();
    const { token, secret } = fixture.credentials.create({ name: 'ci', scopes: ['read'] });
    fixture.credentials.authenticate({ bearer: secret });
    fixture.credentials.revoke(token.id);
    for (let i = 0; i < 2; i += 1) {
      assert.throws(() => fixture.credentials.authenticate({ bearer: secret }), notValid);
    }
    assert.deepEqual(fixture.refusals, ['revoked', 'revoked']);
    assert.equal(fixture.credentials.revoke(token.id).revokedAt, '2026-01-01T00:00:00.000Z');
  });

  test('does not touch the store again once it is cached, but for its last use once a minute', (t) => {
    using fixture = testCredentials();
    const { token, secret } = fixture.credentials.create({ name: 'ci', scopes: ['read'] });
    const reads = t.mock.method(fixture.store.credentials, 'getByHash').mock;
    const writes = t.mock.method(fixture.store.credentials, 'update').mock;
    for (let i = 0; i < 120; i += 1) {
      fixture.credentials.authenticate({ bearer: secret });
      fixture.clock.nowMs += 1000;
    }
    assert.deepEqual([reads.callCount(), writes.callCount()], [1, 2]);
    assert.equal(fixture.store.credentials.get(token.id)!.lastUsedAt, '2026-01-01T00:01:00.000Z');
  });
});

test('the first admin token replaces what a set-up that was killed left behind', () => {
  using fixture = testCredentials();
  const lost = Credentials.createFirst(fixture.store);
  const first = Credentials.createFirst(fixture.store);
  assert.throws(() => fixture.credentials.authenticate({ bearer: lost.secret }), notValid);
  assert.ok(fixture.credentials.authenticate({ bearer: first.secret }).scopes.includes('admin'));
});

describe('revoking', () => {
  test('leaves one admin credential, and an expired one does not count', () => {
    using fixture = testCredentials();
    const admin = fixture.credentials.create({ name: 'admin', scopes: ['admin'] }).token;
    fixture.credentials.create({ name: 'brief', scopes: ['admin'], expiresInS: 60 });
    fixture.clock.nowMs += hourMs;
    assert.throws(() => fixture.credentials.revoke(admin.id), { code: 'in_use' });
    const next = fixture.credentials.create({ name: 'next', scopes: ['admin'] }).token;
    fixture.credentials.revoke(admin.id);
    assert.throws(() => fixture.credentials.revoke(next.id), { code: 'in_use' });
  });

  test('of an unknown credential is refused', () => {
    using fixture = testCredentials();
    assert.throws(() => fixture.credentials.revoke(newId()), { code: 'not_found' });
  });
});

describe('a client certificate', () => {
  test('that is registered is as good as a token, until it is revoked', async () => {
    using fixture = testCredentials();
    const peerCertificate = await selfSigned('2025-01-01', '2027-01-01');
    assert.throws(() => fixture.credentials.authenticate({ peerCertificate }), notValid);
    const { token, secret } = fixture.credentials.create({
      name: 'gateway',
      scopes: ['read'],
      certificateFingerprint: peerCertificate.fingerprint256,
    });
    assert.equal(secret, undefined);
    assert.equal(token.certificateFingerprint, certificateFingerprint(peerCertificate));
    assert.deepEqual(fixture.credentials.authenticate({ peerCertificate }).scopes, ['read']);
    fixture.credentials.revoke(token.id);
    assert.throws(() => fixture.credentials.authenticate({ peerCertificate }), notValid);
  });

  test('that has run out is refused although it is registered', async () => {
    using fixture = testCredentials();
    const peerCertificate = await selfSigned('2024-01-01', '2025-01-01');
    const fingerprint = certificateFingerprint(peerCertificate);
    fixture.credentials.create({ name: 'old', scopes: ['read'], certificateFingerprint: fingerprint });
    assert.throws(() => fixture.credentials.authenticate({ peerCertificate }), { code: 'unauthenticated' });
    assert.deepEqual(fixture.refusals, ['expired']);
  });

  test('of a cloudlet of the fleet is that cloudlet, unless the fleet refuses it', async () => {
    const peerCertificate = await selfSigned('2025-01-01', '2027-01-01');
    let answer: ReturnType<NonNullable<CredentialsOptions['identifyCloudlet']>> = {
      cloudletId: 'b',
      name: 'b',
    };
    using fixture = testCredentials({ identifyCloudlet: () => answer });
    assert.deepEqual(fixture.credentials.authenticate({ peerCertificate }), {
      kind: 'cloudlet',
      cloudletId: 'b',
      name: 'b',
      scopes: ['peer'],
    });
    answer = 'revoked';
    assert.throws(() => fixture.credentials.authenticate({ peerCertificate }), notValid);
  });

  test('does not help a bad token', async () => {
    using fixture = testCredentials({ identifyCloudlet: () => ({ cloudletId: 'b', name: 'b' }) });
    const peerCertificate = await selfSigned('2025-01-01', '2027-01-01');
    assert.throws(() => fixture.credentials.authenticate({ bearer: 'vpr_x', peerCertificate }), notValid);
  });
});

test('scopes include what stands below them, and a device nothing else', () => {
  assert.deepEqual(expandScopes(['admin']), ['admin', 'operate', 'read']);
  assert.deepEqual(expandScopes(['device']), ['device']);
  fc.assert(
    fc.property(fc.subarray([...credentialScopes]), (scopes) => {
      const expanded = expandScopes(scopes);
      assert.deepEqual(expandScopes(expanded).sort(), expanded.sort());
      assert.equal(expanded.includes('device'), scopes.includes('device'));
      assert.equal(expanded.includes('admin'), scopes.includes('admin'));
    }),
  );
});

async function selfSigned(notBefore: string, notAfter: string): Promise<X509Certificate> {
  const algorithm = { name: 'ECDSA', namedCurve: 'P-256', hash: 'SHA-256' };
  const certificate = await x509.X509CertificateGenerator.createSelfSigned({
    name: 'CN=gateway',
    notBefore: new Date(notBefore),
    notAfter: new Date(notAfter),
    keys: await crypto.subtle.generateKey(algorithm, false, ['sign', 'verify']),
    signingAlgorithm: algorithm,
  });
  return new X509Certificate(Buffer.from(certificate.rawData));
}
