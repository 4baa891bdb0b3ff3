/**
 * The destination's half of a migration, pure: see `source-machine.ts` for the other half.
 *
 *   absent    --prepare--> reserved
 *   reserved  --made--> waiting
 *   reserved  --make-failed, abort, expired, restarted--> rejecting
 *   waiting   --loaded, commit, restarted, claim--> owning   both the VM's state and the commit are here
 *   waiting   --failed, vm-ended, abort, expired, restarted--> rejecting
 *   owning    --resumed, vm-ended, restarted--> arrived      the VM runs here
 *   owning    --divided--> arrived                           it has ended, and its disk is still with relays
 *   owning    --resume-refused, abort--> rejecting
 *   arrived   --abort--> rejecting                           a higher epoch was claimed at the source
 *   arrived   --done--> settled
 *   arrived   --done--> merging                              relayed: what is missing is with relays, the source is gone
 *   merging   --completed, vm-ended, restarted--> settled
 *   arrived   --claimed--> yielding                          an operator's claim at the custodian, with a higher epoch
 *   merging   --claimed--> yielding
 *   yielding  --discarded--> yielded
 *   yielded   --done--> absent
 *   rejecting --discarded--> rejected
 *   rejected  --done--> absent
 *
 * Invariants: the VM's vCPUs run here only from `owning` on. `rejecting` is journalled before the source hears
 * `rejected`, and no way leads back from it. A record goes only when the source said `done`: a source in doubt must
 * never meet a destination that has forgotten. Where there is a custodian, none of the events that lead to `settled`, or
 * to an `arrived` that is complete, comes before its word that it will not give the VM to anybody.
 */
import { type Next, type Problem, type Refused, refuse } from './protocol.ts';

/** `epoch` is the one that the destination owns, or would own. */
export type DestinationState =
  | { name: 'absent' }
  | { name: 'reserved'; epoch: number }
  | { name: 'waiting'; epoch: number; loaded: Loaded; committed: boolean }
  | { name: 'owning'; epoch: number; claimed?: string }
  /** `complete`: no page is missing any more (or the VM has ended, and needs none). */
  /** `divided`: what is missing is held by relays, and where is in a file of ours: the source is not needed. */
  | { name: 'arrived'; epoch: number; complete: boolean; divided?: true }
  /** The source holds nothing any more, and the VM is not whole yet. */
  | { name: 'merging'; epoch: number }
  /** Somebody else runs the VM by this higher epoch. */
  | { name: 'yielding'; epoch: number }
  | { name: 'yielded'; epoch: number }
  | { name: 'rejecting'; reason: string }
  | { name: 'rejected'; reason: string }
  | { name: 'settled'; epoch: number };

/** Post-copy loads all but the pages that the source still serves. */
export type Loaded = 'no' | 'but-for-pages' | 'whole';

/** What a daemon that starts again found of the VM's QEMU. */
export type Found = 'gone' | 'waiting' | 'loaded' | 'running';

export type DestinationEvent =
  // From the source.
  | { name: 'prepare'; epoch: number }
  | { name: 'commit'; epoch: number }
  | { name: 'abort'; epoch: number }
  | { name: 'pages-lost' }
  | { name: 'done' }
  // From the work.
  | { name: 'made' }
  | { name: 'make-failed'; problems: Problem[] }
  /** The VM's state is whole here (in post-copy: but for pages) and its vCPUs stand still. */
  | { name: 'loaded'; complete: boolean }
  | { name: 'failed'; message: string }
  | { name: 'resumed'; complete: boolean; divided?: boolean }
  /** What is missing is held by relays, and where is written down. `hasEnded`: the VM has, and lacks only disk. */
  | { name: 'divided'; hasEnded?: boolean }
  /** QEMU said no, and the vCPUs have not run. */
  | { name: 'resume-refused'; message: string }
  | { name: 'completed' }
  | { name: 'discarded' }
  /** The word of the custodian, which runs the VM itself. */
  | { name: 'claimed'; epoch: number }
  | { name: 'vm-ended' }
  /** Nobody came with the ticket in time. */
  | { name: 'expired' }
  | { name: 'restarted'; found: Found; complete: boolean; divided?: boolean }
  | { name: 'retry' }
  | { name: 'claim'; reason: string };

