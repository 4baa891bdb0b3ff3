import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { Continuity } from '../model/vm.ts';
import {
  type Action,
  bridgeFor,
  type Handoff,
  planAwayEndRemoval,
  planDestination,
  planHomeEnd,
  planHomeTurn,
  planSource,
} from './handoff-plan.ts';
import { parseHop } from './host-route-plan.ts';

const owner = '11111111-0000-4000-8000-000000000000';
const vmId = 'abcdef01-2345-4000-8000-000000000001';
const last = {
  mac: '02:00:00:00:00:01',
  address: '10.4.0.10/24',
  subnet: '10.4.0.0/24',
  gateway: '10.4.0.1',
};
const next = {
  mac: '02:00:00:00:00:02',
  address: '10.5.0.10/24',
  subnet: '10.5.0.0/24',
  gateway: '10.5.0.1',
};
const tunnel = { vni: 0xab, local: '192.0.2.1', remote: '192.0.2.2' };
const handoff = (continuity: Continuity, more: Partial<Handoff> = {}): Handoff => ({
  owner,
  vmId,
  continuity,
  bridge: 'lan0',
  serving: 0,
  waiting: 1,
  last,
  ...more,
});
const preJoin = handoff('mptcp', { next, tunnel });
const stretch = handoff('stretch', { tunnel, gatewayMac: '02:00:0a:00:00:01' });

const linesOf = (action: Action | undefined): string[] =>
  action?.kind === 'host' ? action.commands.map((command) => command.join(' ')) : [];

test('pre-join: tunnel, address, join, in this order, and nothing of the network after the move but to tidy up', () => {
  const { before, after } = planSource(preJoin);
  assert.deepEqual(
    before.map(({ name, run }) => [name, run.kind === 'guest' ? run.step.name : run.kind]),
    [
      ['tunnel', 'host'],
      ['prepare', 'prepare'],
      ['join', 'join'],
    ],
  );
  assert.deepEqual(after.flatMap(linesOf), [
    'ip link delete dev vipx0000ab type vxlan',
    'ip link delete dev vipbabcdef01n1 type bridge',
  ]);
});

test('pre-join takes the waiting interface, and only that, out of the LAN and into the tunnel', () => {
  const lines = linesOf(planSource(preJoin).before[0]?.run);
  assert.ok(lines.includes('ip link set dev vipabcdef01n1 master vipbabcdef01n1'));
  assert.ok(lines.includes('ip link set dev vipx0000ab master vipbabcdef01n1'));
  assert.ok(lines.every((line) => !line.includes('vipabcdef01n0') && !line.includes('lan0')));
});

test('every step of the source that changes something says how it is undone, by the steps in reverse', () => {
  const undoes = planSource(preJoin).before.map(({ undo }) => undo!);
  assert.equal(linesOf(undoes[0])[0], 'ip link set dev vipabcdef01n1 master lan0');
  // The address that was next goes, the one that was served stays.
  assert.deepEqual(undoes.slice(1), [
    { kind: 'guest', step: { name: 'finish', next: last, last: next, mtu: 1500 } },
    { kind: 'guest', step: { name: 'join', next: last, last: next, waitMs: 15_000 } },
  ]);
});

test('the destination plugs its end of the tunnel into its LAN, and takes it out before the guest tidies up', () => {
  const { before, after } = planDestination(preJoin);
  assert.ok(linesOf(before[0]?.run).includes('ip link set dev vipx0000ab master lan0'));
  assert.deepEqual(linesOf(before[0]?.undo), ['ip link delete dev vipx0000ab type vxlan']);
  assert.deepEqual(
    after.map((action) => (action.kind === 'guest' ? action.step : linesOf(action))),
    [['ip link delete dev vipx0000ab type vxlan'], { name: 'finish', next, last, mtu: 1500 }],
  );
  assert.equal(bridgeFor(preJoin, 0), undefined);
});

test('a stretched LAN ends in a bridge of the VM alone, with gateway and route, which stay', () => {
  const { before, after } = planDestination(stretch);
  const lines = linesOf(before[0]?.run);
  assert.ok(lines.includes('ip link set dev vipbabcdef01n0 address 02:00:0a:00:00:01'));
  assert.ok(lines.includes('ip address add 10.4.0.1/32 dev vipbabcdef01n0'));
  assert.ok(lines.includes('ip route add 10.4.0.10/32 dev vipbabcdef01n0'));
  assert.deepEqual(after, []);
  assert.deepEqual(planAwayEndRemoval(stretch), [
    ['ip', 'link', 'delete', 'dev', 'vipx0000ab', 'type', 'vxlan'],
    ['ip', 'link', 'delete', 'dev', 'vipbabcdef01n0', 'type', 'bridge'],
  ]);
  assert.deepEqual(
    [0, 1].map((index) => bridgeFor(stretch, index)),
    ['vipbabcdef01n0', undefined],
  );
});

test('without a gateway of the cloudlet, a LAN is stretched as it is: no address and no route', () => {
  const lines = linesOf(planDestination(handoff('stretch', { tunnel })).before[0]?.run);
  assert.ok(lines.every((line) => !line.includes('route') && !line.startsWith('ip address')));
});

