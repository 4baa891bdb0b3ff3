/**
 * The source's half of a migration, pure: `transition(state, event)` gives the next state and the effects to run
 * after it is journalled, or a refusal. Nothing else decides who may run the VM.
 *
 *   planned     --start--> preparing
 *   planned     --cancel, restarted--> ended
 *   preparing   --prepared--> copying
 *   preparing   --refused--> ended
 *   preparing   --cancel, failed, vm-ended, restarted, rejected, gone--> withdrawing
 *   copying     --release--> switching             commit point: the epoch rises, the VM is the destination's
 *   copying     --cancel, failed, vm-ended, restarted, refused, rejected, gone--> undoing
 *   undoing     --undone--> withdrawing            the VM runs here as before
 *   withdrawing --gone, refused, give-up--> ended
 *   withdrawing --running--> leaving               a higher epoch was claimed at the destination
 *   switching   --running--> leaving
 *   switching   --running--> serving               in post-copy, until the last page is there
 *   switching   --rejected, claim--> taking-back
 *   serving     --running--> leaving                what is missing may be with relays: the source exits all the same
 *   leaving     --discarded--> moved
 *   taking-back --taken-back--> withdrawing
 *   taking-back --running--> leaving
 *   ended       --running--> leaving
 *
 * Invariants: up to `copying`, and again from `undoing` and `taking-back` on, the VM belongs to this side; from
 * `switching` to `moved` it does not, and its vCPUs stand still here. Between `switching` and the destination's
 * answer nobody runs it, and only an answer (or an operator) ends that, never a timeout.
 *
 * The release comes only when QEMU can no longer let the VM run by itself. A stock QEMU whose migration fails after
 * `pre-switchover` starts the VM again without being asked (`migration_iteration_finish`). So in pre-copy the release
 * waits until QEMU has completed, and in post-copy the VM is stopped by us first, which QEMU then respects.
 *
 * A QEMU that has begun post-copy never takes it back, so it begins only when the destination has said that it has
 * the commit: until then a rejection finds a VM that can run here again.
 */
import { type Ending, type Next, type Problem, type Refused, refuse, type Ticket } from './protocol.ts';

/** `epoch` is the highest that this side knows: its own, or from `switching` to `moved` the destination's. */
export type SourceState =
  | { name: 'planned'; epoch: number }
  | { name: 'preparing'; epoch: number }
  | { name: 'copying'; epoch: number; ticket: Ticket }
  | { name: 'undoing'; epoch: number; ending: Ending }
  | { name: 'withdrawing'; epoch: number; ending: Ending }
  | { name: 'switching'; epoch: number }
  | { name: 'serving'; epoch: number }
  | { name: 'leaving'; epoch: number }
  | { name: 'taking-back'; epoch: number; ending: Ending }
  | { name: 'moved'; epoch: number }
  | { name: 'ended'; epoch: number; ending: Ending };

export type SourceEvent =
  // From the one who asked for the migration.
  | { name: 'start' }
  | { name: 'cancel' }
  | { name: 'claim'; reason: string }
  // From the work.
  | { name: 'release' }
  | { name: 'failed'; message: string }
  | { name: 'undone' }
  | { name: 'taken-back' }
  | { name: 'discarded' }
  | { name: 'vm-ended' }
  /** QEMU has given post-copy up, with pages that the destination lacks. */
  | { name: 'cannot-serve' }
  | { name: 'restarted' }
  /** Time to repeat what has had no answer. */
  | { name: 'retry' }
  /** The destination cannot be reached, and nothing of ours depends on it any more. */
  | { name: 'give-up' }
  // From the destination.
  | { name: 'prepared'; ticket: Ticket }
  | { name: 'refused'; problems: Problem[] }
  | { name: 'committed'; epoch: number }
  | { name: 'running'; epoch: number; complete: boolean; divided?: boolean }
  | { name: 'rejected'; reason: string }
  | { name: 'gone' }
  | { name: 'ask' }
  | { name: 'unknown' };

export type SourceEffect =
  | { name: 'send-prepare' }
  | { name: 'send-commit'; epoch: number }
  | { name: 'send-abort'; epoch: number }
  | { name: 'send-pages-lost' }
  | { name: 'send-done' }
  /** Disks, then memory; ends with `release` or `failed`. */
  | { name: 'copy'; ticket: Ticket }
  /** Post-copy: let QEMU go on past its pause, if it stands there and its stream is whole. */
  | { name: 'continue' }
  /** Undo every step of the copy and let the VM run; ends with `undone`. */
  | { name: 'undo' }
  /** See to it that pages can be served; ends with `vm-ended` or `cannot-serve` if they cannot. */
  | { name: 'serve' }
  /** Let the stopped VM run here again; ends with `taken-back`. */
  | { name: 'take-back' }
  /** End QEMU, remove the VM's files; ends with `discarded`. */
  | { name: 'discard' }
  | { name: 'tell-operator'; message: string };

