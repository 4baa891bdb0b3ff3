/**
 * The source's side of one migration: the pure machine of `source-machine.ts` with hands (`departure.ts`). It knows QEMU,
 * and everything else only by the few functions that it is given.
 */
import { type AppError, asAppError } from '../model/errors.ts';
import type { Uuid } from '../model/ids.ts';
import type {
  MigrationLimits,
  MigrationOptions,
  MigrationProgress,
  MigrationResult,
  VmToMove,
} from '../model/migration.ts';
import { delay, type QmpEvent } from '../qmp/index.ts';
import type { Machine } from '../vm/machine.ts';
import { Departure, type DepartureSurroundings } from './departure.ts';
import { Engine, type Journal } from './engine.ts';
import { ProgressTracker } from './progress.ts';
import type { Ticket, ToDestination, ToSource } from './protocol.ts';
import {
  isSourceOver,
  type SourceEffect,
  type SourceEvent,
  type SourceState,
  sourceTransition,
} from './source-machine.ts';

export interface SourceSurroundings extends DepartureSurroundings {
  journal: Journal<SourceState>;
  /** Sends a message; it may be lost, and a failure means no more than that. */
  send: (message: ToDestination) => Promise<void>;
  /** Removes the VM from this cloudlet, its files first of all; its QEMU has ended. Gone already is no error. */
  discard: () => Promise<void>;
  onState?: (state: SourceState) => void;
  onProgress?: (progress: MigrationProgress) => void;
  /** The vCPUs have stopped here, and mostly for good: nothing may hold the migration up now. */
  onStopped?: () => void;
  onFailure: (error: AppError) => void;
}

export interface SourceMigrationOptions {
  id: Uuid;
  vm: VmToMove;
  options: MigrationOptions;
  state: SourceState;
  /** `null` if it has ended. */
  machine: Machine | null;
  surroundings: SourceSurroundings;
  /** How often an answer that does not come is asked for. */
  retryMs?: number;
}

const journalRetryMs = 1000;

export class SourceMigration {
  readonly #vm: VmToMove;
  readonly #around: SourceSurroundings;
  readonly #engine: Engine<SourceState, SourceEvent, SourceEffect>;
  readonly #tracker: ProgressTracker;
  readonly #retry: NodeJS.Timeout;
  readonly #unsubscribe: () => void;
  #options: MigrationOptions;
  readonly #departure: Departure;
  #stopped = false;
  #hasStopped = false;

