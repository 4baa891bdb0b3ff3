/**
 * Every interleaving of both halves of a migration: messages lost, late and out of order, daemons killed between any
 * two effects and started again from the journal, QEMUs that die, users who cancel. Checked in every state there is:
 *
 *   never two runners; never two owners
 *   never a source that has gone with pages that nobody else holds
 *   if nothing more fails, it always comes to an end with one owner and nothing left over
 *
 * And the checker itself is checked: rules with a known mistake in them must be found out.
 */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { destinationOwns, destinationTransition } from './destination-machine.ts';
import { firstWorld, type Rules, realRules, stepsFrom, type World } from './model-world.ts';
import { isRefused } from './protocol.ts';
import { isSourceOver, sourceOwns, sourceTransition } from './source-machine.ts';

for (const mode of ['precopy', 'postcopy', 'relayed'] as const) {
  test(`in ${mode} no failure gives two runners, and all is settled in the end`, (context) => {
    const isFine = (world: World) =>
      atMostOneRuns(world) && !isAbandoned(world) && !(mode === 'postcopy' && isBoundTooEarly(world));
    const found = explore({ ...realRules, mode }, isFine);
    context.diagnostic(`${found.states} states, ${found.steps} steps`);
    assert.equal(found.broken, undefined);
    assert.equal(found.stuck, undefined);
  });

  test(`in ${mode} a wrong claim is settled by the higher epoch`, (context) => {
    const found = explore({ ...realRules, mode, claims: true, inFlight: 1 }, () => true);
    context.diagnostic(`${found.states} states, ${found.steps} steps`);
    assert.equal(found.stuck, undefined);
  });
}

const mistakes: Record<string, Partial<Rules>> = {
  'a release while QEMU may still let the VM run by itself': { releaseAt: 'device' },
  'a destination that runs without a commit': {
    destination: (state, event) =>
      state.name === 'waiting' && event.name === 'loaded'
        ? { state: { name: 'owning', epoch: state.epoch }, effects: [{ name: 'resume' }] }
        : destinationTransition(state, event),
  },
  'a source that takes the VM back because nobody answers': {
    source: (state, event) =>
      state.name === 'switching' && event.name === 'retry'
        ? sourceTransition(state, { name: 'rejected', reason: 'no answer' })
        : sourceTransition(state, event),
  },
  'a destination that forgets that it rejected': {
    destination: (state, event) =>
      state.name === 'rejected' && event.name === 'retry'
        ? { state: { name: 'absent' }, effects: [] }
        : destinationTransition(state, event),
  },
};

test('the check finds a post-copy that is let go with the release', () => {
  const rules: Rules = {
    ...realRules,
    mode: 'postcopy',
    inFlight: 1,
    source: (state, event) => {
      const answer = sourceTransition(state, event);
      if (event.name !== 'release' || isRefused(answer)) return answer;
      return { ...answer, effects: [...answer.effects, { name: 'continue' }] };
    },
  };
  assert.ok(explore(rules, (world) => !isBoundTooEarly(world)).broken);
});

test('the check finds a source that exits before all is with relays', () => {
  const rules: Rules = {
    ...realRules,
    mode: 'relayed',
    inFlight: 1,
    source: (state, event) =>
      sourceTransition(state, event.name === 'running' ? { ...event, divided: true } : event),
  };
  assert.ok(explore(rules, (world) => !isAbandoned(world)).broken);
});

test('the check finds a destination that goes on beside an operator who has claimed its VM elsewhere', () => {
  const rules: Rules = {
    ...realRules,
    mode: 'relayed',
    claims: true,
    inFlight: 1,
    destination: (state, event) =>
      event.name === 'claimed' ? { state, effects: [] } : destinationTransition(state, event),
  };
  assert.ok(explore(rules, () => true).stuck);
});

for (const [mistake, rules] of Object.entries(mistakes)) {
  test(`the check finds ${mistake}`, () => {
    const { broken, stuck } = explore({ ...realRules, inFlight: 1, ...rules }, atMostOneRuns);
    assert.ok(broken ?? stuck);
  });
}

