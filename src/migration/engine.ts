/**
 * Runs a pure machine: one event at a time, the next state journalled before any effect of it. Effects run in
 * order, and an event waits until those of the event before are done; so long work must not be an effect's own
 * promise but report back with an event later.
 */
import { AppError, asAppError } from '../model/errors.ts';
import { isRefused, type Next, type Refused } from './protocol.ts';

/** Append-only and durable: what was appended is there after a crash. */
export interface Journal<State> {
  append(state: State): void | Promise<void>;
}

export interface EngineOptions<State, Event, Effect> {
  /** Where it stands: the first state, or the last one in the journal. */
  state: State;
  transition: (state: State, event: Event) => Next<State, Effect> | Refused;
  journal: Journal<State>;
  /** Does one effect. The event that it gives is taken next. It must not throw for expected failures. */
  perform: (effect: Effect) => Promise<Event | undefined>;
  /** After the journal has it, before its effects. */
  onState?: (state: State) => void;
  /** An effect has a bug: the machine stands still from then on. */
  onFailure: (error: AppError) => void;
}

export class Engine<State extends { name: string }, Event extends { name: string }, Effect> {
  readonly #options: EngineOptions<State, Event, Effect>;
  readonly #waiters = new Set<{ wanted: (state: State) => boolean; found: PromiseWithResolvers<State> }>();
  #state: State;
  #last: Promise<void> = Promise.resolve();
  #failure: AppError | undefined;
  #waiting = 0;
  #stopped = false;

  constructor(options: EngineOptions<State, Event, Effect>) {
    this.#options = options;
    this.#state = options.state;
  }

  get state(): State {
    return this.#state;
  }

  /**
   * No event is at work or waits. What only repeats itself comes then: it would wait before a cancel, and each time that
   * nobody answers cost it as long as one does not.
   */
  get isIdle(): boolean {
    return this.#waiting === 0;
  }

  /**
   * Takes the event in its turn; resolves when its effects are done. A refusal is `wrong_state` with the machine's
   * own name for it in `details.refused`. If the journal cannot be written, its error comes out and the event was
   * not taken: it may come again.
   */
  dispatch(event: Event): Promise<void> {
    this.#waiting += 1;
    const turn = this.#last
      .then(() => this.#take(event))
      .finally(() => {
        this.#waiting -= 1;
      });
    this.#last = turn.catch(() => {});
    return turn;
  }

  /** The first state, from now on or now, for which `wanted` holds. */
  async waitFor(wanted: (state: State) => boolean): Promise<State> {
    if (this.#failure) throw this.#failure;
    if (wanted(this.#state)) return this.#state;
    const found = Promise.withResolvers<State>();
    this.#waiters.add({ wanted, found });
    return found.promise;
  }

  /** Takes no events any more, as if the daemon had died; resolves when nothing of it is at work. */
  async stop(): Promise<void> {
    this.#stopped = true;
    await this.#last;
  }

  async #take(first: Event): Promise<void> {
    for (let event: Event | undefined = first; event !== undefined; ) {
      if (this.#stopped) return;
      if (this.#failure) throw this.#failure;
      const answer: Next<State, Effect> | Refused = this.#options.transition(this.#state, event);
      if (isRefused(answer)) throw refusal(this.#state, event, answer);
      if (answer.state !== this.#state) await this.#options.journal.append(answer.state);
      try {
        event = await this.#go(answer);
      } catch (error) {
        this.#fail(asAppError(error));
        throw error;
      }
    }
  }

  async #go({ state, effects }: Next<State, Effect>): Promise<Event | undefined> {
    this.#state = state;
    this.#options.onState?.(state);
    for (const waiter of this.#waiters) {
      if (!waiter.wanted(state)) continue;
      this.#waiters.delete(waiter);
      waiter.found.resolve(state);
    }
    let result: Event | undefined;
    for (const effect of effects) {
      if (this.#stopped) return undefined;
      const event = await this.#options.perform(effect);
      if (event && result) throw new Error(`Bug: two effects of ${state.name} ended with an event`);
      result ??= event;
    }
    return result;
  }

  #fail(error: AppError): void {
    this.#failure = error;
    for (const { found } of this.#waiters) found.reject(error);
    this.#waiters.clear();
    this.#options.onFailure(error);
  }
}

const refusal = (state: { name: string }, event: { name: string }, { refused, message }: Refused): AppError =>
  new AppError('wrong_state', `Cannot ${event.name} the migration: ${message}`, {
    state: state.name,
    refused,
  });