type Answer = Next<SourceState, SourceEffect> | Refused;

export const plannedSource = (epoch: number): SourceState => ({ name: 'planned', epoch });

/** At rest for good: nothing of the migration needs this side any more. */
export const isSourceOver = (state: SourceState): boolean => state.name === 'moved' || state.name === 'ended';

/** Whether the VM belongs to this side: whether its vCPUs may run here. */
export const sourceOwns = (state: SourceState): boolean =>
  !['switching', 'serving', 'leaving', 'moved'].includes(state.name);

export function sourceTransition(state: SourceState, event: SourceEvent): Answer {
  switch (state.name) {
    case 'planned':
      return whilePlanned(state, event);
    case 'preparing':
      return whilePreparing(state, event);
    case 'copying':
      return whileCopying(state, event);
    case 'undoing':
      return whileUndoing(state, event);
    case 'withdrawing':
      return whileWithdrawing(state, event);
    case 'switching':
      return whileSwitching(state, event);
    case 'serving':
      return whileServing(state, event);
    case 'leaving':
      return whileLeaving(state, event);
    case 'taking-back':
      return whileTakingBack(state, event);
    case 'moved':
      return whenMoved(state, event);
    case 'ended':
      return whenEnded(state, event);
  }
}

type In<Name extends SourceState['name']> = Extract<SourceState, { name: Name }>;

function whilePlanned(state: In<'planned'>, event: SourceEvent): Answer {
  const { epoch } = state;
  switch (event.name) {
    case 'start':
      return next({ name: 'preparing', epoch }, { name: 'send-prepare' });
    case 'cancel':
    case 'restarted':
      return next({ name: 'ended', epoch, ending: endingOf(event)! });
    default:
      return ignoreOrRefuse(state, event);
  }
}

/** Nothing has been done here yet, so there is nothing to undo here. */
function whilePreparing(state: In<'preparing'>, event: SourceEvent): Answer {
  const { epoch } = state;
  switch (event.name) {
    case 'prepared':
      return next({ name: 'copying', epoch, ticket: event.ticket }, { name: 'copy', ticket: event.ticket });
    case 'refused':
      return next({ name: 'ended', epoch, ending: endingOf(event)! }, { name: 'send-done' });
    case 'cancel':
    case 'failed':
    case 'vm-ended':
    case 'restarted':
    case 'rejected':
    case 'gone':
      return next({ name: 'withdrawing', epoch, ending: endingOf(event)! }, { name: 'send-abort', epoch });
    case 'retry':
      return next(state, { name: 'send-prepare' });
    default:
      return ignoreOrRefuse(state, event);
  }
}

function whileCopying(state: In<'copying'>, event: SourceEvent): Answer {
  const { epoch } = state;
  switch (event.name) {
    case 'release':
      return next({ name: 'switching', epoch: epoch + 1 }, { name: 'send-commit', epoch: epoch + 1 });
    case 'cancel':
    case 'failed':
    case 'vm-ended':
    case 'restarted':
    case 'refused':
    case 'rejected':
    case 'gone':
      return next({ name: 'undoing', epoch, ending: endingOf(event)! }, { name: 'undo' });
    default:
      return ignoreOrRefuse(state, event);
  }
}

function whileUndoing(state: In<'undoing'>, event: SourceEvent): Answer {
  const { epoch, ending } = state;
  switch (event.name) {
    case 'undone':
      return next({ name: 'withdrawing', epoch, ending }, { name: 'send-abort', epoch });
    case 'restarted':
      return next(state, { name: 'undo' });
    case 'cancel':
      return next(state);
    default:
      return ignoreOrRefuse(state, event);
  }
}

function whileWithdrawing(state: In<'withdrawing'>, event: SourceEvent): Answer {
  const { epoch, ending } = state;
  switch (event.name) {
    case 'gone':
    case 'refused':
      return next({ name: 'ended', epoch, ending }, { name: 'send-done' });
    case 'give-up':
      // The destination asks when it is back, and hears `abort` then.
      return next({ name: 'ended', epoch, ending });
    case 'running':
      return meetOtherOwner(state, event.epoch);
    case 'retry':
    case 'restarted':
    case 'ask':
    case 'prepared':
      return next(state, { name: 'send-abort', epoch });
    case 'cancel':
      return next(state);
    default:
      return ignoreOrRefuse(state, event);
  }
}

function whileSwitching(state: In<'switching'>, event: SourceEvent): Answer {
  const { epoch } = state;
  switch (event.name) {
    case 'committed':
      return event.epoch === epoch ? next(state, { name: 'continue' }) : next(state);
    case 'running':
      return settleWith(event);
    case 'rejected':
      return next({ name: 'taking-back', epoch: epoch + 1, ending: endingOf(event)! }, { name: 'take-back' });
    case 'claim':
      return next({ name: 'taking-back', epoch: epoch + 1, ending: endingOf(event)! }, { name: 'take-back' });
    case 'retry':
    case 'restarted':
    case 'ask':
      return next(state, { name: 'send-commit', epoch });
    case 'unknown':
      return next(state, {
        name: 'tell-operator',
        message: 'The destination has no record of this migration; the VM stays paused until it is claimed',
      });
    default:
      return ignoreOrRefuse(state, event);
  }
}

