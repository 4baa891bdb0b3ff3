/**
 * Only for tests: two daemons, two QEMUs and the link between them, small enough to visit every state there is. A
 * step is one effect, one message delivered or lost, one daemon killed or started again, one QEMU ended, or one
 * wish of the user. QEMU here has the habits of the real one, also the bad one: a migration that fails after its
 * pause lets the VM run again without asking.
 */
import {
  absentDestination,
  type DestinationEffect,
  type DestinationEvent,
  type DestinationState,
  destinationTransition,
} from './destination-machine.ts';
import { isRefused, type Ticket } from './protocol.ts';
import {
  plannedSource,
  type SourceEffect,
  type SourceEvent,
  type SourceState,
  sourceTransition,
} from './source-machine.ts';

/**
 * `sending` runs and migrates; `device` is paused and lets the VM run by itself if the stream breaks; `held` and
 * `sent` stay paused whatever happens.
 */
type SourceQemu = 'running' | 'sending' | 'device' | 'held' | 'sent' | 'crashed' | 'removed';
type DestinationQemu = 'none' | 'waiting' | 'loaded' | 'running' | 'crashed';

export interface World {
  source: { state: SourceState; up: boolean; copying: boolean; todo: SourceEffect[] };
  destination: { state: DestinationState; up: boolean; todo: DestinationEffect[] };
  sourceQemu: SourceQemu;
  destinationQemu: DestinationQemu;
  /** The last state is `whole` when every byte of it is on its way; `cut` streams never heal in this world. */
  stream: 'none' | 'flowing' | 'whole' | 'cut';
  pagesMissing: boolean;
  /** Relays hold what is missing, and a file of the destination's says where. */
  isDivided: boolean;
  /** An operator has claimed the VM at its custodian. */
  isClaimed: boolean;
  /** In flight, without order. */
  toDestination: DestinationEvent[];
  toSource: SourceEvent[];
}

export interface Rules {
  source: typeof sourceTransition;
  destination: typeof destinationTransition;
  /** `relayed`: a pre-copy to the source QEMU, a post-copy to the destination's, and relays for what is missing. */
  mode: 'precopy' | 'postcopy' | 'relayed';
  /** When the driver says `release` in pre-copy: `device` is the mistake that the checker must find. */
  releaseAt: 'sent' | 'device';
  /** Operators who claim without knowing. */
  claims: boolean;
  /** Messages in flight in each direction. */
  inFlight: number;
}

export const realRules: Rules = {
  source: sourceTransition,
  destination: destinationTransition,
  mode: 'precopy',
  releaseAt: 'sent',
  claims: false,
  inFlight: 2,
};

export interface Step {
  /** `good` steps are those that happen when nothing fails and nobody interferes. */
  good: boolean;
  name: string;
  world: World;
}

const ticket: Ticket = { secret: 's', expiresAt: 'later' };

export const firstWorld = (): World => ({
  source: { state: plannedSource(1), up: true, copying: false, todo: [] },
  destination: { state: absentDestination, up: true, todo: [] },
  sourceQemu: 'running',
  destinationQemu: 'none',
  stream: 'none',
  pagesMissing: false,
  isDivided: false,
  isClaimed: false,
  toDestination: [],
  toSource: [],
});

/** Every step that the world can take. */
export function stepsFrom(world: World, rules: Rules): Step[] {
  const steps: Step[] = [];
  const add = (name: string, good: boolean, change: (copy: World) => void): void => {
    const copy: World = structuredCloneOf(world);
    change(copy);
    steps.push({ name, good, world: copy });
  };
  addSourceSteps(world, rules, add);
  addDestinationSteps(world, rules, add);
  addQemuSteps(world, rules, add);
  for (const [index, message] of world.toDestination.entries()) {
    const take = (copy: World) => copy.toDestination.splice(index, 1)[0]!;
    add(`lose ${message.name}`, false, take);
    if (world.destination.up && world.destination.todo.length === 0)
      add(`deliver ${message.name}`, true, (copy) => tellDestination(copy, rules, take(copy)));
  }
  for (const [index, message] of world.toSource.entries()) {
    const take = (copy: World) => copy.toSource.splice(index, 1)[0]!;
    add(`lose ${message.name}`, false, take);
    if (world.source.up && world.source.todo.length === 0)
      add(`deliver ${message.name}`, true, (copy) => tellSource(copy, rules, take(copy)));
  }
  return steps;
}

type Add = (name: string, good: boolean, change: (copy: World) => void) => void;

