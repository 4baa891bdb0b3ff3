/**
 * What a migration would cost, before it is begun: the analytic model of pre-copy (Clark et al., NSDI 2005; Akoush
 * et al., MASCOTS 2010). Round 1 sends all memory; each next round sends what the guest dirtied during the one
 * before, which under a steady dirty rate is a geometric series with the ratio dirty rate / bandwidth.
 *
 * A guest cannot dirty more than its working set, which bounds every later round. Pure.
 */
import type { MigrationMode } from '../model/migration.ts';

export interface EstimateInput {
  mode: MigrationMode;
  memoryBytes: number;
  /** Of the memory, what is zero and costs next to nothing. */
  zeroBytes: number;
  /** What the disk's mirror will send; 0 for a shared disk. */
  diskBytes: number;
  dirtyBps: number;
  /** The most that is dirty at one time; by default all memory. */
  workingSetBytes?: number;
  bandwidthBps: number;
  rttMs: number;
  downtimeLimitMs: number;
}

export interface Estimate {
  totalMs: number;
  downtimeMs: number;
  /** On the link: disk and memory, all rounds. */
  bytes: number;
  rounds: number;
  /** Pre-copy alone gets below the downtime limit. */
  converges: boolean;
  finishesAs: 'precopy' | 'postcopy';
  /** What it was computed from, for whoever wants to check it. */
  input: EstimateInput;
}

/** Stop, load and start a VM's devices, whatever its size; measured with tiny guests under TCG. */
const deviceStateMs = 60;
/** Sets up sessions and asks both sides: some exchanges of messages. */
const setUpRoundTrips = 4;
/** QEMU gives up no round by itself; beyond this nobody would wait. */
const mostRounds = 50;
/** Of memory that is sent while the VM stands still, in a mode that can leave the rest for later. */
const shortPauseMs = 40;
/** Rounds that a hybrid sends before it goes over to post-copy. */
const hybridRounds = 2;

export function estimate(input: EstimateInput): Estimate {
  requireSensible(input);
  const { mode, memoryBytes, zeroBytes, diskBytes, dirtyBps, bandwidthBps, rttMs, downtimeLimitMs } = input;
  const bytesPerMs = bandwidthBps / 8000;
  const dirtyPerMs = dirtyBps / 8000;
  const workingSet = Math.min(input.workingSetBytes ?? memoryBytes, memoryBytes);
  const limitBytes = bytesPerMs * downtimeLimitMs;

  let left = Math.max(0, memoryBytes - zeroBytes);
  let memorySent = 0;
  let rounds = 0;
  let converges = left <= limitBytes;
  const roundsAllowed = mode === 'postcopy' ? 0 : mode === 'hybrid' ? hybridRounds : mostRounds;
  while (!converges && rounds < roundsAllowed) {
    memorySent += left;
    rounds += 1;
    const dirtied = Math.min(workingSet, (left / bytesPerMs) * dirtyPerMs);
    // A series that no longer shrinks never will: the rate is steady.
    const stalls = rounds > 1 && dirtied >= left * 0.99;
    left = dirtied;
    converges = left <= limitBytes;
    if (stalls) break;
  }
  const finishesAs = converges || mode === 'precopy' ? 'precopy' : 'postcopy';
  memorySent += left;
  // In post-copy only the devices travel while the VM stands still; a release behind them saves the round trip.
  const restMs = finishesAs === 'precopy' ? left / bytesPerMs : 0;
  const lastBytesMs = mode === 'precopy' ? restMs : Math.min(restMs, shortPauseMs);
  const downtimeMs = lastBytesMs + deviceStateMs + rttMs;
  const bytes = diskBytes + memorySent;
  return {
    totalMs: Math.round(bytes / bytesPerMs + deviceStateMs + setUpRoundTrips * rttMs),
    downtimeMs: Math.round(downtimeMs),
    bytes: Math.round(bytes),
    rounds: rounds + 1,
    converges,
    finishesAs,
    input,
  };
}

function requireSensible(input: EstimateInput): void {
  for (const [name, value] of Object.entries(input)) {
    if (typeof value !== 'number') continue;
    const isGood = Number.isFinite(value) && (name === 'bandwidthBps' ? value > 0 : value >= 0);
    if (!isGood) throw new RangeError(`Estimate: ${name} is ${value}, wanted a number of at least 0`);
  }
}
