import assert from 'node:assert/strict';
import { test } from 'node:test';
import {
  isInPrefix,
  newNeighbour,
  observeProbes,
  observeTransfer,
  ownerOfAddress,
  standingOf,
} from './neighbours.ts';

const policy = { acceptableMs: 150, silentAfterMs: 180_000 };

test('a peer is a neighbour below the acceptable RTT, and as long as it answers', () => {
  const fresh = newNeighbour('a');
  assert.equal(standingOf(fresh, policy, 0), 'unknown');
  const near = observeProbes(fresh, [20, 'lost', 22], 1000);
  assert.equal(standingOf(near, policy, 2000), 'neighbour');
  assert.equal(standingOf(near, policy, 1000 + 180_001), 'silent');
  assert.equal(standingOf(observeProbes(fresh, [149.9], 0), policy, 0), 'neighbour');
  assert.equal(standingOf(observeProbes(fresh, [150], 0), policy, 0), 'far');
});

test('one peer that grows slow stops to be a neighbour, and comes back when it is fast again', () => {
  let peer = observeProbes(newNeighbour('a'), [20, 20, 20], 0);
  for (let i = 0; i < 5; i += 1) peer = observeProbes(peer, [400, 400, 400, 400], i);
  assert.equal(standingOf(peer, policy, 5), 'far');
  for (let i = 0; i < 8; i += 1) peer = observeProbes(peer, [20, 20, 20, 20], i);
  assert.equal(standingOf(peer, policy, 5), 'neighbour');
});

test('bandwidth comes from transfers that no limit of their own held back', () => {
  const first = observeTransfer(newNeighbour('a'), 300e6);
  assert.equal(first.bandwidthBps, 300e6);
  assert.equal(observeTransfer(first, 95e6, 100e6).bandwidthBps, 300e6);
  assert.equal(observeTransfer(first, 100e6).bandwidthBps, 250e6);
  assert.equal(observeTransfer(newNeighbour('a'), 95e6, 100e6).bandwidthBps, 95e6);
});

test('an address belongs to the cloudlet with the longest prefix around it', () => {
  const cloudlets = [
    { cloudletId: 'wide', lans: ['10.0.0.0/8'] },
    { cloudletId: 'c2', lans: ['10.5.0.0/24', '10.6.0.0/24'] },
  ];
  assert.equal(ownerOfAddress('10.5.0.8', cloudlets), 'c2');
  assert.equal(ownerOfAddress('10.7.0.8', cloudlets), 'wide');
  assert.equal(ownerOfAddress('192.0.2.1', cloudlets), undefined);
  assert.equal(ownerOfAddress('fe80::1', cloudlets), undefined);
});

test('prefixes of the ends of the address space are told apart', () => {
  assert.ok(isInPrefix('255.255.255.255', '255.255.255.254/31'));
  assert.ok(!isInPrefix('255.255.255.253', '255.255.255.254/31'));
  assert.ok(isInPrefix('1.2.3.4', '0.0.0.0/0'));
  for (const bad of ['1.2.3.4', '1.2.3.4/33', '1.2.3/8', '1.2.3.400/8', 'x/8'])
    assert.ok(!isInPrefix('1.2.3.4', bad), bad);
});