export type DestinationEffect =
  /** Disk, QEMU, sockets; ends with `made` or `make-failed`. */
  | { name: 'make' }
  /** With the ticket, whose secret lives only in the memory of the daemon that made it. */
  | { name: 'send-prepared' }
  | { name: 'send-refused'; problems: Problem[] }
  | { name: 'send-committed'; epoch: number }
  | { name: 'send-running'; epoch: number; complete: boolean; divided?: true }
  | { name: 'send-rejected'; reason: string }
  | { name: 'send-gone' }
  | { name: 'send-ask' }
  | { name: 'send-unknown' }
  /** Close the disk's door to the source and let the VM run; ends with `resumed` or `resume-refused`. */
  | { name: 'resume' }
  /** Nothing is missing any more: QEMU's settings for an incoming VM go back. */
  | { name: 'tidy' }
  /** See to it that what is missing comes, over a new session if the old one is lost. */
  | { name: 'recover' }
  /**
   * End the VM, whose missing pages will never come; it stays here as crashed. Ends with `vm-ended`, or with `completed`
   * if none is missing after all.
   */
  | { name: 'end-vm' }
  /** Undo every step of `make`; ends with `discarded`. */
  | { name: 'discard' };

type Answer = Next<DestinationState, DestinationEffect> | Refused;

export const absentDestination: DestinationState = { name: 'absent' };

export const isDestinationOver = (state: DestinationState): boolean =>
  state.name === 'absent' || state.name === 'settled';

/** Whether the VM belongs to this side: whether its vCPUs may run here. */
export const destinationOwns = (state: DestinationState): boolean =>
  ['owning', 'arrived', 'merging', 'settled'].includes(state.name);

export function destinationTransition(state: DestinationState, event: DestinationEvent): Answer {
  switch (state.name) {
    case 'absent':
      return whenAbsent(state, event);
    case 'reserved':
      return whileReserved(state, event);
    case 'waiting':
      return whileWaiting(state, event);
    case 'owning':
      return whileOwning(state, event);
    case 'arrived':
      return whenArrived(state, event);
    case 'merging':
      return whileMerging(state, event);
    case 'yielding':
      return whileYielding(state, event);
    case 'yielded':
      return whenYielded(state, event);
    case 'rejecting':
      return whileRejecting(state, event);
    case 'rejected':
      return whenRejected(state, event);
    case 'settled':
      return ignoreOrRefuse(state, event);
  }
}

type In<Name extends DestinationState['name']> = Extract<DestinationState, { name: Name }>;

function whenAbsent(state: In<'absent'>, event: DestinationEvent): Answer {
  switch (event.name) {
    case 'prepare':
      return next({ name: 'reserved', epoch: event.epoch + 1 }, { name: 'make' });
    case 'commit':
      return next(state, { name: 'send-unknown' });
    case 'abort':
      return next(state, { name: 'send-gone' });
    default:
      return ignoreOrRefuse(state, event);
  }
}

function whileReserved(state: In<'reserved'>, event: DestinationEvent): Answer {
  switch (event.name) {
    case 'made':
      return next(
        { name: 'waiting', epoch: state.epoch, loaded: 'no', committed: false },
        { name: 'send-prepared' },
      );
    case 'make-failed': {
      const reason = event.problems.map((problem) => problem.message).join('; ');
      return next(
        { name: 'rejecting', reason },
        { name: 'discard' },
        { name: 'send-refused', problems: event.problems },
      );
    }
    case 'abort':
    case 'expired':
    case 'restarted':
      return reject(reasonOf(event));
    default:
      return ignoreOrRefuse(state, event);
  }
}