function whileServing(state: In<'serving'>, event: SourceEvent): Answer {
  switch (event.name) {
    case 'running':
      return settleWith(event);
    case 'restarted':
    case 'retry':
      return next(state, { name: 'serve' });
    case 'vm-ended':
    case 'cannot-serve':
      return next(state, { name: 'send-pages-lost' });
    case 'claim':
      return refuse('has_run_elsewhere', 'The VM has run at the destination since; its memory here is old');
    default:
      return ignoreOrRefuse(state, event);
  }
}

function whileLeaving(state: In<'leaving'>, event: SourceEvent): Answer {
  switch (event.name) {
    case 'discarded':
      return next({ name: 'moved', epoch: state.epoch }, { name: 'send-done' });
    case 'restarted':
      return next(state, { name: 'discard' });
    case 'claim':
      return refuse('has_run_elsewhere', 'The VM runs at the destination');
    default:
      return ignoreOrRefuse(state, event);
  }
}

function whileTakingBack(state: In<'taking-back'>, event: SourceEvent): Answer {
  const { epoch, ending } = state;
  switch (event.name) {
    case 'taken-back':
      return next({ name: 'withdrawing', epoch, ending }, { name: 'send-abort', epoch });
    case 'restarted':
      return next(state, { name: 'take-back' });
    case 'running':
      return meetOtherOwner(state, event.epoch);
    default:
      return ignoreOrRefuse(state, event);
  }
}

function whenMoved(state: In<'moved'>, event: SourceEvent): Answer {
  switch (event.name) {
    case 'running':
    case 'ask':
      return next(state, { name: 'send-done' });
    default:
      return ignoreOrRefuse(state, event);
  }
}

function whenEnded(state: In<'ended'>, event: SourceEvent): Answer {
  const { epoch } = state;
  switch (event.name) {
    case 'gone':
    case 'refused':
      return next(state, { name: 'send-done' });
    case 'ask':
    case 'prepared':
      return next(state, { name: 'send-abort', epoch });
    case 'running':
      return meetOtherOwner(state, event.epoch);
    default:
      return ignoreOrRefuse(state, event);
  }
}

/** Needed as long as pages are missing that nobody else holds. */
function settleWith({ epoch, complete, divided }: Extract<SourceEvent, { name: 'running' }>): Answer {
  if (!complete && !divided) return next({ name: 'serving', epoch });
  return next({ name: 'leaving', epoch }, { name: 'discard' });
}

/** Both sides say that they own the VM, which takes an operator's claim: the higher epoch is the later word. */
function meetOtherOwner(state: In<'withdrawing' | 'taking-back' | 'ended'>, theirs: number): Answer {
  if (theirs > state.epoch) return next({ name: 'leaving', epoch: theirs }, { name: 'discard' });
  return next(state, { name: 'send-abort', epoch: state.epoch });
}

/** Messages and observations that change nothing are taken silently; a wish that cannot be met is refused. */
function ignoreOrRefuse(state: SourceState, event: SourceEvent): Answer {
  if (event.name === 'cancel') {
    if (isSourceOver(state)) return refuse('over', `The migration is over: ${state.name}`);
    return refuse('committed', `The migration is ${state.name}: the VM belongs to the destination already`);
  }
  if (event.name === 'claim')
    return refuse('nothing_to_claim', `The VM is not in doubt: the migration is ${state.name}`);
  if (event.name === 'start' || event.name === 'release')
    return refuse('not_possible', `A migration that is ${state.name} cannot ${event.name}`);
  return next(state);
}

const next = (state: SourceState, ...effects: SourceEffect[]): Answer => ({ state, effects });

function endingOf(event: SourceEvent): Ending | undefined {
  switch (event.name) {
    case 'cancel':
      return { code: 'cancelled', message: 'It was cancelled' };
    case 'restarted':
      return { code: 'interrupted', message: 'The daemon at the source stopped' };
    case 'failed':
      return { code: 'failed', message: event.message };
    case 'vm-ended':
      return { code: 'vm_ended', message: 'The VM ended at the source' };
    case 'refused': {
      const message = event.problems.map((problem) => problem.message).join('; ');
      return { code: 'refused', message, problems: event.problems };
    }
    case 'rejected':
      return { code: 'rejected', message: event.reason };
    case 'gone':
      return { code: 'rejected', message: 'The destination gave it up' };
    case 'claim':
      return { code: 'claimed', message: event.reason };
    default:
      return undefined;
  }
}
