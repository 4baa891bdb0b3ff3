import assert from 'node:assert/strict';
import { test } from 'node:test';
import { lansOf, networkOf, sightingIn } from './sightings.ts';

const mac = '02:00:00:00:00:07';
const tables = [
  {
    neighbours: [
      { dst: '10.5.0.8', lladdr: mac, state: ['REACHABLE'] },
      { dst: '10.5.0.9', lladdr: '02:00:00:00:00:09', state: ['STALE'] },
      { dst: '10.5.0.10', state: ['FAILED'] },
    ],
    forwarding: [{ mac: '02:00:00:00:00:11', ifname: 'veth1' }],
  },
];

test('a device is seen by its card, with the address that it has here', () => {
  assert.deepEqual(sightingIn(tables, { macs: [mac], addresses: ['10.4.0.2'] }), {
    sees: true,
    address: '10.5.0.8',
  });
});

test('a device whose cards nobody knows is seen by its address', () => {
  assert.deepEqual(sightingIn(tables, { macs: [], addresses: ['10.5.0.9'] }), {
    sees: true,
    address: '10.5.0.9',
  });
  assert.deepEqual(sightingIn(tables, { macs: [], addresses: ['10.5.0.10'] }), { sees: false });
});

test('somebody else with its address is not the device', () => {
  assert.deepEqual(sightingIn(tables, { macs: ['02:aa:00:00:00:01'], addresses: ['10.5.0.9'] }), {
    sees: false,
  });
});

test('a card that only the bridge has seen is here, with an address that nobody knows', () => {
  assert.deepEqual(sightingIn(tables, { macs: ['02:00:00:00:00:11'], addresses: [] }), { sees: true });
});

test('entries of another shape are passed over', () => {
  const odd = [{ neighbours: [{}, { lladdr: mac }, { lladdr: mac, state: ['FAILED'] }], forwarding: [{}] }];
  assert.deepEqual(sightingIn(odd, { macs: [mac], addresses: [] }), { sees: false });
});

test('LANs are those that are configured, else those of the bridges', () => {
  const plan = { subnet: '10.1.0.0/24', gateway: '10.1.0.1', from: '10.1.0.100', to: '10.1.0.199' };
  const card = {
    address: '10.9.0.1',
    netmask: '',
    mac: '',
    internal: false,
    family: 'IPv4',
    cidr: '10.9.0.1/16',
  };
  const lans = lansOf(
    [
      { name: 'user', kind: 'user' },
      { name: 'lan', kind: 'bridge', bridge: 'lan0', addresses: plan },
      { name: 'old', kind: 'bridge', bridge: 'br0' },
      { name: 'down', kind: 'bridge', bridge: 'br1' },
    ],
    { br0: [card as never] },
  );
  assert.deepEqual(lans, ['10.1.0.0/24', '10.9.0.0/16']);
});

test('the network of an address is its first address', () => {
  assert.equal(networkOf('10.4.0.1/24'), '10.4.0.0/24');
  assert.equal(networkOf('192.168.255.129/25'), '192.168.255.128/25');
  assert.equal(networkOf('172.16.5.4/12'), '172.16.0.0/12');
});
