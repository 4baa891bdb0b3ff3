import assert from 'node:assert/strict';
import { X509Certificate } from 'node:crypto';
import { describe, test } from 'node:test';
import { AppError } from '../model/errors.ts';
import { signRenewal } from './admission.ts';
import {
  type Answer,
  peerAt,
  startMs,
  type TestCloudlet,
  testFounder,
  testMember,
  testServer,
} from './fixtures.ts';
import { asPeer } from './identity.ts';
import { PeerClient } from './peer-client.ts';
import { renewCertificate } from './renewal.ts';
import { acceptAnnouncement, acceptRemoval, announce, announceRemoval, syncPeers } from './sync.ts';
import { FleetTrust } from './trust.ts';

const serve = (cloudlet: TestCloudlet, answer: Answer) => testServer(cloudlet.identity.tls, answer);
const now = () => startMs;

describe('calling a peer', () => {
  test('shows it our certificate and gives its answer', async () => {
    await using founder = await testFounder();
    await using member = await testMember(founder, 'member');
    const trust = new FleetTrust(founder.identity, founder.peers);
    await using server = await serve(founder, ({ method, path, body, socket }) => {
      const caller = trust.identify(socket.getPeerX509Certificate()!);
      return { method, path, body, caller };
    });
    using client = new PeerClient(member.identity);
    const peer = peerAt(founder, server.url);
    assert.deepEqual(await client.fetch(peer, '/v1/x', { method: 'POST', json: { a: 1 } }), {
      method: 'POST',
      path: '/v1/x',
      body: { a: 1 },
      caller: { cloudletId: member.identity.id, name: 'member' },
    });
    const { name, certificateFingerprint } = asPeer(founder.identity);
    assert.deepEqual(client.seen(peer.id), { name, certificateFingerprint });
  });

  test('after a renewal shows it the new certificate', async () => {
    await using founder = await testFounder();
    await using member = await testMember(founder, 'member');
    await using server = await serve(founder, ({ socket }) => socket.getPeerX509Certificate()!.serialNumber);
    using client = new PeerClient(member.identity);
    const peer = peerAt(founder, server.url);
    const before = await client.fetch(peer, '/');
    const cloudletId = member.identity.id;
    client.useIdentity(
      await renewCertificate(member.identity, { sign: (csr) => signRenewal(founder, { cloudletId, csr }) }),
    );
    assert.notEqual(await client.fetch(peer, '/'), before);
  });

  test('who is another cloudlet of the fleet at that address is refused before anything is sent', async () => {
    await using founder = await testFounder();
    await using member = await testMember(founder, 'member');
    await using other = await testMember(founder, 'other');
    await using server = await serve(other, () => assert.fail('was asked'));
    using client = new PeerClient(member.identity);
    await assert.rejects(client.fetch(peerAt(founder, server.url), '/v1/x'), { code: 'peer_untrusted' });
    assert.equal(server.receivedBytes(), 0);
    assert.equal(client.seen(founder.identity.id), undefined);
  });

  test('of another fleet is refused before anything is sent', async () => {
    await using founder = await testFounder();
    await using stranger = await testFounder('stranger');
    await using server = await serve(stranger, () => assert.fail('was asked'));
    using client = new PeerClient(founder.identity);
    await assert.rejects(client.fetch(peerAt(stranger, server.url), '/v1/x'), { code: 'peer_untrusted' });
    assert.equal(server.receivedBytes(), 0);
  });

  test('passes on its own error, and calls everything else unreachable', async () => {
    await using founder = await testFounder();
    await using member = await testMember(founder, 'member');
    const answers: Record<string, () => unknown> = {
      '/ours': () => {
        throw new AppError('in_use', 'No.', { usedBy: ['x'] });
      },
      '/large': () => 'x'.repeat(5000),
    };
    await using server = await serve(founder, ({ path }) => answers[path]!());
    using client = new PeerClient(member.identity);
    const peer = peerAt(founder, server.url);
    const details = { usedBy: ['x'], answeredBy: server.url };
    await assert.rejects(client.fetch(peer, '/ours'), { code: 'in_use', message: 'No.', details });
    await assert.rejects(client.fetch(peer, '/large', { maxBytes: 4000 }), { code: 'peer_unreachable' });
    await server[Symbol.asyncDispose]();
    await assert.rejects(client.fetch(peer, '/ours'), { code: 'peer_unreachable' });
  });

  test('who does not answer ends by the deadline, or at once by the signal', async () => {
    await using founder = await testFounder();
    await using member = await testMember(founder, 'member');
    const asked = Promise.withResolvers<void>();
    await using server = await serve(founder, () => {
      asked.resolve();
      return new Promise(() => {});
    });
    using client = new PeerClient(member.identity);
    const peer = peerAt(founder, server.url);
    await assert.rejects(client.fetch(peer, '/', { timeoutMs: 50 }), { code: 'timeout' });
    const abort = new AbortController();
    const call = client.fetch(peer, '/', { signal: abort.signal });
    await asked.promise;
    abort.abort(new Error('enough'));
    await assert.rejects(call, { message: 'enough' });
  });
});

