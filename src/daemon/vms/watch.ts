/**
 * Keeps the record of each VM true to its QEMU: takes over those of an earlier daemon, follows what they do, and
 * notes their end. A QEMU that does not answer may still run its VM, so nothing is decided about it: it is asked
 * again until it answers or has ended.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import type { FastifyBaseLogger } from 'fastify';
import type { VmExit } from '../../model/vm.ts';
import { Machine } from '../../vm/machine.ts';
import type { Operations } from '../operations.ts';
import type { Paths } from '../paths.ts';
import type { Managed, VmRegistry } from './registry.ts';
import type { Runner } from './runner.ts';
import type { Stalls } from './stalls.ts';

const askAgainMs = 2_000;

export interface VmWatchOptions {
  registry: VmRegistry;
  runner: Runner;
  stalls: Stalls;
  operations: Operations;
  paths: Paths;
  log: FastifyBaseLogger;
  /** Ends the asking. */
  closing: AbortSignal;
}

export class VmWatch {
  readonly #options: VmWatchOptions;

  constructor(options: VmWatchOptions) {
    this.#options = options;
  }

  /** From now on the VM's state follows what its QEMU does. */
  attach(managed: Managed, machine: Machine): void {
    const { operations, stalls } = this.#options;
    managed.machine = machine;
    const observe = async () => {
      if (!managed.operationId) await this.observe(managed);
    };
    const lookForStall = () => this.#inBackground(managed, stalls.follow(managed, machine, observe));
    machine.onStatus(({ running }) => {
      this.#inBackground(managed, observe());
      if (!running) lookForStall();
    });
    // An earlier daemon may have left it so.
    lookForStall();
    const end = async (): Promise<void> => {
      const exit = await machine.exited;
      // An operation at work on the VM may expect the end and deal with it; if not, it is dealt with afterwards.
      if (managed.operationId) {
        // A VM that is arriving is settled by its migration.
        if (!operations.get(managed.operationId)) return;
        await operations.wait(managed.operationId);
      }
      if (managed.machine === machine) await this.ended(managed, exit);
    };
    this.#inBackground(managed, end());
  }

  /** Takes the state from QEMU: a guest can be stopped by its disk, too. One that is ending is noted at its end. */
  async observe(managed: Managed): Promise<void> {
    const { machine } = managed;
    const status = await machine?.status().catch(() => undefined);
    if (!status || status.state === 'shutdown' || managed.machine !== machine) return;
    this.#options.registry.update(managed, { state: status.running ? 'running' : 'paused' });
  }

  /** Takes the state from QEMU after others had the say; one that has ended meanwhile is noted. */
  async settle(managed: Managed): Promise<void> {
    const { machine } = managed;
    if (!machine) return this.takeOver(managed);
    await this.observe(managed);
    const exit = await Promise.race([machine.exited, sleep(0)]);
    if (!exit || managed.machine !== machine) return;
    // Nobody could ask for its end meanwhile: one that had to be ended has crashed.
    await this.ended(managed, exit.reason === 'forced' ? { ...exit, reason: 'crashed' } : exit);
  }

  /** QEMU is gone: what it used is given back, and why is kept. */
  async ended(managed: Managed, exit: VmExit): Promise<void> {
    const { runner, registry } = this.#options;
    delete managed.machine;
    await runner.cleanUp(managed.record.id);
    registry.update(managed, {
      state: exit.reason === 'crashed' ? 'crashed' : 'stopped',
      lastExit: exit,
      process: undefined,
      runningWith: undefined,
    });
  }

  /** Finds the QEMU of an earlier daemon again, or notes that it has ended. */
  async takeOver(managed: Managed): Promise<void> {
    const { state } = managed.record;
    await this.#nowOrLater(managed, () => this.#adopt(managed));
    // As far as anybody knows, it runs.
    if (managed.silent && state === 'stopping') this.#options.registry.update(managed, { state: 'running' });
  }

  /** The same for a VM in a migration, which alone knows what is to become of it. */
  async takeHold(managed: Managed): Promise<void> {
    await this.#nowOrLater(managed, async () => {
      await this.#find(managed);
    });
  }

  async #find(managed: Managed): Promise<Machine | null> {
    const { id, process } = managed.record;
    if (!process) return null;
    const machine = await Machine.adopt({ id, directory: this.#options.paths.vm(id), process });
    if (machine) this.attach(managed, machine);
    return machine;
  }

  async #adopt(managed: Managed): Promise<void> {
    const { log } = this.#options;
    const { id, name, state } = managed.record;
    const machine = await this.#find(managed);
    if (machine) {
      await this.observe(managed);
      log.info({ vmId: id, name, state, pid: machine.process.pid }, 'took over a running VM');
      return;
    }
    log.warn({ vmId: id, name, state }, 'a VM has ended while no daemon was watching');
    await this.ended(managed, {
      reason: state === 'stopping' ? 'forced' : 'crashed',
      at: new Date().toISOString(),
      detail: 'QEMU ended while no daemon was watching; qemu.log in the directory of the VM may say why',
    });
  }

  /** The daemon does not wait for a QEMU that is silent: it is taken when it answers. */
  async #nowOrLater(managed: Managed, take: () => Promise<void>): Promise<void> {
    const { id, name } = managed.record;
    try {
      await take();
    } catch (error) {
      this.#options.log.error(
        { err: error, vmId: id, name },
        'the QEMU of a VM does not answer; it is asked again',
      );
      managed.silent = this.#later(managed, take).finally(() => delete managed.silent);
      this.#inBackground(managed, managed.silent);
    }
  }

  async #later(managed: Managed, take: () => Promise<void>): Promise<void> {
    const { registry, closing, log } = this.#options;
    for (;;) {
      await sleep(askAgainMs, undefined, { signal: closing, ref: false });
      if (!registry.holds(managed)) return;
      // It is being deleted.
      if (managed.operationId) continue;
      try {
        return await take();
      } catch (error) {
        log.debug({ err: error, vmId: managed.record.id }, 'QEMU still does not answer');
      }
    }
  }

  /** Lets go of every QEMU; they run on. */
  detach(): void {
    for (const { machine } of this.#options.registry.all()) machine?.detach();
  }

  /** What nobody waits for may fail (a full disk takes no record), but not bring the daemon down. */
  #inBackground(managed: Managed, work: Promise<void>): void {
    const { log, closing } = this.#options;
    work.catch((error: unknown) => {
      if (!closing.aborted) log.error({ err: error, vmId: managed.record.id }, 'following a VM failed');
    });
  }
}
