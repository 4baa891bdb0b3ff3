/** Who may do what at a daemon, over real TLS: tokens and their scopes, certificates, and joining a fleet. */
import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import { chmod, readdir, readFile, stat } from 'node:fs/promises';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { connect } from 'node:tls';
import { Agent, type Dispatcher, request } from 'undici';
import { endpoints, type OperationName, type Route, routes } from '../../src/contract/index.ts';
import { joinFleet } from '../../src/fleet/index.ts';
import type { LabCloudlet, LabFleet } from '../../src/lab/fleet.ts';
import { AppError, type ErrorCode } from '../../src/model/errors.ts';
import { newId } from '../../src/model/ids.ts';
import { fakeCa } from '../../src/sdk/fake-certificates.ts';
import { connectNode, fingerprintOf, type NodeViper, type Scope } from '../../src/sdk/node.ts';
import { openFleet, refused, runViper, until } from './lab-vm.ts';

const options = { timeout: 600_000 };
let fleet: LabFleet;
let north: LabCloudlet;
let south: LabCloudlet;
let viper: NodeViper;
let ca: string;

before(async () => {
  fleet = await openFleet();
  north = await fleet.add('north');
  south = await fleet.add('south');
  ({ viper } = north);
  ca = await readFile(north.caFile, 'utf8');
});
after(() => fleet?.[Symbol.asyncDispose]());

interface KeyPair {
  certificate: string;
  key: string;
}
/** What a caller shows at north. */
type Shown = { token?: string; certificate?: KeyPair };

/** The client of whoever shows this. */
const as = ({ token, certificate }: Shown): NodeViper =>
  connectNode({
    url: north.url,
    ca,
    ...(token === undefined ? {} : { token }),
    ...(certificate ? { clientCertificate: certificate } : {}),
  });

async function certificateOf(cloudlet: LabCloudlet): Promise<KeyPair> {
  const read = (file: string) => readFile(path.join(cloudlet.directory, 'identity', file), 'utf8');
  return { certificate: await read('cloudlet.crt'), key: await read('cloudlet.key') };
}

async function newToken(scopes: Scope[], body: object = {}): Promise<{ id: string; secret: string }> {
  const name = `${scopes.join('-')} ${newId()}`;
  const { token, secret } = await viper.createToken({ body: { name, scopes, ...body } });
  return { id: token.id, secret: secret! };
}

/** How often callers were refused, by reason. */
async function refusals(): Promise<Record<string, number>> {
  const text = await viper.getMetrics();
  const lines = text.matchAll(/^viper_http_refused_callers_total\{reason="(\w+)"\} (\d+)$/gm);
  return Object.fromEntries(Array.from(lines, ([, reason, count]) => [reason, Number(count)]));
}

async function refusedFor(reason: string, call: () => Promise<unknown>): Promise<void> {
  const before = await refusals();
  await refused(call(), 'unauthenticated');
  const now = await refusals();
  assert.deepEqual(now, { ...before, [reason]: before[reason]! + 1 });
}

// --- scopes

/** Who is let in by what a route wants. */
const admitted: Record<Route['access'], readonly string[]> = {
  open: ['nobody', 'device', 'read', 'operate', 'admin', 'peer'],
  any: ['device', 'read', 'operate', 'admin', 'peer'],
  read: ['read', 'operate', 'admin'],
  operate: ['operate', 'admin'],
  admin: ['admin'],
  peer: ['peer'],
  device: ['device'],
  'read-or-peer': ['read', 'operate', 'admin', 'peer'],
};

/** A request of the route that changes nothing: what it names is not there, and its body says nothing good. */
function harmless(name: OperationName): { path: string; method: Dispatcher.HttpMethod; body: string | null } {
  const { method, path: template } = endpoints[name];
  const byId = /^(operation|migration|token|peer|decision)$/;
  const path = template.replace(/\{(\w+)\}/g, (_, key: string) => (byId.test(key) ? newId() : 'nobody'));
  return { path, method, body: (routes[name] as Route).body ? '{"no-such-field":1}' : null };
}

