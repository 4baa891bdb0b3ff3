/**
 * The destination's side of one migration: the pure machine of `destination-machine.ts` with hands (`arrival.ts`). It answers
 * `prepare` only after the caller's checks; it knows QEMU, and everything else only by the functions it is given.
 */
import type { Duplex } from 'node:stream';
import type { AppError } from '../model/errors.ts';
import type { MergeStatistics, MigrationOptions, MigrationProgress, VmToMove } from '../model/migration.ts';
import type { Machine } from '../vm/machine.ts';
import { Arrival, type ArrivalSurroundings } from './arrival.ts';
import {
  type DestinationEffect,
  type DestinationEvent,
  type DestinationState,
  destinationOwns,
  destinationTransition,
  isDestinationOver,
} from './destination-machine.ts';
import { Engine, type Journal } from './engine.ts';
import type { Problem, SessionPurpose, ToDestination, ToSource } from './protocol.ts';
import { Custody, type Escrow } from './relayed/custody.ts';
import type { SilentQemu } from './streams-in.ts';

export interface DestinationSurroundings extends ArrivalSurroundings {
  journal: Journal<DestinationState>;
  /** Sends a message; it may be lost, and a failure means no more than that. */
  send: (message: ToSource) => Promise<void>;
  /** Checks and reserves; an empty list means that the VM is welcome. */
  check: () => Promise<Problem[]>;
  merging?: ArrivalSurroundings['merging'] & {
    /** Where there is a custodian. */
    escrow?: Escrow | undefined;
  };
  /** Removes what `make` made and reserved; QEMU has ended. Nothing there is no error. */
  discard: () => Promise<void>;
  onState?: (state: DestinationState) => void;
  onFailure: (error: AppError) => void;
}

export interface DestinationMigrationOptions {
  vm: VmToMove;
  options: MigrationOptions;
  state: DestinationState;
  /** After a restart: the QEMU that was found, or `null`. */
  machine?: Machine | null;
  /** After a restart: the QEMU that is there and does not answer. Nothing is decided about its VM until it does. */
  silent?: SilentQemu | undefined;
  surroundings: DestinationSurroundings;
  retryMs?: number;
  /** How long the source may take to come with the ticket. */
  ticketMs?: number;
}

export class DestinationMigration {
  readonly #around: DestinationSurroundings;
  readonly #engine: Engine<DestinationState, DestinationEvent, DestinationEffect>;
  readonly #arrival: Arrival;
  /** Where there is a custodian. */
  readonly #custody: Custody | undefined;
  readonly #retry: NodeJS.Timeout;
  readonly #abort = new AbortController();
  #stopped = false;
  /** After a start of the daemon: what its QEMU has come to is known. */
  #hasLooked: boolean;

