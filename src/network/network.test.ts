import assert from 'node:assert/strict';
import { test } from 'node:test';
import { AppError } from '../model/errors.ts';
import type { Run } from './commands.ts';
import { type Link, parseLinks } from './links.ts';
import { findNetwork } from './networks.ts';
import { isTapName, planTap, strayTaps, tapName, tapsOf } from './tap-plan.ts';
import { Taps } from './taps.ts';

const owner = '11111111-0000-4000-8000-000000000000';
const otherOwner = '22222222-0000-4000-8000-000000000000';
const vmId = 'abcdef01-2345-4000-8000-000000000001';
const otherVm = 'abcdef01-2345-4000-8000-000000000002';
const tap = 'vipabcdef01n0';
const mac = '02:00:00:00:00:01';
const networks = [
  { name: 'user', kind: 'user' },
  { name: 'lan', kind: 'bridge', bridge: 'br0' },
  { name: 'wan', kind: 'bridge', bridge: 'br1' },
] as const;

const link = (name: string, facts: Partial<Link> = {}): Link => ({ name, mtu: 1500, ...facts });
const tapLink = (alias?: string, name = tap) =>
  link(name, { kind: 'tun', ...(alias === undefined ? {} : { alias }) });

test('a tap name comes from the VM and the interface, and fits into what Linux takes', () => {
  assert.equal(tapName(vmId, 0), tap);
  assert.equal(tapName(vmId, 99), 'vipabcdef01n99');
  assert.ok(tapName(vmId, 99).length <= 15);
  assert.throws(() => tapName(vmId, 100), {
    code: 'invalid_request',
    message: /interface 100, wanted 0 to 99/,
  });
  assert.throws(() => tapName('x; reboot', 0), TypeError);
});

test('only names of our form are ours', () => {
  for (const name of [tap, 'vip00000000n12']) assert.ok(isTapName(name), name);
  for (const name of [
    'vip0',
    'vipabcdef01',
    'vipabcdef01n',
    'vipABCDEF01n0',
    'vipabcdef01n0x',
    'xvipabcdef01n0',
    'eth0',
  ])
    assert.ok(!isTapName(name), name);
});

test('a tap is made, marked, given the MTU of its bridge, plugged in and set up, in this order', () => {
  assert.deepEqual(planTap({ owner, vmId, index: 0, bridge: 'br0', mtu: 1450 }), {
    name: tap,
    up: [
      ['ip', 'tuntap', 'add', 'dev', tap, 'mode', 'tap'],
      ['ip', 'link', 'set', 'dev', tap, 'alias', `viper:${owner}:${vmId}`],
      ['ip', 'link', 'set', 'dev', tap, 'addrgenmode', 'none'],
      ['ip', 'link', 'set', 'dev', tap, 'mtu', '1450'],
      ['ip', 'link', 'set', 'dev', tap, 'master', 'br0'],
      ['ip', 'link', 'set', 'dev', tap, 'up'],
    ],
    down: [['ip', 'tuntap', 'del', 'dev', tap, 'mode', 'tap']],
  });
});

test('a bridge name that a program could take for an option is refused', () => {
  for (const bridge of ['-br', '', 'a b', 'a/b', '0123456789abcdef'])
    assert.throws(() => planTap({ owner, vmId, index: 0, bridge }), { code: 'invalid_request' }, bridge);
});

test('the taps of a VM are found by name, kind and alias', () => {
  const mine = tapLink(`viper:${owner}:${vmId}`);
  const halfMade = tapLink(undefined, 'vipabcdef01n1');
  const links = [
    link('eth0'),
    mine,
    halfMade,
    tapLink(`viper:${owner}:${otherVm}`, 'vipabcdef01n2'),
    tapLink(`viper:${otherOwner}:${vmId}`, 'vipabcdef01n3'),
    tapLink('somebody else', 'vipabcdef01n4'),
    link('vipabcdef01n5', { kind: 'dummy' }),
    tapLink(`viper:${owner}:${vmId}`, 'tap0'),
  ];
  assert.deepEqual(tapsOf(links, owner, vmId), [mine, halfMade]);
});

test('strays are the marked taps of this cloudlet whose VM is gone, and nothing else', () => {
  const stray = tapLink(`viper:${owner}:${otherVm}`, 'vipabcdef01n1');
  const links = [
    tapLink(`viper:${owner}:${vmId}`),
    stray,
    tapLink(`viper:${otherOwner}:${otherVm}`, 'vipabcdef01n2'),
    tapLink(undefined, 'vipabcdef01n3'),
    link('vipabcdef01n4', { kind: 'dummy', alias: `viper:${owner}:${otherVm}` }),
  ];
  assert.deepEqual(strayTaps(links, owner, [vmId]), [stray]);
});