test('every route lets in whom it should, and nobody else', options, async (t) => {
  const tokens = await Promise.all(
    (['device', 'read', 'operate', 'admin'] as const).map(async (scope) => ({
      who: scope,
      token: (await newToken([scope])).secret,
    })),
  );
  const { certificate: cert, key } = await certificateOf(south);
  const tls = { ca, minVersion: 'TLSv1.3' as const };
  const anonymous = new Agent({ connect: tls });
  const peer = new Agent({ connect: { ...tls, cert, key } });
  t.after(() => Promise.all([anonymous.destroy(), peer.destroy()]));
  const callers = [
    { who: 'nobody', agent: anonymous, headers: {} },
    { who: 'peer', agent: peer, headers: {} },
    ...tokens.map(({ who, token }) => ({
      who,
      agent: anonymous,
      headers: { authorization: `Bearer ${token}` },
    })),
  ];
  const before = await refusals();
  const counted = { missing: 0, scope: 0 };
  for (const [name, route] of Object.entries(routes) as [OperationName, Route][]) {
    await t.test(`${name} wants ${route.access}`, async () => {
      for (const { who, agent, headers } of callers) {
        const { path, method, body } = harmless(name);
        const type = body === null ? {} : { 'content-type': 'application/json' };
        const reply = await request(`${north.url}${path}`, {
          dispatcher: agent,
          method,
          body,
          headers: { ...headers, ...type },
        });
        const isIn = reply.statusCode !== 401 && reply.statusCode !== 403;
        assert.equal(isIn, admitted[route.access].includes(who), `${who}: ${reply.statusCode}`);
        // A stream of events has no end.
        if (isIn) {
          reply.body.on('error', () => {}).destroy();
          continue;
        }
        const { error } = (await reply.body.json()) as { error: { code: ErrorCode; details: object } };
        counted[who === 'nobody' ? 'missing' : 'scope'] += 1;
        if (who === 'nobody') {
          assert.deepEqual([reply.statusCode, error.code], [401, 'unauthenticated']);
          assert.match(String(reply.headers['www-authenticate']), /^Bearer/);
        } else {
          assert.deepEqual([reply.statusCode, error.code], [403, 'forbidden']);
          assert.ok('wanted' in error.details);
        }
      }
    });
  }
  const now = await refusals();
  assert.equal(now.missing, before.missing! + counted.missing);
  assert.equal(now.scope, before.scope! + counted.scope);
});

// --- tokens

test('a token that is wrong, damaged or of another kind is refused and counted', options, async () => {
  const { secret } = await newToken(['read']);
  const other = `${secret.slice(0, -1)}${secret.endsWith('A') ? 'B' : 'A'}`;
  for (const token of [
    other,
    `vpr_${'A'.repeat(43)}`,
    secret.slice(0, -1),
    `${secret}x`,
    'x',
    secret.toUpperCase(),
  ])
    await refusedFor('unknown', () => as({ token }).getWhoami());
  await refusedFor('missing', () => as({}).getWhoami());
  assert.deepEqual((await as({ token: secret }).getWhoami()).scopes, ['read']);
});

test('a token works until it expires or is revoked, then no more', options, async () => {
  const short = await newToken(['read'], { expiresInS: 2 });
  const { items } = await viper.listTokens({ query: { limit: 200 } });
  const expiresAt = Date.parse(items.find(({ id }) => id === short.id)!.expiresAt!);
  await until('the expiry', () => Date.now() > expiresAt);
  await refusedFor('expired', () => as({ token: short.secret }).getWhoami());

  const revoked = await newToken(['operate']);
  const client = as({ token: revoked.secret });
  await client.listVms();
  await viper.revokeToken({ params: { token: revoked.id } });
  // On the same connection.
  await refusedFor('revoked', () => client.listVms());
  const record = (await viper.listTokens({ query: { limit: 200 } })).items.find(
    ({ id }) => id === revoked.id,
  );
  assert.ok(record?.revokedAt && record.lastUsedAt);
});

