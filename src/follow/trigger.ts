/**
 * When to think about moving the VM of a device: its RTT stays over a threshold, it is seen from the LAN of another
 * cloudlet, or nothing is heard of it any more. Says only *that* something has happened; `decide.ts` says what to do.
 *
 * Three things keep a restless device from making its VM bounce:
 * - hysteresis: an RTT trigger is armed again only below a lower mark, or after a while;
 * - cool-down: between the starts of two migrations there are at least `cooldownMs`, whichever cloudlets they join;
 * - damping: each further change of LAN within a window makes it wait longer until the device has settled.
 * What is held back is not lost: the next observation or tick after it finds it again. Pure.
 */
import type { Trigger } from '../model/follow.ts';
import type { Uuid } from '../model/ids.ts';

export interface TriggerPolicy {
  rttThresholdMs: number;
  /** Below it, the RTT trigger is armed again. */
  rttReleaseMs: number;
  /** The smoothed RTT has to stay over the threshold for so long. */
  sustainMs: number;
  /** Without any sign of the device for so long, it is lost. */
  lostAfterMs: number;
  /** Between the starts of two migrations of one VM. */
  cooldownMs: number;
  /** After a decision that moved nothing, the same trigger comes again only then. */
  reconsiderMs: number;
  /** Changes of LAN are counted within it. */
  flapWindowMs: number;
  /** How long the device has to have settled after the second change in the window; doubles with each further one. */
  flapDwellMs: number;
  flapDwellMaxMs: number;
}

export const defaultTriggerPolicy: TriggerPolicy = {
  rttThresholdMs: 40,
  rttReleaseMs: 30,
  sustainMs: 1000,
  lostAfterMs: 2000,
  cooldownMs: 60_000,
  reconsiderMs: 30_000,
  flapWindowMs: 60_000,
  flapDwellMs: 1000,
  flapDwellMaxMs: 30_000,
};

export interface TriggerState {
  /** The cloudlet in whose LAN the device is; missing while nobody can say (a cellular network, say). */
  lan?: Uuid;
  /** The last LAN that was known. */
  lastLan?: Uuid;
  /** Times of its changes within the window, oldest first. */
  lanChangesAtMs: readonly number[];
  /** Since when the RTT is over the threshold. */
  aboveSinceMs?: number;
  heardAtMs: number;
  /** Start of the last migration. */
  movedAtMs?: number;
  /** The last decisions that moved nothing, as long as they were about the same. */
  handled?: { key: string; atMs: number; times: number };
}

export type Observation =
  | { kind: 'rtt'; smoothedMs: number; atMs: number }
  | { kind: 'lan'; cloudletId: Uuid | undefined; atMs: number }
  | { kind: 'tick'; atMs: number }
  | { kind: 'stayed'; key: string; atMs: number }
  | { kind: 'moved'; atMs: number };

export interface Fired extends Trigger {
  /** Names the condition, for the observation `stayed`. */
  key: string;
}

/** `movedAtMs`: start of the migration that brought the VM here, if one did. */
export const newTriggerState = (nowMs: number, movedAtMs?: number): TriggerState => ({
  lanChangesAtMs: [],
  heardAtMs: nowMs,
  ...(movedAtMs === undefined ? {} : { movedAtMs }),
});

const changesKept = 32;

/** The state after an observation, and the trigger if one fires; `ownId` is the cloudlet that has the VM. */
export function observe(
  state: TriggerState,
  observation: Observation,
  policy: TriggerPolicy,
  ownId: Uuid,
): { state: TriggerState; fired?: Fired } {
  const next = note(state, observation, policy);
  const fired = conditionOf(next, observation.atMs, policy, ownId);
  if (!fired || isHeldBack(next, fired, observation.atMs, policy)) return { state: next };
  return { state: next, fired };
}