function whileWaiting(state: In<'waiting'>, event: DestinationEvent): Answer {
  switch (event.name) {
    case 'loaded':
      return ownIfReady({ ...state, loaded: howFar(event) });
    case 'commit':
      if (event.epoch !== state.epoch) return next(state);
      // In post-copy the source sends the last state only after this word.
      return ownIfReady({ ...state, committed: true }, { name: 'send-committed', epoch: state.epoch });
    case 'failed':
    case 'vm-ended':
    case 'abort':
    case 'expired':
      return reject(reasonOf(event));
    case 'restarted':
      // The sessions died with the daemon, so what had not been loaded by then will never be.
      if (event.found !== 'loaded') return reject(reasonOf(event));
      return ownIfReady({ ...state, loaded: howFar(event) }, { name: 'send-ask' });
    case 'prepare':
      return next(state, { name: 'send-prepared' });
    case 'retry':
      return next(state, { name: 'send-ask' });
    case 'claim':
      if (state.loaded !== 'whole')
        return refuse('nothing_to_claim', 'The memory of the VM is not here, or not all of it');
      // Above the source's own next epoch, so that a source that comes back yields.
      return next({ name: 'owning', epoch: state.epoch + 2, claimed: event.reason }, { name: 'resume' });
    default:
      return ignoreOrRefuse(state, event);
  }
}

function whileOwning(state: In<'owning'>, event: DestinationEvent): Answer {
  const { epoch } = state;
  switch (event.name) {
    case 'resumed':
      return arrive(epoch, event);
    case 'resume-refused':
      return reject(event.message);
    case 'vm-ended':
      // It may have run before it ended, so it is ours, as a crashed VM.
      return arrive(epoch, whole);
    case 'divided':
      // One that lives is yet to be let run, after a restart of the daemon.
      return event.hasEnded ? divide(epoch) : next(state);
    case 'restarted':
      if (event.found === 'running') return arrive(epoch, event);
      if (event.found === 'gone') return arrive(epoch, whole);
      return next(state, { name: 'resume' });
    case 'abort':
      return event.epoch > epoch ? reject(reasonOf(event)) : next(state);
    default:
      return ignoreOrRefuse(state, event);
  }
}

function whenArrived(state: In<'arrived'>, event: DestinationEvent): Answer {
  const { epoch, complete, divided } = state;
  switch (event.name) {
    case 'completed':
    case 'vm-ended':
      return complete ? next(state) : arrive(epoch, whole);
    case 'divided':
      return complete || divided ? next(state) : divide(epoch);
    case 'pages-lost':
      if (divided) return next(state, running(state));
      return complete ? next(state) : next(state, { name: 'end-vm' });
    case 'restarted':
      if (complete || event.complete || event.found === 'gone') return arrive(epoch, whole);
      return arrive(epoch, { complete: false, divided: divided || event.divided });
    case 'commit':
    case 'retry':
      return next(state, running(state));
    case 'abort':
      return event.epoch > epoch ? reject(reasonOf(event)) : next(state, running(state));
    case 'claimed':
      return complete ? next(state) : yieldTo(event.epoch);
    case 'done':
      if (divided) return next({ name: 'merging', epoch });
      // A source that is done serves no pages any more.
      return complete ? next({ name: 'settled', epoch }) : next(state, { name: 'end-vm' });
    default:
      return ignoreOrRefuse(state, event);
  }
}

/** Nobody else has a part in it any more. */
function whileMerging(state: In<'merging'>, event: DestinationEvent): Answer {
  const settled = (): Answer => next({ name: 'settled', epoch: state.epoch }, { name: 'tidy' });
  switch (event.name) {
    case 'completed':
    case 'vm-ended':
      return settled();
    case 'restarted':
      return event.complete || event.found === 'gone' ? settled() : next(state, { name: 'recover' });
    case 'claimed':
      return yieldTo(event.epoch);
    default:
      return ignoreOrRefuse(state, event);
  }
}