function addSourceSteps(world: World, rules: Rules, add: Add): void {
  const { source, sourceQemu } = world;
  const tell = (event: SourceEvent, good: boolean): void =>
    add(`source: ${event.name}`, good, (copy) => tellSource(copy, rules, event));
  if (!source.up) {
    add('source daemon starts', true, (copy) => {
      copy.source.up = true;
      tellSource(copy, rules, { name: 'restarted' });
    });
    return;
  }
  add('source daemon dies', false, (copy) => {
    copy.source = { ...copy.source, up: false, copying: false, todo: [] };
    breakStream(copy);
  });
  if (source.todo.length > 0) {
    add(`source does ${source.todo[0]!.name}`, true, (copy) => {
      const event = runSourceEffect(copy, copy.source.todo.shift()!, rules);
      if (event) tellSource(copy, rules, event);
    });
    add(`source does ${source.todo[0]!.name} and dies`, false, (copy) => {
      runSourceEffect(copy, copy.source.todo.shift()!, rules);
      copy.source = { ...copy.source, up: false, copying: false, todo: [] };
      breakStream(copy);
    });
    return;
  }
  const { name } = source.state;
  if (name === 'planned') tell({ name: 'start' }, true);
  if (['preparing', 'withdrawing', 'switching', 'serving'].includes(name)) tell({ name: 'retry' }, true);
  if (['planned', 'preparing', 'copying'].includes(name)) tell({ name: 'cancel' }, false);
  const hasFailed = source.copying && (sourceQemu === 'running' || world.stream === 'cut');
  if (['preparing', 'copying'].includes(name)) tell({ name: 'failed', message: '' }, hasFailed);
  if (name === 'withdrawing') tell({ name: 'give-up' }, false);
  if (rules.claims && name === 'switching') tell({ name: 'claim', reason: '' }, false);
  const isReleasable = rules.mode === 'postcopy' ? sourceQemu === 'held' : sourceQemu === rules.releaseAt;
  if (name === 'copying' && source.copying && isReleasable) tell({ name: 'release' }, true);
  if (sourceQemu === 'crashed' && ['preparing', 'copying', 'serving'].includes(name))
    tell({ name: 'vm-ended' }, true);
}

function addDestinationSteps(world: World, rules: Rules, add: Add): void {
  const { destination, destinationQemu } = world;
  const tell = (event: DestinationEvent, good: boolean): void =>
    add(`destination: ${event.name}`, good, (copy) => tellDestination(copy, rules, event));
  if (!destination.up) {
    add('destination daemon starts', true, (copy) => {
      copy.destination.up = true;
      const found = destinationQemu === 'none' || destinationQemu === 'crashed' ? 'gone' : destinationQemu;
      const { pagesMissing, isDivided: divided } = copy;
      tellDestination(copy, rules, { name: 'restarted', found, complete: !pagesMissing, divided });
    });
    return;
  }
  const die = (copy: World): void => {
    copy.destination = { ...copy.destination, up: false, todo: [] };
    if (copy.destinationQemu === 'waiting') breakStream(copy, true);
  };
  add('destination daemon dies', false, die);
  if (destination.todo.length > 0) {
    for (const goesWell of [true, false]) {
      const effect = destination.todo[0]!;
      if (!goesWell && effect.name !== 'make' && effect.name !== 'resume') continue;
      add(`destination does ${effect.name}${goesWell ? '' : ', which fails'}`, goesWell, (copy) => {
        const event = runDestinationEffect(copy, copy.destination.todo.shift()!, rules, goesWell);
        if (event) tellDestination(copy, rules, event);
      });
      add(`destination does ${effect.name} and dies`, false, (copy) => {
        runDestinationEffect(copy, copy.destination.todo.shift()!, rules, goesWell);
        die(copy);
      });
    }
    return;
  }
  const { state } = destination;
  const isGone = destinationQemu === 'crashed' || destinationQemu === 'none';
  if (state.name === 'waiting') {
    if (destinationQemu === 'loaded' && state.loaded === 'no')
      tell({ name: 'loaded', complete: !world.pagesMissing }, true);
    if (isGone) tell({ name: 'vm-ended' }, true);
    tell({ name: 'expired' }, false);
    if (rules.claims) tell({ name: 'claim', reason: '' }, false);
  }
  if (state.name === 'owning' && isGone) tell({ name: 'vm-ended' }, true);
  // Its disk is still to come.
  if (state.name === 'owning' && isGone && rules.mode === 'relayed')
    tell({ name: 'divided', hasEnded: true }, true);
  if (state.name === 'arrived' && !state.complete) {
    if (isGone) tell({ name: 'vm-ended' }, true);
    else if (!world.pagesMissing) tell({ name: 'completed' }, true);
  }
  // Also before it is known that the VM runs.
  const mayDivide =
    state.name === 'owning' || (state.name === 'arrived' && !state.complete && !state.divided);
  if (mayDivide && world.isDivided) tell({ name: 'divided' }, true);
  if (state.name === 'merging' && (isGone || !world.pagesMissing))
    tell({ name: isGone ? 'vm-ended' : 'completed' }, true);
  const mayBeClaimed = isClaimable(state);
  // The custodian has it only from a destination that the source knows to run it.
  const sourceKnows = ['serving', 'leaving', 'moved'].includes(world.source.state.name);
  if (rules.claims && rules.mode === 'relayed' && mayBeClaimed && sourceKnows && !world.isClaimed)
    add('custodian is claimed', false, (copy) => {
      copy.isClaimed = true;
    });
  if (mayBeClaimed && world.isClaimed) tell({ name: 'claimed', epoch: 9 }, true);
  if (['waiting', 'arrived', 'rejected', 'yielded'].includes(state.name)) tell({ name: 'retry' }, true);
}

