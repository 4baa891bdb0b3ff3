import assert from 'node:assert/strict';
import { test } from 'node:test';
import { followConfig } from './config.ts';
import { type GroupsInput, membersOf, splitsWithout } from './groups.ts';

const key = (letter: string) => `${letter.repeat(43)}=`;
/** In a row, each within the reach of the next alone. */
const site = (step: number) => ({ latitude: 60 + step * 0.008, longitude: 25, coverageM: 50 });
const tunnel = (step: number) => ({
  publicKey: key('abc'[step]!),
  host: `192.0.2.${step + 1}`,
  port: 51820,
  address: `10.200.0.${step + 1}/24`,
});
const peer = (name: string, step: number) => ({
  peer: { id: name, name, url: 'https://x', certificateFingerprint: '', joinedAt: `2026-01-0${step + 1}` },
  greeted: { lans: [`10.${step}.0.0/24`], site: site(step), wireguard: tunnel(step) },
});
const input: GroupsInput = {
  identity: { id: 'one', name: 'one', joinedAt: '2026-01-01' },
  config: followConfig({ site: site(0), wireguard: { ...tunnel(0), privateKeyFile: '/key' } }),
  lans: ['10.0.0.0/24'],
  peers: [peer('two', 1), peer('three', 2)],
};

test('a member that held its group together is told when it leaves, with the parts that are left', () => {
  assert.deepEqual(
    splitsWithout(input, 'two').map(({ parts }) => parts),
    [[['one'], ['three']]],
  );
  assert.deepEqual(splitsWithout(input, 'three'), []);
});

test('the tunnel leads to each other member of the groups once', () => {
  assert.deepEqual(
    membersOf(input).map(({ name, address }) => [name, address]),
    [
      ['two', '10.200.0.2/24'],
      ['three', '10.200.0.3/24'],
    ],
  );
  const same = { ...input, lans: ['10.2.0.0/24'] };
  assert.throws(() => membersOf(same), /LAN 10.2.0.0\/24 of/);
});
