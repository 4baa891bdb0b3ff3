import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import type { Peer } from '../../model/fleet.ts';
import { newId } from '../../model/ids.ts';
import { testDirectory, testStore } from './fixtures.ts';
import { Store } from './index.ts';

const at = '2026-01-01T00:00:00.000Z';
const later = '2026-01-02T00:00:00.000Z';
const testPeer = (name: string): Peer => ({
  id: newId(),
  name,
  url: 'https://peer.example',
  certificateFingerprint: 'ab'.repeat(32),
  joinedAt: at,
});

describe('a join token', () => {
  test('is used once, and who used it is kept', () => {
    using fixture = testStore();
    const { joinTokens } = fixture.store;
    const token = { id: newId(), secretHash: 'aa', createdAt: at, expiresAt: later };
    joinTokens.insert(token);
    assert.deepEqual(joinTokens.getByHash('aa'), token);
    assert.equal(joinTokens.use(token.id, 'member', later), true);
    assert.equal(joinTokens.use(token.id, 'other', later), false);
    assert.deepEqual(joinTokens.getByHash('aa'), { ...token, usedAt: later, usedBy: 'member' });
    joinTokens.deleteExpired(later);
    assert.notEqual(joinTokens.getByHash('aa'), undefined);
    joinTokens.deleteExpired('2026-01-03T00:00:00.000Z');
    assert.equal(joinTokens.getByHash('aa'), undefined);
  });

  test('is not used when the peer that it admits cannot be entered', () => {
    using fixture = testStore();
    const { store } = fixture;
    const token = { id: newId(), secretHash: 'aa', createdAt: at, expiresAt: later };
    store.joinTokens.insert(token);
    assert.throws(() =>
      store.transact(() => {
        store.joinTokens.use(token.id, 'member', at);
        store.peers.put(testPeer('member'));
        throw new Error('no');
      }),
    );
    assert.deepEqual([store.joinTokens.getByHash('aa'), store.peers.all()], [token, []]);
  });
});

test('peers, and the marks of those that were removed, are there after a restart', () => {
  using directory = testDirectory();
  const [a, b] = [testPeer('a'), testPeer('b')];
  const before = new Store(directory.path);
  before.peers.put(b);
  before.peers.put(a);
  before.peers.put({ ...a, url: 'https://moved.example' });
  assert.equal(before.peers.remove(b.id, later), true);
  assert.equal(before.peers.remove(b.id, later), false);
  before.close();
  using after = new Store(directory.path);
  assert.deepEqual(after.peers.all(), [
    { peer: { ...a, url: 'https://moved.example' }, removed: false },
    { peer: b, removed: true },
  ]);
  after.peers.put(b);
  assert.equal(after.peers.all()[1]!.removed, false, 'admitted again');
});
