import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { Command } from '../network/index.ts';
import type { Wire } from './layout.ts';
import { changeWire, planWire } from './wire.ts';

const wire: Wire = {
  name: 'c1-c2',
  places: ['c1', 'c2'],
  ends: [
    { namespace: 'viper-lab-c1', device: 'wan-c2' },
    { namespace: 'viper-lab-c2', device: 'wan-c1' },
  ],
  settings: { rttMs: 25, rateBps: 60e6, lossPercent: 1, isCut: false },
};
const place = { core: 'viper-lab-core', directory: '/labs/lab/wires' };
const words = (commands: readonly Command[]) => commands.map((command) => command.join(' '));

test('with netem a link is a pair of cables whose ends both delay by half, lose and limit', () => {
  const commands = words(planWire(wire, { ...place, emulator: 'netem' }));
  assert.equal(
    commands[0],
    'ip link add name wan-c2 netns viper-lab-c1 type veth peer name wan-c1 netns viper-lab-c2',
  );
  for (const [side, other] of [
    [1, 2],
    [2, 1],
  ])
    assert.ok(
      commands.includes(
        `tc -n viper-lab-c${side} qdisc replace dev wan-c${other} root netem limit 1563 delay 12.5ms loss 1% rate 60000000bit`,
      ),
      commands.join('\n'),
    );
});

test('without netem a wirefilter stands between two switches, and tbf limits at both ends', () => {
  const commands = words(planWire(wire, { ...place, emulator: 'vde' }));
  const [a, b] = ['/labs/lab/wires/c1-c2/0', '/labs/lab/wires/c1-c2/1'];
  assert.ok(
    commands.includes(`nsenter --net=/run/netns/viper-lab-c2 -- vde_switch -d -s ${b} -t wan-c1`),
    commands.join('\n'),
  );
  assert.ok(
    commands.includes(
      `nsenter --net=/run/netns/viper-lab-core -- wirefilter --daemon -v ${a}:${b} -d 12.5 -l 1 -M /labs/lab/wires/c1-c2/filter`,
    ),
  );
  assert.ok(
    commands.includes(
      'tc -n viper-lab-c1 qdisc replace dev wan-c2 root tbf rate 60000000bit burst 45000b latency 100ms',
    ),
  );
});

test('a change reaches both ends where they are now; a cut loses everything and nothing else changes', () => {
  const ends = [wire.ends[0], { namespace: 'viper-lab-c3', device: 'wan-c1' }] as const;
  const cut = { ...wire.settings, isCut: true };
  const vde = changeWire(wire, ends, cut, { ...place, emulator: 'vde' });
  assert.deepEqual(vde.tell, { socket: '/labs/lab/wires/c1-c2/filter', lines: ['delay 12.5', 'loss 100'] });
  assert.match(
    words(vde.commands)[1]!,
    /^tc -n viper-lab-c3 qdisc replace dev wan-c1 root tbf rate 60000000bit/,
  );
  const netem = changeWire(wire, ends, cut, { ...place, emulator: 'netem' });
  assert.match(words(netem.commands)[1]!, /delay 12.5ms loss 100% rate 60000000bit$/);
  assert.equal(netem.tell, undefined);
});

test('a link without a limit has none', () => {
  const free = { ...wire.settings, rateBps: 0 };
  for (const emulator of ['netem', 'vde'] as const)
    for (const line of words(changeWire(wire, wire.ends, free, { ...place, emulator }).commands))
      assert.doesNotMatch(line, /rate|tbf/);
});