describe('a fleet in sync', () => {
  test('learns of peers through peers, and refreshes those who answer', async () => {
    await using founder = await testFounder();
    await using early = await testMember(founder, 'early');
    await using late = await testMember(founder, 'late');
    await using server = await serve(founder, () => ({ items: founder.peers.list() }));
    const seen = peerAt(founder, server.url);
    early.peers.upsert({
      ...seen,
      name: 'old-name',
      certificateFingerprint: '0'.repeat(64),
      lastSeenAt: '2025-01-01T00:00:00Z',
    });
    using client = new PeerClient(early.identity);
    const outcome = await syncPeers({ peers: early.peers, client });
    assert.deepEqual(
      outcome.learned.map(({ id }) => id),
      [late.identity.id],
    );
    assert.deepEqual(outcome.reached, [founder.identity.id]);
    const { lastSeenAt, ...rest } = early.peers.get(founder.identity.id)!;
    const { lastSeenAt: _before, ...expected } = seen;
    assert.deepEqual(rest, expected);
    assert.ok(Date.parse(lastSeenAt!) > startMs);
    assert.equal(early.peers.get(early.identity.id), undefined);
  });

  test('goes on when one fails, and says which', async () => {
    await using founder = await testFounder();
    await using good = await testMember(founder, 'good');
    await using bad = await testMember(founder, 'bad');
    await using goodServer = await serve(good, () => ({ items: [] }));
    await using badServer = await serve(bad, () => ({ items: 'none' }));
    founder.peers.upsert(peerAt(good, goodServer.url));
    founder.peers.upsert(peerAt(bad, badServer.url));
    using client = new PeerClient(founder.identity);
    const { reached, failed } = await syncPeers({ peers: founder.peers, client, parallel: 1 });
    assert.deepEqual(reached, [good.identity.id]);
    assert.deepEqual(
      failed.map(({ id, error }) => [id, error.code]),
      [[bad.identity.id, 'peer_unreachable']],
    );
  });

  test('what the founder has put out is out, and no other member can say so or bring it back', async () => {
    await using founder = await testFounder();
    await using early = await testMember(founder, 'early');
    await using late = await testMember(founder, 'late');
    const gone = peerAt(late, 'https://gone.example');
    const answer = (removed: string[]) => () => ({ items: [gone], removed });
    await using atFounder = await serve(founder, answer([gone.id]));
    await using atOther = await serve(late, answer([founder.identity.id]));
    using client = new PeerClient(early.identity);
    early.peers.upsert(peerAt(founder, atFounder.url));
    early.peers.upsert(peerAt(late, atOther.url));
    const call = { peers: early.peers, client, founderId: founder.identity.id };
    const { removed, learned } = await syncPeers(call);
    assert.deepEqual(
      removed.map(({ id }) => id),
      [gone.id],
    );
    assert.deepEqual(learned, []);
    assert.ok(early.peers.isRemoved(gone.id));
    assert.ok(early.peers.get(founder.identity.id));
    assert.deepEqual((await syncPeers(call)).removed, []);
  });

  test('a removal is taken from the founder and from the one that leaves, and from nobody else', async () => {
    await using founder = await testFounder();
    await using early = await testMember(founder, 'early');
    await using late = await testMember(founder, 'late');
    const founderId = founder.identity.id;
    const trust = new FleetTrust(early.identity, early.peers);
    await using server = await serve(early, ({ method, path, socket }) => {
      assert.equal(method, 'DELETE');
      const caller = trust.identify(socket.getPeerX509Certificate()!) as { cloudletId: string };
      acceptRemoval(early.peers, caller, founderId, path.split('/').at(-1)!);
      return undefined;
    });
    early.peers.upsert(peerAt(founder, 'https://founder.example'));
    early.peers.upsert(peerAt(late, 'https://late.example'));
    const tell = async (by: TestCloudlet, removed: string) => {
      using client = new PeerClient(by.identity);
      by.peers.upsert(peerAt(early, server.url));
      return await announceRemoval({ peers: by.peers, client, removed });
    };
    const { failed } = await tell(late, founderId);
    assert.ok(failed.some(({ id }) => id === early.identity.id));
    assert.throws(() => acceptRemoval(early.peers, { cloudletId: late.identity.id }, founderId, founderId), {
      code: 'forbidden',
    });
    assert.ok(early.peers.get(founderId));
    await tell(founder, late.identity.id);
    assert.ok(early.peers.isRemoved(late.identity.id));
  });

  test('asks no more peers at a time than it may, and stops at the deadline', async () => {
    await using founder = await testFounder();
    for (const name of ['a', 'b', 'c'])
      founder.peers.upsert({ ...peerAt(founder, 'https://x.example'), name, id: crypto.randomUUID() });
    let running = 0;
    let most = 0;
    const client = {
      seen: () => undefined,
      fetch: async (_peer: unknown, _path: string, { signal }: { signal?: AbortSignal } = {}) => {
        running += 1;
        most = Math.max(most, running);
        await new Promise((resolve) => signal!.addEventListener('abort', resolve)).finally(() => {
          running -= 1;
        });
        signal!.throwIfAborted();
      },
    };
    const call = { peers: founder.peers, client: client as never, parallel: 2, deadlineMs: 20 };
    const { failed } = await announce({ ...call, self: asPeer(founder.identity) }).catch(() =>
      assert.fail('threw'),
    );
    assert.equal(most, 2);
    assert.deepEqual(
      failed.map(({ error }) => error.code),
      ['timeout', 'timeout', 'timeout'],
    );
  });

  test('hears a new member that announces itself', async () => {
    await using founder = await testFounder();
    await using early = await testMember(founder, 'early');
    await using late = await testMember(founder, 'late');
    const trust = new FleetTrust(early.identity, early.peers);
    await using server = await serve(early, ({ method, path, body, socket }) => {
      assert.deepEqual([method, path], ['POST', '/v1/peers']);
      const caller = trust.identify(socket.getPeerX509Certificate()!) as { cloudletId: string };
      return acceptAnnouncement(early.peers, caller, body as never);
    });
    late.peers.remove(founder.identity.id, startMs);
    late.peers.upsert(peerAt(early, server.url));
    using client = new PeerClient(late.identity);
    const self = asPeer(late.identity);
    assert.deepEqual((await announce({ peers: late.peers, client, self })).failed, []);
    assert.equal(early.peers.get(self.id)!.url, self.url);
  });
});

