import assert from 'node:assert/strict';
import { test } from 'node:test';
import {
  chooseVm,
  decideByLoad,
  type Load,
  type LoadCandidate,
  loadMoved,
  newLoadState,
  observeLoad,
  defaultLoadPolicy as policy,
} from './load.ts';

/** One reading every 10 s; gives the times in seconds at which something fired, and what. */
function feed(loads: Load[]): [number, string][] {
  let state = newLoadState;
  const fired: [number, string][] = [];
  for (const [i, load] of loads.entries()) {
    const step = observeLoad(state, load, i * 10_000, policy);
    state = step.state;
    if (!step.fired) continue;
    fired.push([i * 10, step.fired.kind]);
    state = loadMoved(state, i * 10_000);
  }
  return fired;
}
const cpu = (share: number): Load => ({ cpu: share, memory: 0.5 });

test('a peak is no hotspot, a minute over the high mark is', () => {
  assert.deepEqual(feed([cpu(1), cpu(1), cpu(0.5), cpu(1), cpu(1), cpu(1), cpu(1), cpu(1)]), []);
  assert.deepEqual(feed(Array(9).fill(cpu(0.95))), [[60, 'cpu']]);
});

test('between the marks the time goes on, but nothing fires', () => {
  const wandering = Array.from({ length: 20 }, (_, i) => cpu(i === 0 ? 0.95 : 0.8));
  assert.deepEqual(feed(wandering), []);
  assert.deepEqual(feed([...wandering, cpu(0.95)]), [[200, 'cpu']]);
});

test('memory goes before CPU', () => {
  assert.deepEqual(feed(Array(7).fill({ cpu: 1, memory: 1 })), [[60, 'memory']]);
});

test('after a move nothing fires for the cool-down', () => {
  const times = feed(Array(80).fill(cpu(1))).map(([at]) => at);
  assert.deepEqual(times, [60, 360, 660]);
});

test('the smallest VM that is enough is moved, else the one that helps most', () => {
  const vms = [
    { vmId: 'small', memoryBytes: 1, cpu: 0.05 },
    { vmId: 'right', memoryBytes: 2, cpu: 0.3 },
    { vmId: 'big', memoryBytes: 9, cpu: 0.5 },
  ];
  assert.equal(chooseVm('cpu', cpu(0.95), 100, vms, policy)?.vmId, 'right');
  assert.equal(chooseVm('cpu', cpu(5), 100, vms, policy)?.vmId, 'big');
  assert.equal(chooseVm('memory', { cpu: 0, memory: 0.95 }, 10, vms, policy)?.vmId, 'right');
  assert.equal(chooseVm('cpu', cpu(1), 100, [], policy), undefined);
});

test('the neighbour with the most room takes the VM, and each other says why not', () => {
  const peer = (name: string, changes: Partial<LoadCandidate>): LoadCandidate => ({
    cloudletId: name,
    name,
    standing: 'neighbour',
    load: { cpu: 0.2, memory: 0.2 },
    problems: [],
    ...changes,
  });
  const trigger = { kind: 'cpu', message: '95 % of the cpu are in use' } as const;
  const all = [
    peer('busy', { load: { cpu: 0.8, memory: 0.1 } }),
    peer('half', { load: { cpu: 0.5, memory: 0.1 } }),
    peer('free', { load: { cpu: 0.1, memory: 0.3 } }),
    peer('full', { problems: ['12 MiB of disk are free'] }),
    peer('far', { standing: 'far' }),
    peer('mute', { load: undefined }),
  ];
  const { outcome, target, candidates } = decideByLoad(trigger, all, policy);
  assert.deepEqual([outcome, target?.name], ['migrate', 'free']);
  assert.deepEqual(
    candidates.map(({ verdict }) => verdict),
    ['excluded', 'possible', 'chosen', 'excluded', 'excluded', 'excluded'],
  );
  for (const { why } of candidates) assert.ok(why.length > 0);
  assert.equal(decideByLoad(trigger, all.slice(3), policy).outcome, 'stay');
});
