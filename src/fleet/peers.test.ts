import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import fc from 'fast-check';
import type { Peer } from '../model/fleet.ts';
import { newId } from '../model/ids.ts';
import { MemoryState, startMs } from './fixtures.ts';
import { parsePeer, parsePeers } from './peer-entry.ts';
import { MAX_PEERS, PeerDirectory } from './peers.ts';

const at = (minutes: number) => new Date(startMs + minutes * 60_000).toISOString();
const testPeer = (overrides: Partial<Peer> = {}): Peer => ({
  id: newId(),
  name: 'peer',
  url: 'https://peer.example:7443',
  certificateFingerprint: 'ab'.repeat(32),
  joinedAt: at(0),
  lastSeenAt: at(0),
  ...overrides,
});
const ownId = newId();
const ids = Array.from({ length: 5 }, newId);

describe('the directory', () => {
  test('is the same after a restart, removals included', () => {
    const state = new MemoryState();
    const before = new PeerDirectory(state, ownId);
    const [kept, removed] = [testPeer({ name: 'a' }), testPeer({ name: 'b' })];
    before.admit(kept);
    before.admit(removed);
    before.remove(removed.id, startMs);
    const after = new PeerDirectory(state, ownId);
    assert.deepEqual(after.list(), [kept]);
    assert.equal(after.isRemoved(removed.id), true);
  });

  test('forgets what was written in a transaction that is rolled back', () => {
    const state = new MemoryState();
    const peers = new PeerDirectory(state, ownId);
    assert.throws(() =>
      state.transact(() => {
        peers.admit(testPeer());
        throw new Error('no');
      }),
    );
    assert.deepEqual(peers.list(), []);
  });

  test('keeps the day that a peer joined, whatever it says later', () => {
    const peers = new PeerDirectory(new MemoryState(), ownId);
    const peer = testPeer();
    peers.upsert(peer);
    peers.upsert({ ...peer, url: 'https://moved.example', joinedAt: at(9) });
    assert.deepEqual(peers.get(peer.id), { ...peer, url: 'https://moved.example' });
  });

  test('refuses to remove who is not there', () => {
    const peers = new PeerDirectory(new MemoryState(), ownId);
    assert.throws(() => peers.remove(newId(), startMs), { code: 'not_found' });
  });

  test('is bounded', () => {
    const peers = new PeerDirectory(new MemoryState(), ownId);
    const crowd = Array.from({ length: MAX_PEERS + 5 }, () => testPeer());
    assert.equal(peers.merge(crowd, startMs).length, MAX_PEERS);
    assert.throws(() => peers.admit(testPeer()), { code: 'too_many' });
    peers.admit({ ...peers.list()[0]!, url: 'https://moved.example' });
  });

  test('whatever is told: ids once, never ourselves, never who was removed, the newest entry, no time to come', () => {
    const heard = fc.array(
      fc.record({
        id: fc.constantFrom(ownId, ...ids),
        minutes: fc.integer({ min: -50, max: 50 }),
        url: fc.nat(9),
      }),
      { maxLength: 40 },
    );
    fc.assert(
      fc.property(fc.array(heard, { maxLength: 4 }), (rounds) => {
        const state = new MemoryState();
        const peers = new PeerDirectory(state, ownId);
        const removed = testPeer({ id: ids[0]! });
        peers.admit(removed);
        peers.remove(removed.id, startMs);
        const newest = new Map<string, number>();
        for (const round of rounds) {
          const entries = round.map(({ id, minutes, url }) =>
            testPeer({ id, url: `https://h${url}.example`, lastSeenAt: at(minutes) }),
          );
          for (const { id, minutes } of round) {
            newest.set(id, Math.max(newest.get(id) ?? Number.NEGATIVE_INFINITY, Math.min(minutes, 0)));
          }
          const before = new Set(peers.list().map(({ id }) => id));
          const learned = peers.merge(entries, startMs).map(({ id }) => id);
          const after = peers.list().map(({ id }) => id);
          assert.deepEqual(learned.sort(), after.filter((id) => !before.has(id)).sort());
        }
        newest.delete(ownId);
        newest.delete(removed.id);
        const listed = peers.list();
        assert.deepEqual(
          new Map(listed.map(({ id, lastSeenAt }) => [id, lastSeenAt])),
          new Map(Array.from(newest, ([id, minutes]) => [id, at(minutes)])),
        );
        assert.deepEqual(new PeerDirectory(state, ownId).list(), listed);
      }),
    );
  });
});

describe('an entry from outside', () => {
  test('that is good is taken, without what does not belong there', () => {
    const peer = testPeer();
    assert.deepEqual(parsePeer({ ...peer, url: `${peer.url}/`, extra: 'x' }), peer);
  });

  test('that is bad in any field is dropped, the others stay', () => {
    const good = testPeer();
    const bad = [
      { id: 'x' },
      { name: 'Bad Name' },
      { name: 7 },
      { url: 'http://peer.example' },
      { url: 'https://peer.example/path' },
      { certificateFingerprint: 'AB'.repeat(32) },
      { joinedAt: 'yesterday' },
      { joinedAt: '2026-99-99T00:00:00Z' },
      { lastSeenAt: null },
    ].map((each) => ({ ...good, ...each }));
    assert.deepEqual(parsePeers([...bad, null, 'x', [], good]), [good]);
  });

  test('can be anything at all without harm', () => {
    fc.assert(
      fc.property(fc.anything(), (value) => {
        assert.equal(parsePeer(value), undefined);
        assert.ok(parsePeers(value) === undefined || Array.isArray(value));
      }),
    );
  });
});
