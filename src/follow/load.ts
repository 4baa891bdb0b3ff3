/**
 * Hotspots: when a cloudlet has been too busy for too long, one VM goes to a neighbour that has room. CPU and memory
 * have a high mark that starts it and a low mark that ends it, so that one move is enough and none is undone. Pure.
 */
import type { Candidate, Decision, HandoffForecast, Trigger } from '../model/follow.ts';
import type { Uuid } from '../model/ids.ts';
import type { Standing } from './neighbours.ts';

export interface LoadPolicy {
  /** Shares of all CPUs and of all memory, 0 to 1. */
  cpuHigh: number;
  cpuLow: number;
  memoryHigh: number;
  memoryLow: number;
  /** The high mark has to be passed for so long. */
  sustainMs: number;
  /** Between two moves for the sake of load. */
  cooldownMs: number;
}

export const defaultLoadPolicy: LoadPolicy = {
  cpuHigh: 0.9,
  cpuLow: 0.7,
  memoryHigh: 0.92,
  memoryLow: 0.8,
  sustainMs: 60_000,
  cooldownMs: 300_000,
};

export interface Load {
  /** 0 to 1. */
  cpu: number;
  memory: number;
}

export interface LoadState {
  hotSinceMs: { cpu?: number; memory?: number };
  movedAtMs?: number;
}

export const newLoadState: LoadState = Object.freeze({ hotSinceMs: Object.freeze({}) });

/** Memory goes first: a host that runs out of it loses VMs, a busy one only slows them down. */
export function observeLoad(
  state: LoadState,
  load: Load,
  nowMs: number,
  policy: LoadPolicy,
): { state: LoadState; fired?: Trigger & { kind: 'cpu' | 'memory' } } {
  const hotSinceMs: LoadState['hotSinceMs'] = {};
  for (const kind of ['memory', 'cpu'] as const) {
    const since = state.hotSinceMs[kind];
    const [high, low] = marks(kind, policy);
    if (load[kind] >= high || (since !== undefined && load[kind] > low)) hotSinceMs[kind] = since ?? nowMs;
  }
  const next = { ...state, hotSinceMs };
  if (state.movedAtMs !== undefined && nowMs - state.movedAtMs < policy.cooldownMs) return { state: next };
  for (const kind of ['memory', 'cpu'] as const) {
    const since = hotSinceMs[kind];
    const [high] = marks(kind, policy);
    if (since === undefined || nowMs - since < policy.sustainMs || load[kind] < high) continue;
    const message = `${percent(load[kind])} of the ${kind} are in use, over ${percent(high)} for ${nowMs - since} ms`;
    return { state: next, fired: { kind, message } };
  }
  return { state: next };
}

export const loadMoved = (state: LoadState, nowMs: number): LoadState => ({ ...state, movedAtMs: nowMs });

export interface VmLoad {
  vmId: Uuid;
  memoryBytes: number;
  /** Share of all CPUs that it uses, 0 to 1. */
  cpu: number;
}

/**
 * Which VM to move: the one that moves fastest (by memory) among those whose leaving brings the load below the low
 * mark; if no single one does, the one that helps most.
 */
export function chooseVm(
  kind: 'cpu' | 'memory',
  load: Load,
  totalMemoryBytes: number,
  vms: readonly VmLoad[],
  policy: LoadPolicy,
): VmLoad | undefined {
  const helps = (vm: VmLoad): number => (kind === 'cpu' ? vm.cpu : vm.memoryBytes / totalMemoryBytes);
  const [, low] = marks(kind, policy);
  const enough = vms.filter((vm) => load[kind] - helps(vm) <= low);
  if (enough.length > 0) return enough.toSorted((a, b) => a.memoryBytes - b.memoryBytes)[0];
  return vms.toSorted((a, b) => helps(b) - helps(a))[0];
}

/** A peer that was asked for its load. */
export interface LoadCandidate {
  cloudletId: Uuid;
  name: string;
  standing: Standing;
  neighbourRttMs?: number | undefined;
  /** Missing if it did not answer. */
  load?: Load | undefined;
  problems: readonly string[];
  forecast?: HandoffForecast | undefined;
}

/** To the neighbour with the lowest load among those that are below both low marks and can take the VM. */
export function decideByLoad(
  trigger: Trigger,
  candidates: readonly LoadCandidate[],
  policy: LoadPolicy,
): Pick<Decision, 'candidates' | 'outcome' | 'target' | 'reasons'> {
  const judged = candidates.map((input) => ({ input, candidate: judgeLoad(input, policy) }));
  const [best] = judged
    .filter(({ candidate }) => candidate.verdict === 'possible')
    .toSorted((a, b) => fullness(a.input.load!) - fullness(b.input.load!));
  const all = judged.map(({ candidate }) => candidate);
  if (!best) return { candidates: all, outcome: 'stay', reasons: [trigger.message, 'No neighbour has room'] };
  const { cloudletId: id, name } = best.candidate;
  best.candidate.verdict = 'chosen';
  const reasons = [trigger.message, `${name} has the most room: ${describeLoad(best.input.load!)}`];
  return { candidates: all, outcome: 'migrate', target: { id, name }, reasons };
}

export function judgeLoad(input: LoadCandidate, policy: LoadPolicy): Candidate {
  const { cloudletId, name, standing, neighbourRttMs, load, problems, forecast } = input;
  const why = (): string | undefined => {
    if (standing !== 'neighbour') return `no neighbour: ${standing}`;
    if (!load) return 'it did not answer in time';
    if (load.cpu >= policy.cpuLow || load.memory >= policy.memoryLow)
      return `busy itself: ${describeLoad(load)}`;
    return problems.length > 0 ? `it cannot take the VM: ${problems.join('; ')}` : undefined;
  };
  const objection = why();
  return {
    cloudletId,
    name,
    ...(neighbourRttMs === undefined ? {} : { neighbourRttMs }),
    seesDevice: false,
    problems: [...problems],
    ...(forecast ? { forecast } : {}),
    verdict: objection === undefined ? 'possible' : 'excluded',
    why: objection ?? describeLoad(load!),
  };
}

const fullness = ({ cpu, memory }: Load): number => Math.max(cpu, memory);
const describeLoad = ({ cpu, memory }: Load): string =>
  `${percent(cpu)} CPU, ${percent(memory)} memory in use`;

const marks = (kind: 'cpu' | 'memory', policy: LoadPolicy): [high: number, low: number] =>
  kind === 'cpu' ? [policy.cpuHigh, policy.cpuLow] : [policy.memoryHigh, policy.memoryLow];

const percent = (share: number): string => `${Math.round(share * 100)} %`;
