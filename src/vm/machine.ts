/**
 * One running QEMU: launched, or found again after the daemon was away. It may or may not be our child; either way
 * it outlives us, and the monitor is the only way in.
 *
 * Invariants: no second QEMU is ever started for a VM whose first may still live; a process is ended only after
 * its start time was compared; the first cause of an end wins.
 */
import { AppError, asAppError } from '../model/errors.ts';
import type { ProcessRef, VmExit } from '../model/vm.ts';
import {
  abortError,
  delay,
  QmpConnection,
  type QmpEvent,
  type RunState,
  type WaitOptions,
  withDeadline,
} from '../qmp/index.ts';
import { GuestAgent } from './agent.ts';
import type { Launch } from './argv.ts';
import { Console } from './console.ts';
import { trimConsoleLog } from './console-log.ts';
import { type LaunchOptions, launchQemu, removeSockets } from './launch.ts';
import { type MachinePaths, machinePaths } from './paths.ts';
import { isAlive, killProcess, waitUntilGone } from './process.ts';
import { SpareMonitor } from './spare-monitor.ts';
import { readLastLines } from './tail.ts';

const adoptTimeoutMs = 10_000;
const quitTimeoutMs = 5_000;
const killTimeoutMs = 10_000;
const trimEveryMs = 10_000;
/** A guest that is still booting drops the press of a power button, so it is pressed again. */
const powerButtonEveryMs = 2_000;

export interface MachineStatus {
  running: boolean;
  state: RunState;
}

export class Machine implements AsyncDisposable {
  readonly id: string;
  readonly process: ProcessRef;
  readonly qmp: QmpConnection;
  readonly agent: GuestAgent;
  readonly console: Console;
  readonly paths: MachinePaths;
  /** Why QEMU is not running any more. It never rejects, and never settles after `detach()`. */
  readonly exited: Promise<VmExit>;
  readonly #exited = Promise.withResolvers<VmExit>();
  readonly #listeners = new Set<(status: { running: boolean }) => void>();
  #cause: Pick<VmExit, 'reason' | 'detail'> | undefined;
  #detached = false;
  readonly #spareMonitor: SpareMonitor | undefined;
  readonly #trimming: NodeJS.Timeout;