test('a peer cannot speak for another one, and not at all once it is removed', async () => {
  await using founder = await testFounder();
  await using member = await testMember(founder, 'member');
  const said = asPeer(member.identity);
  const caller = { cloudletId: said.id };
  assert.throws(() => acceptAnnouncement(founder.peers, { cloudletId: founder.identity.id }, said), {
    code: 'forbidden',
  });
  assert.equal(acceptAnnouncement(founder.peers, caller, said), true);
  founder.peers.remove(said.id, startMs);
  assert.equal(acceptAnnouncement(founder.peers, caller, said), false);
  assert.equal(founder.peers.get(said.id), undefined);
});

describe('a certificate', () => {
  test('of the fleet stands for its cloudlet until it runs out or the cloudlet is removed', async () => {
    await using founder = await testFounder();
    await using member = await testMember(founder, 'member');
    const certificate = new X509Certificate(member.identity.certificate);
    const who = { cloudletId: member.identity.id, name: 'member' };
    assert.deepEqual(new FleetTrust(founder.identity, founder.peers).identify(certificate), who);
    const nextYear = () => Date.now() + 366 * 24 * 3_600_000;
    assert.equal(new FleetTrust(founder.identity, founder.peers, nextYear).identify(certificate), 'expired');
    assert.equal(
      new FleetTrust(founder.identity, founder.peers, now).identify(certificate),
      'expired',
      'not yet',
    );
    const trust = new FleetTrust(founder.identity, founder.peers);
    trust.identify(certificate);
    founder.peers.remove(who.cloudletId, startMs);
    assert.equal(trust.identify(certificate), 'revoked');
  });

  test('of another fleet, or the CA itself, stands for nobody', async () => {
    await using founder = await testFounder();
    await using stranger = await testFounder('founder');
    const trust = new FleetTrust(founder.identity, founder.peers);
    for (const pem of [
      stranger.identity.certificate,
      stranger.identity.caCertificate,
      founder.identity.caCertificate,
    ]) {
      assert.equal(trust.identify(new X509Certificate(pem)), undefined);
    }
  });
});
