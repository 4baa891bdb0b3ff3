/**
 * VMs that QEMU has stopped because their disk took no write or gave no read: a full host, a storage that is away. No
 * guest sees an error for that, it stands still. The operator is told, and the VM goes on by itself when its disk can
 * take something again. What is known lives in memory: QEMU itself tells it again after a restart, and a full disk
 * takes no record.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import type { FastifyBaseLogger } from 'fastify';
import type { Machine } from '../../vm/machine.ts';
import type { EventLog } from '../events.ts';
import type { Managed } from './registry.ts';
import type { Runner } from './runner.ts';

/** Between the tries to let a VM run; doubled after each that came to nothing. */
const firstTryMs = 1000;
const tryAtMostEveryMs = 30_000;
/** A write that finds no room again stops the VM about at once. */
const settleMs = 1000;

export interface StallsOptions {
  runner: Pick<Runner, 'hasRoomFor'>;
  events: EventLog;
  log: FastifyBaseLogger;
  closing: AbortSignal;
}

export class Stalls {
  readonly #options: StallsOptions;
  readonly #followed = new Map<Machine, { hasStopped: boolean }>();

  constructor(options: StallsOptions) {
    this.#options = options;
  }

  /** The VM has stopped, or was just found: stays with it while it is stalled. `onChange` when that begins and ends. */
  async follow(managed: Managed, machine: Machine, onChange: () => Promise<void>): Promise<void> {
    const known = this.#followed.get(machine);
    if (known) {
      known.hasStopped = true;
      return;
    }
    const seen = { hasStopped: true };
    this.#followed.set(machine, seen);
    try {
      while (seen.hasStopped) {
        seen.hasStopped = false;
        await this.#seeThrough(managed, machine, onChange);
      }
    } finally {
      this.#followed.delete(machine);
      if (managed.stalled) {
        delete managed.stalled;
        await onChange();
      }
    }
  }

  async #seeThrough(managed: Managed, machine: Machine, onChange: () => Promise<void>): Promise<void> {
    const { closing, runner } = this.#options;
    const wait = (ms: number) => sleep(ms, undefined, { signal: closing, ref: false });
    // A QEMU that does not answer now may be stalled; one that is let go of is not our care any more.
    const why = async () =>
      managed.machine === machine ? await machine.stall().catch(() => 'unknown') : undefined;
    let isTold = false;
    let waitMs = firstTryMs;
    for (let reason = await why(); reason !== undefined; reason = await why()) {
      if (reason !== 'unknown') {
        if (!managed.stalled) this.#note(managed, reason);
        // On a full disk there may be no room for the event either, so it is tried again.
        if (!isTold) isTold = this.#tell(managed, reason);
        await onChange().catch(() => {});
      }
      await wait(waitMs);
      // Whoever is at work on the VM decides when it runs: above all its migration, which may have given it away.
      if (reason === 'unknown' || isHeld(managed)) continue;
      if (!(await runner.hasRoomFor(managed.record).catch(() => false))) continue;
      if ((await why()) !== reason || isHeld(managed)) continue;
      await machine.resume().catch(() => {});
      waitMs = Math.min(2 * waitMs, tryAtMostEveryMs);
      await wait(settleMs);
    }
  }

  #note(managed: Managed, reason: string): void {
    const { id, name } = managed.record;
    managed.stalled = { at: new Date().toISOString(), reason };
    this.#options.log.error({ vmId: id, name, reason }, 'a VM stands still until its disk works again');
  }

  #tell({ record: { id, name } }: Managed, reason: string): boolean {
    try {
      this.#options.events.append({ kind: 'vm.stalled', vmId: id, data: { name, reason } });
      return true;
    } catch {
      return false;
    }
  }
}

/** What is to become of it is for others to say. */
const isHeld = ({ operationId, hasArrived }: Managed): boolean =>
  operationId !== undefined && hasArrived !== true;