test('the devices that ip lists are read; output of another form is refused', () => {
  const output = JSON.stringify([
    { ifname: 'lo', mtu: 65536 },
    {},
    { ifname: tap, mtu: 1400, master: 'br9', linkinfo: { info_kind: 'tun' }, ifalias: 'viper:x:y' },
  ]);
  assert.deepEqual(parseLinks(output), [
    { name: 'lo', mtu: 65536 },
    { name: tap, mtu: 1400, kind: 'tun', master: 'br9', alias: 'viper:x:y' },
  ]);
  assert.deepEqual(parseLinks(''), []);
  for (const bad of ['1: lo: <LOOPBACK>', '{}', '[{"ifname":3,"mtu":1}]', '[{"ifname":"lo"}]'])
    assert.throws(() => parseLinks(bad), { code: 'unsupported' }, bad);
});

test('a network that the cloudlet lacks is refused with those that it has', () => {
  assert.equal(findNetwork(networks, 'lan'), networks[1]);
  assert.throws(() => findNetwork(networks, 'dmz'), {
    code: 'unsupported',
    message: "Join network: it is 'dmz', wanted one of user, lan, wan",
  });
});

/** A host with two bridges that notes its commands and fails the one that `failAt` matches. */
function fakeHost(failAt?: RegExp, present: unknown[] = []) {
  const commands: string[] = [];
  const bridges = ['br0', 'br1'].map((ifname) => ({ ifname, mtu: 1450, linkinfo: { info_kind: 'bridge' } }));
  const run: Run = async (program, args) => {
    const command = [program, ...args].join(' ');
    if (command.includes('link show')) return { stdout: JSON.stringify([...bridges, ...present]) };
    commands.push(command);
    if (failAt?.test(command)) throw new Error('Operation not permitted');
    return { stdout: '' };
  };
  return { commands, run };
}
const nets = [
  { network: 'lan', mac },
  { network: 'user', mac },
  { network: 'wan', mac },
];

test('a VM gets a tap for each interface on a bridge and none for the user network', async () => {
  const { run, commands } = fakeHost();
  assert.deepEqual(await new Taps({ owner, networks, run }).up(vmId, nets), [tap, null, 'vipabcdef01n2']);
  assert.ok(commands.includes(`ip link set dev ${tap} mtu 1450`));
  assert.ok(commands.includes('ip link set dev vipabcdef01n2 master br1'));
});

test('a VM with user networks only needs no command at all', async () => {
  const run: Run = () => assert.fail('nothing is to be run');
  const taps = new Taps({ owner, networks, run });
  assert.deepEqual(await taps.up(vmId, [{ network: 'user', mac }]), [null]);
});

test('a failure at any command takes away the taps made so far', async () => {
  const { run, commands } = fakeHost();
  await new Taps({ owner, networks, run }).up(vmId, nets);
  for (const failed of commands) {
    const host = fakeHost(new RegExp(`^${failed}$`));
    await assert.rejects(new Taps({ owner, networks, run: host.run }).up(vmId, nets), {
      code: 'unsupported',
    });
    const count = (verb: string, name: string) =>
      host.commands.filter((command) => command.startsWith(`ip tuntap ${verb} dev ${name} `)).length;
    for (const name of [tap, 'vipabcdef01n2']) {
      const made = failed.startsWith(`ip tuntap add dev ${name} `) ? 0 : count('add', name);
      assert.equal(count('del', name), made, `${name} after ${failed}`);
    }
  }
});

test('a tap left from before is replaced, and a missing bridge is named', async () => {
  const left = { ifname: tap, mtu: 1500, linkinfo: { info_kind: 'tun' } };
  const { run, commands } = fakeHost(undefined, [left]);
  await new Taps({ owner, networks, run }).up(vmId, nets);
  assert.match(commands[0] ?? '', /^ip tuntap del dev vipabcdef01n0/);
  const gone = new Taps({ owner, networks: [{ name: 'lan', kind: 'bridge', bridge: 'br7' }], run });
  await assert.rejects(gone.up(vmId, [{ network: 'lan', mac }]), {
    code: 'unsupported',
    message: /br7 is not there/,
  });
});

test('on a host without ip there is nothing to take away', async () => {
  const run: Run = async () => {
    throw new AppError('unsupported', 'ip is not installed');
  };
  const taps = new Taps({ owner, networks, run });
  await taps.down(vmId);
  assert.deepEqual(await taps.removeStrays([]), []);
});