test('the home keeps the MAC of a VM that is away, as the answers to its ARP end at the other gateway', () => {
  const { run, undo } = planHomeEnd(stretch);
  assert.equal(
    linesOf(run).at(-1),
    'ip neighbour replace 10.4.0.10 dev lan0 lladdr 02:00:00:00:00:01 nud permanent',
  );
  assert.equal(linesOf(undo)[0], 'ip neighbour delete 10.4.0.10 dev lan0');
  assert.deepEqual(planSource(stretch).before[0], planHomeEnd(stretch));
});

test('a VM that comes home, or has no address to change, needs nothing', () => {
  for (const plan of [planSource, planDestination]) {
    const { before, after } = plan(handoff('stretch'));
    assert.deepEqual([...before, ...after], []);
  }
});

test('without continuity the guest takes its new address after the move', () => {
  const none = handoff('none', { next });
  assert.deepEqual(
    planSource(none).before.map(({ name }) => name),
    ['prepare'],
  );
  assert.deepEqual(planDestination(none).after, [
    { kind: 'guest', step: { name: 'finish', next, last, mtu: 1500 } },
  ]);
});

test('no program of a plan is given a word that it could take for an option or a value of its own', () => {
  for (const bad of [
    { bridge: '-lan' },
    { tunnel: { ...tunnel, remote: 'x; reboot' } },
    { tunnel: { ...tunnel, vni: 0 } },
  ])
    assert.throws(() => planDestination({ ...preJoin, ...bad }), { code: 'invalid_request' });
});

test('while the VM stands still its frames are turned to where it will run', () => {
  assert.deepEqual(planSource(preJoin).turn, []);
  assert.deepEqual(planDestination(preJoin).turn.flatMap(linesOf), [
    `bridge fdb replace ${next.mac} dev vipabcdef01n1 master dynamic`,
  ]);
  assert.deepEqual(planSource(stretch).turn.flatMap(linesOf), [
    `bridge fdb replace ${last.mac} dev vipx0000ab master dynamic`,
  ]);
  const arriving = `bridge fdb replace ${last.mac} dev vipabcdef01n0 master dynamic`;
  assert.deepEqual(planDestination(stretch).turn.flatMap(linesOf), [arriving]);
  const { tunnel: _none, ...home } = stretch;
  assert.deepEqual(planDestination(home).turn.flatMap(linesOf), [arriving]);
});

const routed = handoff('host-route', {
  tunnel,
  hop: { device: 'wan0', via: '192.0.2.9' },
  gatewayMac: '02:00:0a:00:00:01',
});

test('a host route is prepared while the VM runs, and turned when it stands still: at its home, and where it goes', () => {
  const atHome = planSource(routed);
  const made = linesOf(atHome.before[0]?.run);
  assert.ok(
    made.includes(`ip link add name vipmabcdef01n0 link lan0 address ${last.mac} type macvlan mode bridge`),
  );
  // Two with one MAC in one LAN: not before the VM stands still.
  assert.ok(made.every((line) => !line.endsWith(' up') && !line.includes('route')));
  assert.deepEqual(atHome.turn.flatMap(linesOf), [
    'ip route replace 10.4.0.10/32 via 192.0.2.9 dev wan0',
    'ip link set dev vipmabcdef01n0 up',
  ]);
  const there = planDestination(routed);
  const gateway = linesOf(there.before[0]?.run);
  assert.ok(gateway.includes('ip link set dev vipbabcdef01n0 address 02:00:0a:00:00:01'));
  assert.ok(gateway.every((line) => !line.includes('ip route') && !line.includes('vxlan')));
  assert.deepEqual(there.turn.flatMap(linesOf), ['ip route replace 10.4.0.10/32 dev vipbabcdef01n0']);
  assert.deepEqual(
    [0, 1].map((index) => bridgeFor(routed, index)),
    ['vipbabcdef01n0', undefined],
  );
});

test('a host route of a VM that stays after all leads to it again', () => {
  const home = ['ip link set dev vipmabcdef01n0 down', 'ip route flush exact 10.4.0.10/32'];
  assert.deepEqual(planSource(routed).turnBack.flatMap(linesOf), home);
  const away = planSource({ ...routed, isAway: true });
  assert.deepEqual(away.before, []);
  assert.deepEqual(away.turn.flatMap(linesOf), ['ip route flush exact 10.4.0.10/32 dev vipbabcdef01n0']);
  assert.deepEqual(away.turnBack.flatMap(linesOf), ['ip route replace 10.4.0.10/32 dev vipbabcdef01n0']);
});

test('a VM with a host route that comes home is heard there, and its stand-in is not', () => {
  const { tunnel: _none, ...home } = routed;
  assert.deepEqual(planDestination(home).turn.flatMap(linesOf), [
    `bridge fdb replace ${last.mac} dev vipabcdef01n0 master dynamic`,
    'ip link set dev vipmabcdef01n0 down',
    'ip route flush exact 10.4.0.10/32',
  ]);
  assert.deepEqual(planHomeTurn(routed).flatMap(linesOf), planSource(routed).turn.flatMap(linesOf));
});

test('the first step of a way is read from what ip says', () => {
  assert.deepEqual(parseHop('[{"dst":"192.0.2.2","gateway":"192.0.2.9","dev":"wan0"}]'), {
    device: 'wan0',
    via: '192.0.2.9',
  });
  assert.deepEqual(parseHop('[{"dst":"192.0.2.2","dev":"eth0"}]'), { device: 'eth0' });
  assert.equal(parseHop('[]'), undefined);
});