  constructor({ id, vm, options, state, machine, surroundings, retryMs = 1000 }: SourceMigrationOptions) {
    this.#vm = vm;
    this.#options = options;
    this.#around = surroundings;
    this.#tracker = new ProgressTracker({
      memoryBytes: vm.spec.memoryBytes,
      diskBytes: options.storage === 'shared' ? 0 : vm.diskBytes,
    });
    this.#departure = new Departure({
      id,
      vm,
      machine,
      wanted: () => this.#options,
      surroundings,
      tracker: this.#tracker,
      onProgress: () => this.#report(),
    });
    this.#engine = new Engine({
      state,
      transition: sourceTransition,
      journal: surroundings.journal,
      perform: (effect) => this.#perform(effect),
      onState: (next) => {
        if (next.name === 'switching') this.#tracker.enter('switchover');
        if (next.name === 'serving') this.#tracker.enter('postcopy');
        if (next.name === 'moved') this.#tracker.enter('done');
        surroundings.onState?.(next);
        this.#report();
      },
      onFailure: surroundings.onFailure,
    });
    this.#retry = setInterval(() => {
      if (this.#engine.isIdle) this.#tell({ name: 'retry' });
    }, retryMs);
    this.#unsubscribe = machine?.qmp.onEvent((event) => this.#watch(event)) ?? (() => {});
    machine?.exited.then(() => this.#tell({ name: 'vm-ended' }));
  }

  get state(): SourceState {
    return this.#engine.state;
  }

  get progress(): MigrationProgress {
    return this.#tracker.progress;
  }

  get result(): MigrationResult {
    return this.#tracker.result;
  }

  /** It copies while the VM runs, and may take its time. */
  get canBePaused(): boolean {
    return !this.#hasStopped && ['planned', 'preparing', 'copying'].includes(this.state.name);
  }

  /** Begins; resolves when the destination was asked. */
  start(): Promise<void> {
    return this.#engine.dispatch({ name: 'start' });
  }

  /** Goes on from the journal after the daemon was away: continues or rolls back by itself. */
  restart(): Promise<void> {
    return this.#engine.dispatch({ name: 'restarted' });
  }

  /** Resolves when the VM runs here as before. `wrong_state` once the VM is the destination's. */
  cancel(): Promise<void> {
    return this.#engine.dispatch({ name: 'cancel' });
  }

  /** An operator's word that the destination will not run the VM. */
  claim(reason: string): Promise<void> {
    return this.#engine.dispatch({ name: 'claim', reason });
  }

  /** Takes a message of the destination. */
  async receive(message: ToSource): Promise<void> {
    if (message.name === 'running') {
      this.#tracker.resumed();
      if (message.cost) this.#tracker.costThere(message.cost);
    }
    if (message.name === 'recover') return this.#recover(message.ticket);
    await this.#engine.dispatch(this.#departure.isDiskSafe ? message : asUnfinished(message));
  }

  /** The destination cannot be reached: a migration that was undone here need not wait for it. */
  async giveUp(): Promise<void> {
    await this.#engine.dispatch({ name: 'give-up' });
  }

  async setLimits(limits: MigrationLimits): Promise<void> {
    this.#options = { ...this.#options, limits };
    await this.#departure.keepToLimits();
  }

  /** The first state, now or later, that is wanted. */
  waitFor(wanted: (state: SourceState) => boolean): Promise<SourceState> {
    return this.#engine.waitFor(wanted);
  }

  waitUntilOver(): Promise<SourceState> {
    return this.waitFor(isSourceOver);
  }

  /** Lets go of everything as a daemon does that ends: QEMU and the journal stay as they are. */
  async stop(): Promise<void> {
    this.#stopped = true;
    clearInterval(this.#retry);
    this.#unsubscribe();
    // First of all no effect begins any more.
    await this.#departure.stop(this.#engine.stop());
  }

  #watch(event: QmpEvent): void {
    if (event.name === 'STOP') {
      this.#hasStopped = true;
      this.#tracker.paused();
      this.#around.onStep?.('stopped');
      this.#departure.hurry(true);
      this.#around.onStopped?.();
    }
    if (event.name === 'RESUME') this.#departure.hurry(false);
    if (event.name === 'MIGRATION' && event.data.status === 'postcopy-active')
      this.#tracker.enteredPostcopy();
  }

  /** Events that nobody waits for. Refusals cannot come of them, and failures have their own way. */
  #tell(event: SourceEvent): void {
    if (!this.#stopped) this.#engine.dispatch(event).catch(() => {});
  }

  async #perform(effect: SourceEffect): Promise<SourceEvent | undefined> {
    switch (effect.name) {
      case 'send-prepare':
        this.#departure.prepare();
        return this.#send({ name: 'prepare', vm: this.#vm, options: this.#options });
      case 'send-commit':
        return this.#send({ name: 'commit', epoch: effect.epoch });
      case 'send-abort':
        return this.#send({ name: 'abort', epoch: effect.epoch });
      case 'send-pages-lost':
        return this.#send({ name: 'pages-lost' });
      case 'send-done':
        return this.#send({ name: 'done' });
      case 'copy':
        this.#beginCopy(effect.ticket);
        return undefined;
      case 'continue':
        await this.#departure.letGo();
        return undefined;
      case 'undo':
        await this.#departure.undo();
        return { name: 'undone' };
      case 'take-back':
        await this.#departure.takeBack();
        return { name: 'taken-back' };
      case 'serve':
        return this.#serve();
      case 'discard':
        await this.#departure.leave();
        await this.#around.discard();
        return { name: 'discarded' };
      case 'tell-operator':
        this.#around.tellOperator(effect.message);
        return undefined;
    }
  }

  async #send(message: ToDestination): Promise<undefined> {
    // Lost messages are repeated, whatever lost them.
    await this.#around.send(message).catch(() => {});
  }

  /** Runs beside the engine, which stays free for a cancel. */
  #beginCopy(ticket: Ticket): void {
    const { copied, signal } = this.#departure.begin(ticket);
    copied
      .then(() => this.#engine.dispatch({ name: 'release' }))
      .catch((error) => this.#reportFailure(asAppError(error).message, signal))
      // Cancelled, by a user or by the end of the daemon.
      .catch(() => {});
  }

  /**
   * Repeats itself while the journal cannot be written, for the VM may stand still: whether a release reached the
   * disk is not known then, and only a later word in the journal makes it safe to let the VM run.
   */
  async #reportFailure(message: string, signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      try {
        return await this.#engine.dispatch({ name: 'failed', message });
      } catch (error) {
        this.#around.tellOperator(`The migration cannot be undone yet: ${asAppError(error).message}`);
        await delay(journalRetryMs, signal);
      }
    }
  }

  /** The destination asks for a new session when it misses the old one, so here is only to look. */
  async #serve(): Promise<SourceEvent | undefined> {
    const found = await this.#departure.look();
    if (found === 'gone') return { name: 'vm-ended' };
    return found === 'failed' ? { name: 'cannot-serve' } : undefined;
  }

  /** Also before the word that the VM runs there: what it waits for on its way there may be a page. */
  async #recover(ticket: Ticket): Promise<void> {
    const { name } = this.state;
    if (name === 'serving' || name === 'switching')
      await this.#departure.recover(ticket, { isRunningThere: name === 'serving' });
  }

  #report(): void {
    this.#around.onProgress?.(this.#tracker.progress);
    if (isSourceOver(this.#engine.state)) clearInterval(this.#retry);
  }
}

/** One that is whole needs nobody; for any other, relays do not have enough yet. */
function asUnfinished(message: Exclude<ToSource, { name: 'recover' }>): typeof message {
  if (message.name !== 'running') return message;
  const { divided: _, ...running } = message;
  return running;
}