function addQemuSteps(world: World, rules: Rules, add: Add): void {
  const { sourceQemu, destinationQemu, stream } = world;
  if (sourceQemu !== 'crashed' && sourceQemu !== 'removed')
    add('source QEMU dies', false, (copy) => {
      copy.sourceQemu = 'crashed';
      if (copy.stream === 'flowing') copy.stream = 'cut';
    });
  if (destinationQemu !== 'none' && destinationQemu !== 'crashed')
    add('destination QEMU dies', false, (copy) => {
      copy.destinationQemu = 'crashed';
      copy.pagesMissing = false;
      breakStream(copy, true);
    });
  if (stream === 'flowing') add('link is lost', false, (copy) => breakStream(copy));
  if (sourceQemu === 'sending' && stream === 'flowing')
    add('source QEMU pauses', true, (copy) => {
      copy.sourceQemu = rules.mode === 'postcopy' ? 'held' : 'device';
    });
  const goesOn = rules.releaseAt === 'sent' || world.source.state.name !== 'copying';
  if (sourceQemu === 'device' && stream === 'flowing' && goesOn)
    add('source QEMU has sent all', true, (copy) => {
      copy.sourceQemu = 'sent';
      copy.stream = 'whole';
    });
  // The last byte is out, the end of it is not: QEMU still takes a break for a failure.
  if (sourceQemu === 'device' && stream === 'flowing' && goesOn)
    add('source QEMU has sent all, then the stream breaks', false, (copy) => {
      copy.sourceQemu = 'running';
      copy.stream = 'whole';
    });
  if (destinationQemu === 'waiting' && stream === 'whole')
    add('destination QEMU loads', true, (copy) => {
      copy.destinationQemu = 'loaded';
      copy.pagesMissing = rules.mode !== 'precopy';
    });
  if (destinationQemu === 'waiting' && stream === 'cut')
    add('destination QEMU ends for a broken stream', true, (copy) => {
      copy.destinationQemu = 'crashed';
    });
  const areUp = world.source.up && world.destination.up;
  const isServed = sourceQemu === 'sent' && areUp;
  const canDivide = rules.mode === 'relayed' && world.pagesMissing && !world.isDivided && isServed;
  if (canDivide && ['loaded', 'running'].includes(destinationQemu))
    add('what is missing is with relays', true, (copy) => {
      copy.isDivided = true;
    });
  const isMerged = world.isDivided && world.destination.up;
  if (world.pagesMissing && destinationQemu === 'running' && (isServed || isMerged))
    add('last page arrives', true, (copy) => {
      copy.pagesMissing = false;
    });
}

/** What is not yet loaded is lost; a QEMU that can, lets its VM run again. */
function breakStream(world: World, alsoWhole = false): void {
  if (world.stream === 'flowing' || (alsoWhole && world.stream === 'whole')) world.stream = 'cut';
  // With the daemon its buffers die, so even a stream that was whole may never arrive.
  if (world.stream !== 'cut') return;
  if (world.sourceQemu === 'sending' || world.sourceQemu === 'device') world.sourceQemu = 'running';
}