  constructor(options: DestinationMigrationOptions) {
    const { vm, state, machine = null, silent, surroundings, retryMs = 1000, ticketMs = 60_000 } = options;
    const { signal } = this.#abort;
    const escrow = surroundings.merging?.escrow;
    this.#around = surroundings;
    this.#hasLooked = state.name === 'absent';
    this.#custody = escrow && new Custody(escrow, signal);
    this.#engine = new Engine({
      state,
      transition: destinationTransition,
      journal: surroundings.journal,
      perform: (effect) => this.#perform(effect),
      onState: (next) => {
        if (isDestinationOver(next)) this.#rest();
        surroundings.onState?.(next);
      },
      onFailure: surroundings.onFailure,
    });
    this.#arrival = new Arrival({
      vm,
      wanted: options.options,
      machine,
      silent,
      surroundings,
      ticketMs,
      custody: this.#custody,
      isWaiting: () => this.state.name === 'waiting',
      isOurs: () => this.#isOurs,
      askForPages: (ticket) => void this.#send({ name: 'recover', ticket }),
      tell: (event) => this.#tell(event),
      signal,
    });
    this.#retry = setInterval(() => {
      if (this.#engine.isIdle) this.#tell({ name: 'retry' });
      this.#arrival.streams.retry();
      void this.#askCustodian();
    }, retryMs);
  }

  get state(): DestinationState {
    return this.#engine.state;
  }

  /** How far the merge is, once the source is not needed any more. */
  get mergeProgress(): MigrationProgress | undefined {
    return this.#arrival.mergeProgress;
  }

  /** What was fetched from relays so far. */
  get mergeStatistics(): MergeStatistics | undefined {
    return this.#arrival.mergeStatistics;
  }

  /** The QEMU of the VM; it is the caller's from `settled` on. */
  get machine(): Machine | null {
    return this.#arrival.machine;
  }

  /** Takes a message of the source. */
  async receive(message: ToDestination): Promise<void> {
    // It will be said again: the source's last word would end this before what was for the way is put away.
    if (this.#arrival.isSilent || !this.#hasLooked) return;
    if (message.name !== 'prepare') return this.#engine.dispatch(message);
    if (this.state.name === 'absent') {
      const problems = await this.#around.check();
      // One that came again while this one was looked at finds what the first has made, and that refuses nothing.
      const isFirst = this.state.name === 'absent';
      if (isFirst && problems.length > 0) return this.#around.send({ name: 'refused', problems });
    }
    await this.#engine.dispatch({ name: 'prepare', epoch: message.vm.epoch });
  }

  /**
   * Takes a session of the source. `forbidden` for a wrong, used or expired ticket: one disk session and as many
   * for memory as were agreed on.
   */
  accept(purpose: SessionPurpose, secret: string, stream: Duplex): void {
    this.#arrival.streams.accept(purpose, secret, stream);
  }

  /** The QEMU that was silent answers, or has ended (`null`). */
  async answers(machine: Machine | null): Promise<void> {
    this.#arrival.answers(machine);
    await this.restart();
  }

  /** Goes on from the journal after the daemon was away. */
  async restart(): Promise<void> {
    const { isDiskKnown, ...looked } = await this.#look().finally(() => {
      this.#hasLooked = true;
    });
    const { complete } = looked;
    // Without its disk it is as one that has not come.
    const found = isDiskKnown || this.state.name !== 'waiting' ? looked.found : 'waiting';
    const divided = this.#arrival.isDivided;
    if (found === 'gone' && this.#isOurs && divided && this.#custody) {
      this.#custody.leaveUndecided();
      this.#around.merging?.tellOperator(
        'The VM has ended before all of its memory was here. It can go on as it left its source: viper vm claim --from at ' +
          'its custodian. Or give that up, and start it from its disk: viper vm claim here, then viper vm start',
      );
      return;
    }
    // A QEMU whose guest waits for a page may say nothing at all.
    const hasArrived = this.state.name === 'arrived' || this.state.name === 'merging';
    // Before anything else: a VM whose stream went with the daemon before may need a page before it can be let run.
    if (found === 'loaded' || found === 'running' || (found === 'waiting' && hasArrived))
      this.#arrival.watchCompletion();
    await this.#tellEnd({ name: 'restarted', found, complete, divided }, complete || found === 'gone');
  }

  async #look() {
    const isDiskKnown = await this.#arrival.findWritten();
    return { isDiskKnown, ...(await this.#arrival.look()) };
  }

  /** An operator's word that the source will not run the VM; or, where it has ended, that nobody is to go on with it. */
  async claim(reason: string): Promise<void> {
    if (this.#custody?.takeDecision()) {
      this.#tellEnd({ name: 'restarted', found: 'gone', complete: false, divided: true }, true).catch(
        () => {},
      );
      return;
    }
    // The custodian was asked and does not answer: it is gone for good, says the operator.
    if (this.#isOurs && this.#custody?.doWithout()) return;
    await this.#engine.dispatch({ name: 'claim', reason });
  }

  /** It runs here, with somebody who may have to go on with it. */
  get #isOurs(): boolean {
    const { state } = this;
    return state.name === 'merging' || (state.name === 'arrived' && !state.complete);
  }

  /**
   * Before the VM counts as whole, or as ended, its disk has to be whole, and the custodian to give up its right to it. What
   * is missing of the disk relays hold, so the source need not wait for that.
   */
  async #tellEnd(event: DestinationEvent, isEnd: boolean): Promise<void> {
    const { hasDisk } = this.#arrival;
    if (hasDisk && isEnd && destinationOwns(this.state) && (await this.#arrival.isDiskPending())) {
      if (event.name === 'restarted' && event.complete)
        await this.#engine.dispatch({ ...event, complete: false, divided: true });
      else {
        const hasEnded = event.name === 'restarted' || event.name === 'vm-ended';
        await this.#engine.dispatch({ name: 'divided', hasEnded });
      }
      await this.#arrival.settleDisk();
      // A VM that has ended meanwhile is whole, too.
      if (event.name === 'restarted' && event.complete) return this.#engine.dispatch({ name: 'completed' });
    }
    if (this.#custody && isEnd && this.#isOurs) {
      const epoch = await this.#custody.release();
      if (epoch !== undefined) return this.#engine.dispatch({ name: 'claimed', epoch });
    }
    await this.#engine.dispatch(event);
  }

  async #askCustodian(): Promise<void> {
    if (!this.#custody || !this.#isOurs) return;
    const epoch = await this.#custody.ask();
    if (epoch !== undefined) this.#tell({ name: 'claimed', epoch });
  }

  waitFor(wanted: (state: DestinationState) => boolean): Promise<DestinationState> {
    return this.#engine.waitFor(wanted);
  }

  /** Lets go of everything as a daemon does that ends: QEMU and the journal stay as they are. */
  async stop(): Promise<void> {
    this.#rest();
    await this.#arrival.stop();
    await this.#engine.stop();
  }

  #rest(): void {
    this.#stopped = true;
    clearInterval(this.#retry);
    this.#arrival.streams.close();
    this.#abort.abort();
  }

  #tell(event: DestinationEvent): void {
    const isEnd = event.name === 'completed' || event.name === 'vm-ended';
    if (!this.#stopped) this.#tellEnd(event, isEnd).catch(() => {});
  }

  async #perform(effect: DestinationEffect): Promise<DestinationEvent | undefined> {
    switch (effect.name) {
      case 'make':
        return this.#arrival.make();
      case 'send-prepared':
        return this.#sendPrepared();
      case 'send-refused':
        return this.#send({ name: 'refused', problems: effect.problems });
      case 'send-committed':
        return this.#send({ name: 'committed', epoch: effect.epoch });
      case 'send-running':
        return this.#send({ ...effect, name: 'running' });
      case 'send-rejected':
        return this.#send({ name: 'rejected', reason: effect.reason });
      case 'send-gone':
        return this.#send({ name: 'gone' });
      case 'send-ask':
        return this.#send({ name: 'ask' });
      case 'send-unknown':
        return this.#send({ name: 'unknown' });
      case 'resume':
        return this.#resume();
      case 'tidy':
        await this.#arrival.tidy();
        return undefined;
      case 'recover':
        return undefined;
      case 'end-vm':
        return this.#ended(await this.#arrival.endVm());
      case 'discard':
        await this.#arrival.discard();
        await this.#around.discard();
        return { name: 'discarded' };
    }
  }

  async #send(message: ToSource): Promise<undefined> {
    // Lost messages are repeated, whatever lost them.
    await this.#around.send(message).then(
      () => message.name === 'running' && this.#custody?.noteHeard(),
      () => {},
    );
  }

  async #sendPrepared(): Promise<undefined> {
    const { ticket } = this.#arrival.streams;
    if (ticket) await this.#send({ name: 'prepared', ticket });
  }

  async #resume(): Promise<DestinationEvent | undefined> {
    const event = await this.#arrival.resume();
    return event.name === 'vm-ended' && this.#arrival.hasDisk ? this.#ended(event) : event;
  }

  /**
   * What only counts when a custodian has been asked, or the disk is whole, comes by itself, for that may take as long as
   * others are away.
   */
  #ended(event: DestinationEvent | undefined): DestinationEvent | undefined {
    if (!event || !(this.#custody || this.#arrival.hasDisk)) return event;
    this.#tell(event);
    return undefined;
  }
}