test(
  'an admin token makes others and cannot be the last to go; a lesser one makes none',
  options,
  async () => {
    const { id } = await viper.getWhoami();
    await refused(viper.revokeToken({ params: { token: newId() } }), 'not_found');
    const admins = (await viper.listTokens({ query: { limit: 200 } })).items.filter(
      (token) => token.scopes.includes('admin') && !token.revokedAt && token.id !== id,
    );
    for (const token of admins) await viper.revokeToken({ params: { token: token.id } });
    await refused(viper.revokeToken({ params: { token: id } }), 'in_use');
    await refused(viper.createToken({ body: { name: 'admin', scopes: ['read'] } }), 'name_taken');
    const lesser = as({ token: (await newToken(['operate'])).secret });
    await refused(lesser.createToken({ body: { name: 'more', scopes: ['admin'] } }), 'forbidden');
  },
);

test('no secret lies in the state directory or in the log', options, async () => {
  const { secret } = await newToken(['read']);
  await as({ token: secret }).getWhoami();
  const { token: joinToken } = await viper.createJoinToken({ body: {} });
  const secrets = [secret, north.token, joinToken, joinToken.split('.')[0]!];
  for (const file of await filesUnder(north.directory)) {
    const bytes = await readFile(file);
    for (const each of secrets) assert.ok(!bytes.includes(each), `${file} holds a secret`);
  }
});

const filesUnder = async (directory: string): Promise<string[]> =>
  (await readdir(directory, { recursive: true, withFileTypes: true }))
    .filter((entry) => entry.isFile())
    .map((entry) => path.join(entry.parentPath, entry.name));

// --- TLS

test(
  'a client certificate speaks for its holder once it is registered, until it is revoked',
  options,
  async () => {
    const certificate = await (await fakeCa()).issue('operator');
    await using client = as({ certificate });
    await refusedFor('unknown', () => client.getWhoami());
    const { token, secret } = await viper.createToken({
      body: {
        name: 'operator',
        scopes: ['operate'],
        certificateFingerprint: fingerprintOf(certificate.certificate),
      },
    });
    assert.equal(secret, undefined);
    assert.deepEqual((await client.getWhoami()).scopes, ['operate', 'read']);
    await refused(client.listTokens(), 'forbidden');
    // A bad token goes before a good certificate.
    await refusedFor('unknown', () => as({ certificate, token: `vpr_${'A'.repeat(43)}` }).getWhoami());
    await viper.revokeToken({ params: { token: token.id } });
    await refusedFor('revoked', () => client.getWhoami());
  },
);

test('TLS 1.3 is spoken, and nothing older', options, async () => {
  const { hostname, port } = new URL(north.url);
  const greet = (maxVersion: 'TLSv1.2' | 'TLSv1.3') =>
    new Promise<string | null>((resolve, reject) => {
      const socket = connect({ host: hostname, port: Number(port), ca, minVersion: 'TLSv1.2', maxVersion });
      socket.once('secureConnect', () => {
        resolve(socket.getProtocol());
        socket.destroy();
      });
      socket.once('error', reject);
    });
  assert.equal(await greet('TLSv1.3'), 'TLSv1.3');
  await assert.rejects(greet('TLSv1.2'), { code: 'ERR_SSL_TLSV1_ALERT_PROTOCOL_VERSION' });
});

test('keys are for their owner alone, and a key that others can read is refused', options, async () => {
  const mode = async (file: string) => ((await stat(file)).mode & 0o777).toString(8);
  const identity = path.join(north.directory, 'identity');
  assert.deepEqual([await mode(north.directory), await mode(identity)], ['700', '700']);
  for (const file of await filesUnder(identity)) assert.equal(await mode(file), '600', file);
  for (const file of (await filesUnder(north.directory)).filter((each) => each.includes('state.sqlite')))
    assert.equal(await mode(file), '600', file);
  assert.equal(existsSync(path.join(south.directory, 'identity', 'ca.key')), false);

  const key = path.join(south.directory, 'identity', 'cloudlet.key');
  await south.stop();
  await chmod(key, 0o640);
  const { code, stderr } = await runViper('serve', '--state', south.directory);
  assert.deepEqual([code, /^viper: .*chmod 600/m.test(stderr)], [1, true], stderr);
  await chmod(key, 0o600);
  await south.start();
});

// --- joining

interface Joining {
  directory: string;
  token: string;
  name?: string;
  founder?: LabCloudlet;
}

