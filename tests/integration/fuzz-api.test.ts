/**
 * Thousands of requests over every route of the contract, made from its own schemas and then made wrong, against a
 * real daemon over TLS. FUZZ_SEED repeats a run, FUZZ_RUNS sets how many requests each route gets.
 */
import assert from 'node:assert/strict';
import { readFile } from 'node:fs/promises';
import { connect as connectTcp } from 'node:net';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { connect as connectTls } from 'node:tls';
import fc from 'fast-check';
import { type Dispatcher, Pool } from 'undici';
import { type OperationName, routes } from '../../src/contract/index.ts';
import type { LabCloudlet, LabFleet } from '../../src/lab/fleet.ts';
import { type ErrorCode, errorKinds } from '../../src/model/errors.ts';
import { openFleet, refused } from './lab-vm.ts';
import { garbage, type Request, requestOf } from './request-arbitraries.ts';

const options = { timeout: 900_000 };
const names = Object.keys(routes) as OperationName[];
const seed = Number(process.env.FUZZ_SEED ?? Date.now() % 2 ** 31);
const runs = Number(process.env.FUZZ_RUNS ?? Math.ceil(5200 / names.length));
let fleet: LabFleet;
let north: LabCloudlet;
let ca: string;
/** By who calls: somebody with the admin token, another cloudlet. */
let pools: { admin: Pool; peer: Pool };
let sent = 0;
const seen = new Map<string, number>();

before(async () => {
  fleet = await openFleet();
  north = await fleet.add('north');
  const south = await fleet.add('south');
  // Only its certificate is needed.
  await south.stop();
  ca = await readFile(north.caFile, 'utf8');
  const read = (file: string) => readFile(path.join(south.directory, 'identity', file), 'utf8');
  const [cert, key] = await Promise.all([read('cloudlet.crt'), read('cloudlet.key')]);
  pools = {
    admin: new Pool(north.url, { connections: 1, connect: { ca } }),
    peer: new Pool(north.url, { connections: 1, connect: { ca, cert, key } }),
  };
});
after(async () => {
  await Promise.all(Object.values(pools ?? {}).map((pool) => pool.destroy()));
  await fleet?.[Symbol.asyncDispose]();
});

/** The body of a refusal must say which, in the one shape, and fit its status; and no bug may show. */
function assertRefusal(status: number, text: string): ErrorCode {
  const { error } = JSON.parse(text) as { error: Record<string, unknown> };
  assert.equal(typeof error, 'object', text);
  assert.deepEqual(Object.keys(error).sort(), ['code', 'details', 'message', 'requestId'], text);
  const code = error.code as ErrorCode;
  assert.ok(Object.hasOwn(errorKinds, code), `unknown code ${code}`);
  assert.notEqual(code, 'internal', text);
  assert.equal(errorKinds[code].status, status, text);
  assert.ok(typeof error.message === 'string' && error.message.length > 0);
  assert.ok(typeof error.details === 'object' && error.details !== null);
  return code;
}

async function send(caller: keyof typeof pools, { method, path, headers, body }: Request): Promise<void> {
  const token = caller === 'admin' ? { authorization: `Bearer ${north.token}` } : {};
  sent += 1;
  const reply = await pools[caller].request({
    method: method as Dispatcher.HttpMethod,
    path,
    headers: { ...token, ...headers },
    body,
  });
  const type = String(reply.headers['content-type']);
  const isStream = type.startsWith('text/event-stream') && reply.statusCode === 200;
  if (isStream) reply.body.on('error', () => {}).destroy();
  const text = isStream ? '' : await reply.body.text();
  let outcome = String(reply.statusCode);
  if (reply.statusCode >= 400 && method !== 'HEAD') outcome = assertRefusal(reply.statusCode, text);
  else assert.ok(reply.statusCode < 500, `status ${reply.statusCode}`);
  seen.set(outcome, (seen.get(outcome) ?? 0) + 1);
}