function note(state: TriggerState, observation: Observation, policy: TriggerPolicy): TriggerState {
  const { atMs } = observation;
  switch (observation.kind) {
    case 'rtt': {
      const heard = forget({ ...state, heardAtMs: atMs }, 'lost');
      if (observation.smoothedMs > policy.rttThresholdMs)
        return { ...heard, aboveSinceMs: state.aboveSinceMs ?? atMs };
      const { aboveSinceMs: _, ...below } = heard;
      return observation.smoothedMs < policy.rttReleaseMs ? forget(below, 'rtt') : below;
    }
    case 'lan': {
      const { cloudletId } = observation;
      const { lan: _, ...rest } = { ...state, heardAtMs: atMs };
      if (cloudletId === undefined) return rest;
      const isChange = state.lastLan !== undefined && state.lastLan !== cloudletId;
      const lanChangesAtMs = isChange
        ? [...recent(state, atMs, policy), atMs].slice(-changesKept)
        : state.lanChangesAtMs;
      return { ...rest, lan: cloudletId, lastLan: cloudletId, lanChangesAtMs };
    }
    case 'stayed':
      return {
        ...state,
        handled: { key: observation.key, atMs, times: timesHandled(state, observation.key) },
      };
    case 'moved': {
      const { handled: _, ...rest } = state;
      return { ...rest, movedAtMs: atMs };
    }
    case 'tick':
      return state;
  }
}

function conditionOf(
  state: TriggerState,
  nowMs: number,
  policy: TriggerPolicy,
  ownId: Uuid,
): Fired | undefined {
  if (state.lan !== undefined && state.lan !== ownId) {
    return {
      kind: 'lan',
      key: `lan:${state.lan}`,
      message: `The device is seen from the LAN of ${state.lan}`,
    };
  }
  if (state.aboveSinceMs !== undefined && nowMs - state.aboveSinceMs >= policy.sustainMs) {
    const message = `The RTT to the device is over ${policy.rttThresholdMs} ms for ${nowMs - state.aboveSinceMs} ms`;
    return { kind: 'rtt', key: 'rtt', message };
  }
  const silentMs = nowMs - state.heardAtMs;
  if (silentMs >= policy.lostAfterMs) {
    return { kind: 'lost', key: 'lost', message: `Nothing is heard of the device for ${silentMs} ms` };
  }
  return undefined;
}

function isHeldBack(
  state: TriggerState,
  { kind, key }: Fired,
  nowMs: number,
  policy: TriggerPolicy,
): boolean {
  const { movedAtMs, handled } = state;
  if (movedAtMs !== undefined && nowMs - movedAtMs < policy.cooldownMs) return true;
  if (handled?.key === key && nowMs - handled.atMs < waitMs(handled.times, kind, policy)) return true;
  if (kind !== 'lan') return false;
  const changes = recent(state, nowMs, policy);
  if (changes.length < 2) return false;
  const dwellMs = Math.min(policy.flapDwellMaxMs, policy.flapDwellMs * 2 ** (changes.length - 2));
  return nowMs - changes.at(-1)! < dwellMs;
}

/** A lost device turns up, and one that has just arrived is answered by all, soon or never: longer and longer waits. */
const waitMs = (times: number, kind: Trigger['kind'], { reconsiderMs }: TriggerPolicy): number =>
  kind !== 'rtt' ? Math.min(reconsiderMs, 500 * 2 ** times) : reconsiderMs;

const timesHandled = ({ handled }: TriggerState, key: string): number =>
  handled?.key === key ? Math.min(handled.times + 1, 20) : 1;

const recent = ({ lanChangesAtMs }: TriggerState, nowMs: number, { flapWindowMs }: TriggerPolicy) =>
  lanChangesAtMs.filter((atMs) => nowMs - atMs < flapWindowMs);

function forget(state: TriggerState, key: string): TriggerState {
  if (state.handled?.key !== key) return state;
  const { handled: _, ...rest } = state;
  return rest;
}
