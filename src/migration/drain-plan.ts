/**
 * In which order and how VMs leave a host that is to be empty by a deadline, and whether it can be. Pure. All rates are
 * what earlier migrations have shown, so this is a forecast: it counts VMs one after the other, since they share what
 * leaves the host, and takes all memory of a VM that its host has in use for content that must travel.
 */
import { MiB } from '../model/units.ts';

export interface LeavingVm {
  name: string;
  /** In use. */
  memoryBytes: number;
  /** Must be at the destination before the memory leaves; 0 on shared storage. */
  diskBytes: number;
  /** What its destination takes. */
  toBps: number;
}

export interface DrainFacts {
  deadlineMs: number;
  vms: readonly LeavingVm[];
  /** All that can leave the host. */
  uplinkBps: number;
  /** Other cloudlets that lend memory now, their free bytes together. */
  relays: { count: number; freeBytes: number };
  replicas: number;
}

export interface DrainMove {
  name: string;
  engine: 'condensed' | 'relayed';
  /** Until nothing of it is here any more. */
  exitMs: number;
}

export interface DrainPlan {
  /** In order. */
  moves: DrainMove[];
  totalMs: number;
  fits: boolean;
}

/** To prepare a destination, to switch over, to end. */
const overheadMs = 2000;
/**
 * Relays are worth their trouble when they save this share. They make the replicas among themselves, so the memory leaves
 * once.
 */
const worthwhile = 0.8;

export function planDrain({ deadlineMs, vms, uplinkBps, relays, replicas }: DrainFacts): DrainPlan {
  let freeBytes = relays.count >= replicas ? relays.freeBytes : 0;
  const moves = vms
    .map((vm) => ({ vm, directMs: msOf(vm.memoryBytes + vm.diskBytes, Math.min(vm.toBps, uplinkBps)) }))
    // Those that the relays save most, in case there is not room for all.
    .toSorted((a, b) => b.directMs - a.directMs)
    .map(({ vm, directMs }): DrainMove => {
      const relayedMs = msOf(vm.diskBytes, Math.min(vm.toBps, uplinkBps)) + msOf(vm.memoryBytes, uplinkBps);
      const wantedBytes = vm.memoryBytes * replicas + MiB;
      const isRelayed = relayedMs < directMs * worthwhile && wantedBytes <= freeBytes;
      if (isRelayed) freeBytes -= wantedBytes;
      return {
        name: vm.name,
        engine: isRelayed ? 'relayed' : 'condensed',
        exitMs: Math.round((isRelayed ? relayedMs : directMs) + overheadMs),
      };
    })
    // If it takes longer than it should, as many as can be are away by then.
    .toSorted((a, b) => a.exitMs - b.exitMs);
  const totalMs = moves.reduce((sum, { exitMs }) => sum + exitMs, 0);
  return { moves, totalMs, fits: totalMs <= deadlineMs };
}

const msOf = (bytes: number, bps: number): number => (bytes * 8000) / Math.max(1, bps);