test('no request that is wrong in any way meets a bug', options, async (t) => {
  t.diagnostic(`FUZZ_SEED=${seed}`);
  const pid = north.pid;
  for (const [index, name] of names.entries()) {
    await t.test(name, async () => {
      const isForPeers = routes[name].access === 'peer';
      const caller = fc.oneof(
        { weight: isForPeers ? 1 : 9, arbitrary: fc.constant('admin' as const) },
        { weight: isForPeers ? 9 : 1, arbitrary: fc.constant('peer' as const) },
      );
      const property = fc.asyncProperty(caller, requestOf(name), send);
      await fc.assert(property, { seed: seed + index, numRuns: runs });
    });
  }
  t.diagnostic(`${sent} requests: ${[...seen].map(([outcome, count]) => `${outcome} ${count}`).join(', ')}`);
  assert.ok(sent >= 5000 || process.env.FUZZ_RUNS);
  await assertUnharmed(pid);
});

/** The same process answers, has made nothing, and has logged no bug. */
async function assertUnharmed(pid: number | undefined): Promise<void> {
  assert.equal((await north.viper.getHealth()).status, 'ok');
  assert.equal(north.pid, pid);
  assert.deepEqual((await north.viper.listVms()).items, []);
  assert.deepEqual((await north.viper.listImages()).items, []);
  const log = await readFile(path.join(north.directory, 'daemon.log'), 'utf8');
  assert.deepEqual(
    log.split('\n').filter((line) => /"level":(50|60)/.test(line)),
    [],
  );
}

/** The body of a short reply, in one chunk if it has no length. */
const unchunked = (head: string, body: string): string =>
  /^transfer-encoding: chunked$/im.test(head) ? (body.split('\r\n')[1] ?? '') : body;

/** What the daemon answers to these bytes on a connection of their own, until it closes. */
async function exchange(bytes: Buffer, tls: boolean): Promise<string> {
  const { hostname, port } = new URL(north.url);
  const place = { host: hostname, port: Number(port) };
  const socket = tls ? connectTls({ ...place, ca }) : connectTcp(place);
  const chunks: Buffer[] = [];
  socket.on('data', (chunk: Buffer) => chunks.push(chunk));
  // A connection that is cut has said what it had to say.
  socket.on('error', () => {});
  const closed = new Promise((resolve) => socket.on('close', resolve));
  socket.once(tls ? 'secureConnect' : 'connect', () => socket.end(bytes));
  await closed;
  return Buffer.concat(chunks).toString('latin1');
}

test('bytes that are no HTTP, or nearly, meet refusals of the one shape', options, async () => {
  const { pid } = north;
  const property = fc.asyncProperty(garbage, async (bytes) => {
    const text = await exchange(bytes, true);
    for (const reply of text.split(/(?=HTTP\/1\.1 \d{3} )/).filter((each) => each !== '')) {
      const [head, body = ''] = reply.split('\r\n\r\n');
      const status = Number(head!.slice('HTTP/1.1 '.length).slice(0, 3));
      if (status >= 400) assertRefusal(status, unchunked(head!, body));
      else assert.ok(status < 500, reply);
    }
  });
  await fc.assert(property, { seed, numRuns: 400 });
  await assertUnharmed(pid);
});

test(
  'a request without a host, or with an expectation that nobody knows, is refused in that shape',
  options,
  async () => {
    for (const lines of [['connection: close'], ['host: north', 'expect: the-worst']]) {
      const request = ['GET /v1/cloudlet HTTP/1.1', ...lines, '', ''].join('\r\n');
      const [head, body] = (await exchange(Buffer.from(request), true)).split('\r\n\r\n');
      assert.match(head!, /^HTTP\/1\.1 400 /);
      assert.equal(assertRefusal(400, unchunked(head!, body!)), 'invalid_request');
    }
  },
);

test('bytes that are no TLS end their connection and nothing else', options, async () => {
  const { pid } = north;
  const property = fc.asyncProperty(garbage, async (bytes) => {
    assert.doesNotMatch(await exchange(bytes, false), /HTTP/);
  });
  await fc.assert(property, { seed, numRuns: 50 });
  await assertUnharmed(pid);
});

test('a body that is too large is refused as such', options, async () => {
  const { viper } = north;
  const userData = 'x'.repeat(2 * 1024 * 1024);
  await refused(viper.createVm({ body: { name: 'a', image: 'b', seed: { userData } } }), 'payload_too_large');
});
