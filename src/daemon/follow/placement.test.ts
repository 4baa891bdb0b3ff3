/** Decisions about neighbours that do not do what they should: nobody waits for them, and they draw no VM. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { AppError } from '../../model/errors.ts';
import type { DeviceRecord } from '../../model/follow.ts';
import type { Managed } from '../vms/registry.ts';
import { followConfig } from './config.ts';
import { Placement, type PlacementOptions } from './placement.ts';

/** `null`: it takes the question and says nothing. */
interface Answers {
  nearness: object | null;
  fits: boolean | null;
}
const honest: Answers = { nearness: { rttMs: 4, seesDevice: false }, fits: true };
const near = { rttMs: 0.1, seesDevice: true };
const askDeadlineMs = 200;

const forecast = {
  totalMs: 8000,
  downtimeMs: 100,
  bytes: 2e8,
  deltaRttMs: 20,
  serviceInitiationMs: 30_000,
  learnedFrom: 0,
};

/** A cloudlet 30 ms from the device; all others are 20 ms from it. */
function decideAmong(others: Record<string, Answers>) {
  const never = async (timeoutMs: number): Promise<never> => {
    await sleep(timeoutMs, undefined, { ref: true });
    throw new AppError('peer_unreachable', 'It did not answer', { url: '' });
  };
  const options = {
    identity: () => ({ id: 'c1', name: 'c1' }),
    config: { ...followConfig(), askDeadlineMs, deviceRtt: 'reports' },
    fleet: {
      client: {
        fetch: async ({ id }: { id: string }, _path: string, { timeoutMs }: { timeoutMs: number }) =>
          others[id]!.nearness ?? never(timeoutMs),
      },
    },
    neighbours: {
      all: () =>
        Object.keys(others).map((id) => ({
          peer: { id, name: id, url: '' },
          neighbour: { rtt: { samples: 9, smoothedMs: 20 } },
          standing: 'neighbour',
        })),
      get: () => undefined,
    },
    profiles: { handoff: () => forecast },
    migrations: {
      check: async (_vm: string, { to }: { to: string }) => {
        if (others[to]!.fits === null) await sleep(60_000, undefined, { ref: false });
        const vm = { id: 'v', spec: { memoryBytes: 1e8 }, diskBytes: 0, image: { fileBytes: 1 } };
        const limits = { downtimeMs: 300, autoConverge: false };
        const moving = { vm, options: { mode: 'auto', storage: 'copied', limits }, peer: { id: to } };
        return { ...moving, problems: [], hasImage: true, rttMs: 20, linkBps: 1e8 };
      },
    },
    dirtyBpsOf: () => 0,
  } as unknown as PlacementOptions;
  const managed = { record: { id: 'v', name: 'web', spec: { disk: { image: 'i' } } } } as unknown as Managed;
  const device = { id: 'd', name: 'phone', addresses: [], macs: [] } as unknown as DeviceRecord;
  const observed = {
    rtt: { samples: 9, smoothedMs: 30, answeredAtMs: Date.now() },
    reported: new Map(),
  } as never;
  return new Placement(options).decide(managed, device, { kind: 'rtt', message: 'It is far' }, observed);
}

test('a neighbour that never answers is left out, and the VM goes to one that does', async () => {
  const { decision } = await decideAmong({ c2: { nearness: null, fits: true }, c3: honest });
  assert.deepEqual([decision.outcome, decision.target?.name], ['migrate', 'c3']);
  assert.match(decision.candidates[0]!.why, /did not answer in time/);
});

test('one that calls itself near and never says if it has room is left out, too', async () => {
  const { decision } = await decideAmong({ c2: { nearness: near, fits: null }, c3: honest });
  assert.deepEqual([decision.outcome, decision.target?.name], ['migrate', 'c3']);
  assert.match(decision.candidates[0]!.why, /c2 did not say in time/);
});

test('one that answers nonsense is left out, and alone draws no VM', async () => {
  for (const nearness of [
    { rttMs: -5 },
    { rttMs: 'near', seesDevice: true },
    { seesDevice: 'yes' },
    [],
    { rttMs: 1e9 },
  ]) {
    const { decision } = await decideAmong({ c2: { nearness, fits: true } });
    assert.equal(decision.outcome, 'stay', JSON.stringify(nearness));
  }
});