function runSourceEffect(world: World, effect: SourceEffect, rules: Rules): SourceEvent | undefined {
  const isAlive = world.sourceQemu !== 'crashed';
  switch (effect.name) {
    case 'send-prepare':
      return send(world.toDestination, { name: 'prepare', epoch: 1 }, rules);
    case 'send-commit':
      return send(world.toDestination, { name: 'commit', epoch: effect.epoch }, rules);
    case 'send-abort':
      return send(world.toDestination, { name: 'abort', epoch: effect.epoch }, rules);
    case 'send-pages-lost':
      return send(world.toDestination, { name: 'pages-lost' }, rules);
    case 'send-done':
      return send(world.toDestination, { name: 'done' }, rules);
    case 'copy':
      world.source.copying = true;
      if (isAlive) world.sourceQemu = 'sending';
      world.stream = 'flowing';
      return undefined;
    case 'continue':
      // The driver sees that its stream has ended, and then leaves QEMU where it can be taken back.
      if (world.sourceQemu !== 'held' || world.stream !== 'flowing') return undefined;
      world.sourceQemu = 'sent';
      world.stream = 'whole';
      return undefined;
    case 'undo':
    case 'take-back':
      world.source.copying = false;
      if (world.stream !== 'none') world.stream = 'cut';
      // There is no way back out of post-copy.
      if (isAlive)
        world.sourceQemu = rules.mode === 'postcopy' && world.sourceQemu === 'sent' ? 'crashed' : 'running';
      return { name: effect.name === 'undo' ? 'undone' : 'taken-back' };
    case 'discard':
      world.sourceQemu = 'removed';
      return { name: 'discarded' };
    case 'serve':
    case 'tell-operator':
      return undefined;
  }
}

function runDestinationEffect(
  world: World,
  effect: DestinationEffect,
  rules: Rules,
  goesWell: boolean,
): DestinationEvent | undefined {
  switch (effect.name) {
    case 'make':
      world.destinationQemu = 'waiting';
      return goesWell ? { name: 'made' } : { name: 'make-failed', problems: [] };
    case 'send-prepared':
      return send(world.toSource, { name: 'prepared', ticket }, rules);
    case 'send-refused':
      return send(world.toSource, { name: 'refused', problems: [] }, rules);
    case 'send-committed':
      return send(world.toSource, { name: 'committed', epoch: effect.epoch }, rules);
    case 'send-running':
      return send(world.toSource, { name: 'running', epoch: effect.epoch, complete: effect.complete }, rules);
    case 'send-rejected':
      return send(world.toSource, { name: 'rejected', reason: '' }, rules);
    case 'send-gone':
      return send(world.toSource, { name: 'gone' }, rules);
    case 'send-ask':
      return send(world.toSource, { name: 'ask' }, rules);
    case 'send-unknown':
      return send(world.toSource, { name: 'unknown' }, rules);
    case 'resume':
      if (world.destinationQemu !== 'loaded') return { name: 'vm-ended' };
      if (!goesWell) return { name: 'resume-refused', message: '' };
      world.destinationQemu = 'running';
      return { name: 'resumed', complete: !world.pagesMissing, divided: world.isDivided };
    case 'recover':
    case 'tidy':
      return undefined;
    case 'end-vm':
      world.destinationQemu = 'crashed';
      world.pagesMissing = false;
      return { name: 'vm-ended' };
    case 'discard':
      world.destinationQemu = 'none';
      world.pagesMissing = false;
      world.isDivided = false;
      breakStream(world, true);
      return { name: 'discarded' };
  }
}

/** A network that is full loses what comes; the same message twice is one. */
function send<M extends { name: string }>(network: M[], message: M, rules: Rules): undefined {
  if (network.length >= rules.inFlight) return;
  if (network.some((other) => JSON.stringify(other) === JSON.stringify(message))) return;
  network.push(message);
  network.sort((a, b) => (a.name < b.name ? -1 : 1));
}

function tellSource(world: World, rules: Rules, event: SourceEvent): void {
  const answer = rules.source(world.source.state, event);
  if (isRefused(answer)) return;
  world.source.state = withoutWords(answer.state);
  world.source.todo.push(...answer.effects);
}

function tellDestination(world: World, rules: Rules, event: DestinationEvent): void {
  // Before a VM counts as whole, or as ended, the custodian is asked.
  const isAsked = ['completed', 'vm-ended', 'restarted'].includes(event.name);
  const isBeaten = world.isClaimed && isAsked && isClaimable(world.destination.state);
  const told: DestinationEvent = isBeaten ? { name: 'claimed', epoch: 9 } : event;
  const answer = rules.destination(world.destination.state, told);
  if (isRefused(answer)) return;
  world.destination.state = withoutWords(answer.state);
  world.destination.todo.push(...answer.effects.map(withoutWords));
}

const isClaimable = (state: DestinationState): boolean =>
  (state.name === 'arrived' && !state.complete) || state.name === 'merging';

/** Reasons are for people: states that differ in nothing else are one. */
function withoutWords<State extends { name: string }>(state: State): State {
  if ('ending' in state) return { ...state, ending: { code: 'failed', message: '' } };
  return 'reason' in state ? { ...state, reason: '' } : state;
}

/** States, effects and messages are never changed in place, so they may be shared. */
const structuredCloneOf = (world: World): World => ({
  ...world,
  source: { ...world.source, todo: [...world.source.todo] },
  destination: { ...world.destination, todo: [...world.destination.todo] },
  toDestination: [...world.toDestination],
  toSource: [...world.toSource],
});