const join = ({ directory, token, name = directory, founder = north }: Joining) =>
  joinFleet({
    directory: path.join(fleet.root, directory),
    name,
    url: 'https://127.0.0.1:1',
    founderUrl: founder.url,
    token,
  });

async function notAdmitted(code: ErrorCode, joining: Joining): Promise<void> {
  await assert.rejects(join(joining), (error) => error instanceof AppError && error.code === code);
  assert.equal(existsSync(path.join(fleet.root, joining.directory)), false);
}

test('a join token admits one cloudlet, in its time, at its fleet', options, async () => {
  const { token } = await viper.createJoinToken({ body: {} });
  const [secret, pin] = token.split('.') as [string, string];
  const elsewhere = Buffer.alloc(32, 7).toString('base64url');
  await notAdmitted('peer_untrusted', { directory: 'wrong-pin', token: `${secret}.${elsewhere}` });
  await notAdmitted('unauthenticated', { directory: 'wrong-secret', token: `vjt_${elsewhere}.${pin}` });
  await notAdmitted('invalid_request', { directory: 'damaged', token: token.slice(0, -1) });
  await notAdmitted('peer_untrusted', { directory: 'not-the-founder', token, founder: south });
  await notAdmitted('name_taken', { directory: 'named-alike', name: 'south', token });
  await refused(south.viper.createJoinToken({ body: {} }), 'unsupported');

  const { identity, peers } = await join({ directory: 'west', token });
  assert.deepEqual(peers.map(({ name }) => name).sort(), ['north', 'south']);
  assert.equal(identity.fleetId, (await viper.getCloudlet()).fleetId);
  await notAdmitted('unauthenticated', { directory: 'too-late', token });

  const short = await viper.createJoinToken({ body: { expiresInS: 1 } });
  await until('the expiry', () => Date.now() > Date.parse(short.expiresAt));
  await notAdmitted('unauthenticated', { directory: 'expired', token: short.token });
  const { code, stderr } = await runViper(
    'join',
    north.url,
    '--token',
    short.token,
    '--state',
    path.join(fleet.root, 'told'),
    '--name',
    'told',
  );
  assert.deepEqual([code, /^viper: The join token has expired/.test(stderr)], [1, true], stderr);
});

test('the cloudlets of a fleet learn of each other, whoever they joined through', options, async () => {
  const east = await fleet.add('east');
  const namesAt = async (cloudlet: LabCloudlet) =>
    (await cloudlet.viper.listPeers()).items.map(({ name }) => name);
  // South was there before and is told by east itself.
  await until('south to know east', async () => (await namesAt(south)).includes('east'));
  assert.deepEqual(
    (await namesAt(east)).filter((name) => name !== 'west'),
    ['north', 'south'],
  );
  assert.deepEqual(
    (await namesAt(north)).filter((name) => name !== 'west'),
    ['east', 'south'],
  );
  const known = (await viper.listPeers()).items.find(({ name }) => name === 'east')!;
  assert.deepEqual([known.id, known.url], [east.id, east.url]);
  assert.equal(known.certificateFingerprint, fingerprintOf((await certificateOf(east)).certificate));
});

test('a peer that is removed is refused from that moment on, and told by an event', options, async () => {
  const east = fleet.cloudlets.find(({ name }) => name === 'east')!;
  await using client = as({ certificate: await certificateOf(east) });
  assert.deepEqual(await client.getWhoami(), { id: east.id, name: 'east', scopes: ['peer'] });
  // It shows its certificate by itself now and then, which would be counted as well.
  await east.stop();
  await viper.removePeer({ params: { peer: east.id } });
  await refusedFor('revoked', () => client.listPeers());
  await refused(viper.removePeer({ params: { peer: east.id } }), 'not_found');
  // It cannot speak for itself, and others cannot bring it back.
  await east.start();
  assert.ok(!(await viper.listPeers()).items.some(({ id }) => id === east.id));
  const removed = new AbortController();
  for await (const { kind, data } of viper.events({ after: 0, signal: removed.signal })) {
    if (kind !== 'peer.removed') continue;
    assert.deepEqual(data, { peerId: east.id, name: 'east' });
    break;
  }
});
