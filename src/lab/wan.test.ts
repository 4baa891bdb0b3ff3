import assert from 'node:assert/strict';
import { test } from 'node:test';
import { layOut } from './layout.ts';
import { parseLab } from './spec.ts';
import { nextHops, planRoutes, planSites } from './wan.ts';

const lab = (topology: 'mesh' | 'star', cellular = false) =>
  layOut(parseLab({ topology, devices: [{ name: 'phone', ...(cellular ? { cellular: {} } : {}) }] }), 7);
const hops = (topology: 'mesh' | 'star', index: number) => {
  const { sites, links } = lab(topology);
  return [...nextHops(sites[index]!, links)].map(([{ name }, address]) => [name, address]);
};

test('in a mesh each cloudlet is one link away', () => {
  assert.deepEqual(hops('mesh', 1), [
    ['c1', '100.64.0.1'],
    ['c3', '100.64.2.2'],
  ]);
});

test('in a star all others are behind the middle', () => {
  assert.deepEqual(hops('star', 1), [
    ['c1', '100.64.0.1'],
    ['c3', '100.64.0.1'],
  ]);
  assert.deepEqual(hops('star', 0), [
    ['c2', '100.64.0.2'],
    ['c3', '100.64.1.2'],
  ]);
});

test('the daemon of another cloudlet is reached over the WAN, never over the management net', () => {
  const layout = lab('mesh');
  const all = [...planSites(layout), ...planRoutes(layout)].map((command) => command.join(' '));
  const routes = all.filter((line) => line.includes('ip -n viper-lab-c1 route add'));
  assert.deepEqual(routes, [
    'ip -n viper-lab-c1 route add 198.18.7.254/32 dev mgmt src 198.18.7.1',
    'ip -n viper-lab-c1 route add 10.2.0.0/24 via 100.64.0.2 src 198.18.7.1',
    'ip -n viper-lab-c1 route add 198.18.7.2/32 via 100.64.0.2 src 198.18.7.1',
    'ip -n viper-lab-c1 route add 10.3.0.0/24 via 100.64.1.2 src 198.18.7.1',
    'ip -n viper-lab-c1 route add 198.18.7.3/32 via 100.64.1.2 src 198.18.7.1',
  ]);
});

test('outside of its namespaces a lab makes nothing but one device, with an address of the lab net', () => {
  const outside = planSites(lab('mesh', true))
    .map((command) => command.join(' '))
    .filter((line) => !/^(ip|tc) -n |^nsenter |^ip netns add /.test(line));
  assert.deepEqual(outside, [
    'ip link add name viper-lab type veth peer name host netns viper-lab-core',
    'ip link set dev viper-lab addrgenmode none',
    'ip address add 198.18.7.254/24 dev viper-lab',
    'ip link set dev viper-lab up',
  ]);
});

test('the cellular network is there only for devices that have it', () => {
  const cells = (cellular: boolean) =>
    planSites(lab('mesh', cellular)).some((command) => command.includes('viper-lab-cell'));
  assert.deepEqual([cells(true), cells(false)], [true, false]);
});
