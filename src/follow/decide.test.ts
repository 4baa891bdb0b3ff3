import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import type { HandoffForecast } from '../model/follow.ts';
import {
  algorithm47,
  type CandidateInput,
  decide,
  effectiveRttMs,
  defaultDecisionPolicy as policy,
} from './decide.ts';

const forecast: HandoffForecast = {
  totalMs: 8000,
  downtimeMs: 100,
  bytes: 2e8,
  deltaRttMs: 20,
  serviceInitiationMs: 30_000,
  learnedFrom: 0,
};
const peer = (name: string, changes: Partial<CandidateInput> = {}): CandidateInput => ({
  cloudletId: name,
  name,
  standing: 'neighbour',
  neighbourRttMs: 20,
  claimedRttMs: 2,
  seesDevice: true,
  problems: [],
  forecast,
  ...changes,
});
const trigger = { kind: 'lan', message: 'The device is seen from the LAN of c2' } as const;
const about = (candidates: CandidateInput[], hereRttMs: number | undefined = 22) =>
  decide({ trigger, hereRttMs, candidates }, policy);

test('the nearest neighbour with room is the target', () => {
  const { outcome, target, candidates } = about([
    peer('c2', { claimedRttMs: 9 }),
    peer('c3', { claimedRttMs: 4 }),
    peer('full', { claimedRttMs: 3, problems: ['12 MiB of memory are free, wanted 256 MiB'] }),
  ]);
  assert.deepEqual([outcome, target?.name], ['migrate', 'c3']);
  assert.match(candidates[2]!.why, /cannot take the VM: 12 MiB/);
});

test('a far, silent or unmeasured peer is no candidate', () => {
  for (const [standing, why] of [
    ['far', /200 ms away, wanted under 150 ms/],
    ['silent', /has not answered/],
    ['unknown', /not measured/],
  ] as const) {
    const { outcome, candidates } = about([peer('c2', { standing, neighbourRttMs: 200 })]);
    assert.equal(outcome, 'stay');
    assert.match(candidates[0]!.why, why);
  }
});

test('who did not answer in time is left out, and the others are not kept waiting by it', () => {
  const { target, candidates } = about([peer('c2', { claimedRttMs: undefined }), peer('c3')]);
  assert.equal(target?.name, 'c3');
  assert.match(candidates[0]!.why, /did not answer in time/);
});

test('a gain that nobody would notice moves nothing', () => {
  assert.equal(about([peer('c2', { claimedRttMs: 3, neighbourRttMs: 1 })], 4).outcome, 'stay');
  assert.equal(about([], 4).outcome, 'stay');
});

test('a device that answers only there is followed', () => {
  const verdict = decide({ trigger, hereRttMs: undefined, candidates: [peer('c2')] }, policy);
  assert.equal(verdict.outcome, 'migrate');
  assert.match(verdict.reasons.join('\n'), /does not answer here/);
});

test('a peer that lies about its RTT gains nothing beyond what the triangle inequality allows', () => {
  // It is 100 ms from here, the device 10 ms: it cannot be 1 ms from the device.
  const { outcome, candidates } = about([peer('liar', { claimedRttMs: 1, neighbourRttMs: 100 })], 10);
  assert.equal(outcome, 'stay');
  assert.ok(candidates[0]!.deviceRttMs! > 50, JSON.stringify(candidates[0]));
  assert.equal(candidates[0]!.claimedRttMs, 1);
});

test('what the device itself measured goes before what a peer claims', () => {
  const { target } = about([
    peer('liar', { claimedRttMs: 0.1, reportedRttMs: 21 }),
    peer('honest', { claimedRttMs: 4, reportedRttMs: 4 }),
  ]);
  assert.equal(target?.name, 'honest');
});

test('on a straight path an honest claim is never raised', () => {
  fc.assert(
    fc.property(
      fc.double({ min: 0.1, max: 100, noNaN: true }),
      fc.double({ min: 0.1, max: 100, noNaN: true }),
      (a, b) => {
        // The device lies behind the peer: here = neighbour + claim.
        const counted = effectiveRttMs(peer('c2', { claimedRttMs: a, neighbourRttMs: b }), a + b);
        assert.equal(counted, a);
      },
    ),
  );
});

test('algorithm 4.7: below 150 ms it migrates however long it takes', () => {
  const slow = { ...forecast, totalMs: 1e6, serviceInitiationMs: 1 };
  assert.equal(algorithm47(130, { ...slow, deltaRttMs: 20 }, policy).outcome, 'migrate');
});

test('algorithm 4.7: up to 1 s it migrates only when that is faster than a fresh service', () => {
  const at = (totalMs: number) =>
    algorithm47(200, { ...forecast, totalMs, serviceInitiationMs: 30_000 }, policy).outcome;
  assert.deepEqual([at(29_999), at(30_000), at(1e6)], ['migrate', 'fresh', 'fresh']);
});

test('algorithm 4.7: over 1 s a fresh service serves better', () => {
  assert.equal(algorithm47(900, { ...forecast, deltaRttMs: 101, totalMs: 1 }, policy).outcome, 'fresh');
  assert.equal(algorithm47(900, { ...forecast, deltaRttMs: 100, totalMs: 1 }, policy).outcome, 'migrate');
});

test('whatever comes in: a target is a neighbour with room, nearer than here, and every other has a reason', () => {
  const candidate = fc.record({
    name: fc.constantFrom('a', 'b', 'c', 'd'),
    standing: fc.constantFrom('neighbour', 'far', 'silent', 'unknown'),
    neighbourRttMs: fc.option(fc.double({ min: 0, max: 400, noNaN: true }), { nil: undefined }),
    claimedRttMs: fc.option(fc.double({ min: 0, max: 400, noNaN: true }), { nil: undefined }),
    problems: fc.array(fc.constantFrom('memory', 'disk'), { maxLength: 2 }),
  });
  const here = fc.option(fc.double({ min: 0, max: 2000, noNaN: true }), { nil: undefined });
  fc.assert(
    fc.property(fc.array(candidate, { maxLength: 6 }), here, (list, hereRttMs) => {
      const inputs = list.map((each, i) =>
        peer(`${each.name}${i}`, { ...each, name: `${each.name}${i}` } as never),
      );
      const { outcome, target, candidates, reasons } = decide(
        { trigger, hereRttMs, candidates: inputs },
        policy,
      );
      assert.ok(reasons.length > 1);
      assert.equal(candidates.length, inputs.length);
      for (const { why } of candidates) assert.ok(why.length > 0);
      const chosen = candidates.filter(({ verdict }) => verdict === 'chosen');
      assert.equal(chosen.length, target ? 1 : 0);
      if (!target) return assert.equal(outcome, 'stay');
      const input = inputs.find(({ cloudletId }) => cloudletId === target.id)!;
      assert.equal(input.standing, 'neighbour');
      assert.deepEqual(input.problems, []);
      if (hereRttMs !== undefined) assert.ok(chosen[0]!.deviceRttMs! < hereRttMs);
      for (const other of candidates)
        if (other.verdict === 'possible')
          assert.ok(Math.round(other.deviceRttMs!) >= Math.round(chosen[0]!.deviceRttMs!));
    }),
  );
});