interface Exploration {
  states: number;
  steps: number;
  /** How a state came about that the invariant forbids. */
  broken?: string[];
  /** How a state came about from which good steps alone do not lead to a settled one. */
  stuck?: string[];
}

function explore(rules: Rules, invariant: (world: World) => boolean): Exploration {
  const index = new Map<string, number>();
  const worlds: World[] = [];
  const cameBy: { from: number; step: string }[] = [];
  const goodFrom: number[][] = [];
  let steps = 0;

  const visit = (world: World, from: number, step: string): number => {
    const key = JSON.stringify(world);
    const known = index.get(key);
    if (known !== undefined) return known;
    const number = worlds.length;
    index.set(key, number);
    worlds.push(world);
    cameBy.push({ from, step });
    goodFrom.push([]);
    return number;
  };
  const historyOf = (number: number): string[] => {
    const history = [JSON.stringify(worlds[number])];
    for (let at = number; at > 0; at = cameBy[at]!.from) history.unshift(cameBy[at]!.step);
    return history;
  };

  visit(firstWorld(), 0, 'start');
  for (let number = 0; number < worlds.length; number += 1) {
    const world = worlds[number]!;
    if (!invariant(world)) return { states: worlds.length, steps, broken: historyOf(number) };
    for (const step of stepsFrom(world, rules)) {
      steps += 1;
      const to = visit(step.world, number, step.name);
      // Backwards, for the question which states can reach a settled one.
      if (step.good) goodFrom[to]!.push(number);
    }
  }

  const canSettle = new Uint8Array(worlds.length);
  const open = worlds.flatMap((world, number) => (isSettled(world) ? [number] : []));
  for (const number of open) canSettle[number] = 1;
  while (open.length > 0) {
    for (const before of goodFrom[open.pop()!]!) {
      if (canSettle[before]) continue;
      canSettle[before] = 1;
      open.push(before);
    }
  }
  const stuck = canSettle.indexOf(0);
  return { states: worlds.length, steps, ...(stuck >= 0 && { stuck: historyOf(stuck) }) };
}

function atMostOneRuns({ source, destination, sourceQemu, destinationQemu }: World): boolean {
  const runsAtSource = ['running', 'sending'].includes(sourceQemu);
  const runsAtDestination = destinationQemu === 'running';
  const owners = Number(sourceOwns(source.state)) + Number(destinationOwns(destination.state));
  const runsUnowned =
    (runsAtSource && !sourceOwns(source.state)) || (runsAtDestination && !destinationOwns(destination.state));
  return !(runsAtSource && runsAtDestination) && owners <= 1 && !runsUnowned;
}

/** A QEMU that is bound to post-copy at a destination that has not taken the commit would be lost for nothing. */
function isBoundTooEarly({ sourceQemu, destination: { state } }: World): boolean {
  return sourceQemu === 'sent' && state.name === 'waiting' && !state.committed;
}

/** The source has gone with pages that nobody else holds. */
const isAbandoned = ({ sourceQemu, pagesMissing, isDivided }: World): boolean =>
  sourceQemu === 'removed' && pagesMissing && !isDivided;

/** Both halves are over, one side owns, and the other has nothing left. */
function isSettled(world: World): boolean {
  const { source, destination, sourceQemu, destinationQemu } = world;
  if (!isSourceOver(source.state) || source.todo.length + destination.todo.length > 0) return false;
  if (source.state.name === 'moved' && world.isClaimed)
    return destination.state.name === 'absent' && sourceQemu === 'removed' && destinationQemu === 'none';
  if (source.state.name === 'moved')
    return destination.state.name === 'settled' && sourceQemu === 'removed' && !world.pagesMissing;
  return (
    destination.state.name === 'absent' &&
    destinationQemu === 'none' &&
    (sourceQemu === 'running' || sourceQemu === 'crashed')
  );
}