  private constructor(
    { id, directory }: { id: string; directory: string },
    process: ProcessRef,
    qmp: QmpConnection,
    spareMonitor: SpareMonitor | undefined,
  ) {
    this.id = id;
    this.#spareMonitor = spareMonitor;
    this.process = process;
    this.qmp = qmp;
    this.paths = machinePaths(directory);
    this.agent = new GuestAgent(this.paths.agent);
    this.console = new Console(this.paths.console);
    this.exited = this.#exited.promise;
    qmp.onEvent((event) => this.#onEvent(event));
    this.#trimming = setInterval(() => {
      trimConsoleLog(directory).catch(() => {
        // The next time is soon, and a full disk shows elsewhere.
      });
    }, trimEveryMs).unref();
  }

  /** Starts QEMU and leaves the VM paused. On failure or abort nothing is left of it. */
  static async launch(launch: Launch, options: LaunchOptions = {}): Promise<Machine> {
    const { process, qmp, spareMonitor, ended } = await launchQemu(launch, options);
    const machine = new Machine(launch, process, qmp, spareMonitor);
    machine.#watch(ended);
    return machine;
  }

  /**
   * Finds the QEMU of an earlier daemon again; `null` if it has ended. A monitor that does not answer is `timeout`
   * or `qemu_failed`: then QEMU may still run the VM, and the caller must not start another.
   */
  static async adopt(
    found: { id: string; directory: string; process: ProcessRef },
    options: { signal?: AbortSignal; timeoutMs?: number } = {},
  ): Promise<Machine | null> {
    const { id, directory, process } = found;
    const { signal, timeoutMs = adoptTimeoutMs } = options;
    const paths = machinePaths(directory);
    if (!(await isAlive(process))) {
      await removeSockets(paths);
      return null;
    }
    let qmp: QmpConnection;
    let status: MachineStatus;
    try {
      qmp = await QmpConnection.connect(paths.qmp, { timeoutMs, signal });
      status = await identify(qmp, id, { timeoutMs, signal });
    } catch (error) {
      if (await isAlive(process)) throw error;
      await removeSockets(paths);
      return null;
    }
    const machine = new Machine(found, process, qmp, SpareMonitor.open(paths));
    machine.#watch(undefined);
    if (status.state === 'shutdown') machine.#guestShutDown();
    return machine;
  }

  async status(): Promise<MachineStatus> {
    const { running, status } = await this.qmp.execute('query-status');
    return { running, state: status };
  }

  /** Why QEMU has stopped the VM for its disk's sake; undefined if it has not. */
  async stall(): Promise<string | undefined> {
    const { state } = await this.status();
    if (state !== 'io-error') return undefined;
    const drives = await this.qmp.execute('query-block');
    const isFull = drives.some((drive) => drive['io-status'] === 'nospace');
    return isFull ? 'no space left for its disk' : 'its disk gives errors';
  }

  /** Calls the listener when the VM stops or runs again, for whatever reason; the answer unsubscribes. */
  onStatus(listener: (status: { running: boolean }) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** After a timeout it may still come to it. */
  async resume(options: WaitOptions = {}): Promise<void> {
    await this.qmp.execute('cont', undefined, options);
  }

  async pause(): Promise<void> {
    await this.qmp.execute('stop');
  }

  /** Asks the guest to power off: through its agent if that answers at once, else by the power button. */
  async powerdown(signal?: AbortSignal): Promise<void> {
    try {
      await this.agent.shutdown({ timeoutMs: 1_000, signal });
    } catch {
      if (signal?.aborted) throw abortError(signal);
      await this.qmp.execute('system_powerdown', undefined, { signal });
    }
  }

  /**
   * Ends the VM: asks the guest, waits `graceMs`, then ends QEMU by force. A paused VM runs again for it. After an
   * abort the VM may run on or be about to power off.
   */
  async stop(options: { graceMs: number; signal?: AbortSignal }): Promise<VmExit> {
    const { graceMs, signal } = options;
    if (graceMs > 0 && (await this.#canPowerDown())) {
      const asked = new AbortController();
      // Whatever goes wrong with asking, force follows.
      this.#askToPowerDown(AbortSignal.any(signal ? [asked.signal, signal] : [asked.signal])).catch(() => {});
      const over = new AppError('timeout', `The guest did not power off within ${graceMs} ms`);
      try {
        return await withDeadline(this.exited, { timeoutMs: graceMs, signal, onTimeout: () => over });
      } catch (error) {
        if (error !== over) throw error;
      } finally {
        asked.abort();
      }
    }
    return this.kill();
  }

  /** Ends QEMU at once; the guest's last writes may be lost, as by a power cut. */
  async kill(): Promise<VmExit> {
    this.#cause ??= { reason: 'forced', detail: 'Viper ended QEMU' };
    await this.#end();
    // The timer also keeps our process here until the end was seen: a detached child does not.
    return withDeadline(this.exited, {
      timeoutMs: killTimeoutMs,
      onTimeout: () =>
        new AppError(
          'timeout',
          `QEMU (pid ${this.process.pid}) did not end within ${killTimeoutMs} ms of SIGKILL`,
          {
            waitedFor: 'end of QEMU',
            timeoutMs: killTimeoutMs,
          },
        ),
    });
  }

  /** Lets go of QEMU, which runs on. */
  detach(): void {
    this.#detached = true;
    this.#letGo();
    this.qmp.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.detach();
  }

  #letGo(): void {
    clearInterval(this.#trimming);
    this.agent.close();
    this.console.close();
    this.#spareMonitor?.[Symbol.dispose]();
  }

  /** A VM that never ran, or that waits for its memory, has no guest to ask. */
  async #canPowerDown(): Promise<boolean> {
    try {
      const { running, state } = await this.status();
      return running || state === 'paused';
    } catch {
      return false;
    }
  }

  async #askToPowerDown(signal: AbortSignal): Promise<void> {
    await this.resume();
    await this.powerdown(signal);
    for (;;) {
      await delay(powerButtonEveryMs, signal);
      await this.qmp.execute('system_powerdown', undefined, { signal });
    }
  }

  async #end(): Promise<void> {
    try {
      await this.qmp.execute('quit', undefined, { timeoutMs: quitTimeoutMs });
    } catch {
      // It may be gone already, or deaf; the signal below does not ask.
    }
    if (await waitUntilGone(this.process, { timeoutMs: quitTimeoutMs })) return;
    await killProcess(this.process);
  }

  #onEvent(event: QmpEvent): void {
    if (event.name === 'STOP' || event.name === 'RESUME') {
      for (const listener of [...this.#listeners]) listener({ running: event.name === 'RESUME' });
    } else if (event.name === 'SHUTDOWN' && event.data.guest) {
      if (event.data.reason === 'guest-panic')
        this.#cause ??= { reason: 'crashed', detail: 'The guest panicked' };
      this.#guestShutDown();
    }
  }

  /** QEMU keeps a VM that has shut down until it is told to quit (`-action shutdown=pause`). */
  #guestShutDown(): void {
    this.#cause ??= { reason: 'shutdown', detail: 'The guest shut down' };
    this.#end().catch(() => {
      // The watch goes on; whoever stops the VM next tries again.
    });
  }

  /** `ended` is there for a child of ours; any other process is watched through the monitor and /proc. */
  #watch(ended: Promise<string> | undefined): void {
    const watch = async (): Promise<void> => {
      let how = 'it was not our child';
      if (ended) {
        how = await ended;
        // The last events may still be in the socket.
        await this.qmp.closed;
      } else {
        await this.qmp.closed;
        if (this.#detached) return;
        await waitUntilGone(this.process);
      }
      if (this.#detached) return;
      this.#letGo();
      await removeSockets(this.paths);
      this.#cause ??= { reason: 'crashed', detail: await this.#crashDetail(how) };
      this.#exited.resolve({ ...this.#cause, at: new Date().toISOString() });
    };
    watch().catch((error) => {
      const detail = `Its end could not be looked into: ${asAppError(error).message}`;
      this.#exited.resolve({ reason: 'crashed', detail, at: new Date().toISOString() });
    });
  }

  async #crashDetail(how: string): Promise<string> {
    const output = await readLastLines(this.paths.qemuLog, 10);
    return `QEMU ended by itself (${how})${output ? `: ${output}` : ''}`;
  }
}

async function identify(
  qmp: QmpConnection,
  id: string,
  options: { timeoutMs: number; signal?: AbortSignal },
): Promise<MachineStatus> {
  try {
    const { UUID } = await qmp.execute('query-uuid', undefined, options);
    if (UUID !== id) {
      throw new AppError('qemu_failed', `The QEMU found runs VM ${UUID}, wanted ${id}`, {
        found: UUID,
        wanted: id,
      });
    }
    const { running, status } = await qmp.execute('query-status', undefined, options);
    return { running, state: status };
  } catch (error) {
    qmp.close();
    throw error;
  }
}