function whileYielding(state: In<'yielding'>, event: DestinationEvent): Answer {
  switch (event.name) {
    case 'discarded':
      return next({ name: 'yielded', epoch: state.epoch }, runsElsewhere(state.epoch));
    case 'restarted':
      return yieldTo(state.epoch);
    default:
      return ignoreOrRefuse(state, event);
  }
}

/** A source that is still there need not serve anybody: it may go. */
function whenYielded(state: In<'yielded'>, event: DestinationEvent): Answer {
  switch (event.name) {
    case 'retry':
    case 'restarted':
    case 'commit':
    case 'abort':
      return next(state, runsElsewhere(state.epoch));
    case 'done':
      return next(absentDestination);
    default:
      return ignoreOrRefuse(state, event);
  }
}

function whileRejecting(state: In<'rejecting'>, event: DestinationEvent): Answer {
  switch (event.name) {
    case 'discarded':
      return next({ name: 'rejected', reason: state.reason }, { name: 'send-gone' });
    case 'commit':
    case 'prepare':
      return next(state, { name: 'send-rejected', reason: state.reason });
    case 'restarted':
      return reject(state.reason);
    default:
      return ignoreOrRefuse(state, event);
  }
}

function whenRejected(state: In<'rejected'>, event: DestinationEvent): Answer {
  switch (event.name) {
    case 'commit':
    case 'prepare':
      return next(state, { name: 'send-rejected', reason: state.reason });
    case 'abort':
    case 'retry':
    case 'restarted':
      return next(state, { name: 'send-gone' });
    case 'done':
      return next(absentDestination);
    default:
      return ignoreOrRefuse(state, event);
  }
}

function ownIfReady(state: In<'waiting'>, ...otherwise: DestinationEffect[]): Answer {
  if (state.loaded === 'no' || !state.committed) return next(state, ...otherwise);
  return next({ name: 'owning', epoch: state.epoch }, { name: 'resume' });
}

const howFar = ({ complete }: { complete: boolean }): Loaded => (complete ? 'whole' : 'but-for-pages');

/** Nothing of it is missing, or nothing of it is needed. */
const whole = { complete: true };

function arrive(
  epoch: number,
  { complete, divided }: { complete: boolean; divided?: boolean | undefined },
): Answer {
  if (!complete && divided) return divide(epoch);
  const state: In<'arrived'> = { name: 'arrived', epoch, complete };
  return next(state, running(state), complete ? { name: 'tidy' } : { name: 'recover' });
}

function divide(epoch: number): Answer {
  const state: In<'arrived'> = { name: 'arrived', epoch, complete: false, divided: true };
  return next(state, running(state), { name: 'recover' });
}

const yieldTo = (epoch: number): Answer => next({ name: 'yielding', epoch }, { name: 'discard' });

const runsElsewhere = (epoch: number): DestinationEffect => ({ name: 'send-running', epoch, complete: true });

const reject = (reason: string): Answer =>
  next({ name: 'rejecting', reason }, { name: 'send-rejected', reason }, { name: 'discard' });

const running = ({ epoch, complete, divided }: In<'arrived'>): DestinationEffect => ({
  name: 'send-running',
  epoch,
  complete,
  ...(divided && { divided }),
});

function ignoreOrRefuse(state: DestinationState, event: DestinationEvent): Answer {
  if (event.name === 'claim')
    return refuse('nothing_to_claim', `There is nothing to claim here: the migration is ${state.name}`);
  return next(state);
}

const next = (state: DestinationState, ...effects: DestinationEffect[]): Answer => ({ state, effects });

function reasonOf(event: DestinationEvent): string {
  switch (event.name) {
    case 'failed':
      return event.message;
    case 'vm-ended':
      return 'QEMU at the destination ended before it had the VM';
    case 'abort':
      return 'The source withdrew it';
    case 'expired':
      return 'Nobody came with the ticket in time';
    default:
      return 'The daemon at the destination stopped';
  }
}
