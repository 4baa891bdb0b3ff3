/** The diagrams on top of the two machines are what the code does: every arrow, and no other. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import {
  type DestinationEvent,
  type DestinationState,
  destinationTransition,
} from './destination-machine.ts';
import { isRefused, type Next, type Refused } from './protocol.ts';
import { type SourceEvent, type SourceState, sourceOwns, sourceTransition } from './source-machine.ts';

const ticket = { secret: 's', expiresAt: 'later' };
const ending = { code: 'failed', message: '' } as const;

const sourceStates: SourceState[] = [
  { name: 'planned', epoch: 1 },
  { name: 'preparing', epoch: 1 },
  { name: 'copying', epoch: 1, ticket },
  { name: 'undoing', epoch: 1, ending },
  { name: 'withdrawing', epoch: 1, ending },
  { name: 'switching', epoch: 2 },
  { name: 'serving', epoch: 2 },
  { name: 'leaving', epoch: 2 },
  { name: 'taking-back', epoch: 3, ending },
  { name: 'moved', epoch: 2 },
  { name: 'ended', epoch: 1, ending },
];
const sourceEvents: SourceEvent[] = [
  ...(
    [
      'start',
      'cancel',
      'release',
      'undone',
      'taken-back',
      'discarded',
      'vm-ended',
      'cannot-serve',
      'restarted',
      'retry',
      'give-up',
      'gone',
      'ask',
      'unknown',
    ] as const
  ).map((name) => ({ name })),
  { name: 'claim', reason: '' },
  { name: 'failed', message: '' },
  { name: 'prepared', ticket },
  { name: 'refused', problems: [] },
  { name: 'rejected', reason: '' },
  { name: 'running', epoch: 9, complete: true },
  { name: 'running', epoch: 9, complete: false },
  { name: 'committed', epoch: 2 },
  { name: 'running', epoch: 0, complete: true },
];

const destinationStates: DestinationState[] = [
  { name: 'absent' },
  { name: 'reserved', epoch: 2 },
  { name: 'waiting', epoch: 2, loaded: 'no', committed: true },
  { name: 'waiting', epoch: 2, loaded: 'whole', committed: false },
  { name: 'owning', epoch: 2 },
  { name: 'arrived', epoch: 2, complete: true },
  { name: 'arrived', epoch: 2, complete: false },
  { name: 'arrived', epoch: 2, complete: false, divided: true },
  { name: 'merging', epoch: 2 },
  { name: 'yielding', epoch: 9 },
  { name: 'yielded', epoch: 9 },
  { name: 'rejecting', reason: '' },
  { name: 'rejected', reason: '' },
  { name: 'settled', epoch: 2 },
];
const destinationEvents: DestinationEvent[] = [
  ...(
    [
      'pages-lost',
      'done',
      'made',
      'completed',
      'divided',
      'discarded',
      'vm-ended',
      'expired',
      'retry',
    ] as const
  ).map((name) => ({ name })),
  { name: 'divided', hasEnded: true },
  { name: 'prepare', epoch: 1 },
  { name: 'commit', epoch: 2 },
  { name: 'abort', epoch: 3 },
  { name: 'make-failed', problems: [] },
  { name: 'loaded', complete: true },
  { name: 'failed', message: '' },
  { name: 'resumed', complete: true },
  { name: 'resume-refused', message: '' },
  ...(['gone', 'waiting', 'loaded', 'running'] as const).map((found) => ({
    name: 'restarted' as const,
    found,
    complete: false,
  })),
  { name: 'claim', reason: '' },
  { name: 'claimed', epoch: 9 },
];

test("the source's diagram is what the code does", () => {
  const inCode = arrowsOf(sourceStates, sourceEvents, sourceTransition);
  assert.deepEqual(arrowsIn('source-machine.ts'), inCode);
});

test("the destination's diagram is what the code does", () => {
  const inCode = arrowsOf(destinationStates, destinationEvents, destinationTransition);
  assert.deepEqual(arrowsIn('destination-machine.ts'), inCode);
});

test('after the release a cancel is refused by name, and so is a claim after the VM has run elsewhere', () => {
  for (const state of sourceStates.filter((one) => !sourceOwns(one))) {
    const answer = sourceTransition(state, { name: 'cancel' });
    assert.ok(isRefused(answer));
    assert.equal(answer.refused, state.name === 'moved' ? 'over' : 'committed');
  }
  const claim = sourceTransition({ name: 'serving', epoch: 2 }, { name: 'claim', reason: 'lost site' });
  assert.ok(isRefused(claim) && claim.refused === 'has_run_elsewhere');
});

test('a VM that was taken back has an epoch above the one that was given away', () => {
  const back = sourceTransition({ name: 'switching', epoch: 8 }, { name: 'rejected', reason: 'no memory' });
  assert.ok(!isRefused(back));
  assert.equal(back.state.name === 'taking-back' && back.state.epoch, 9);
});

function arrowsOf<S extends { name: string }, E extends { name: string }>(
  states: S[],
  events: E[],
  transition: (state: S, event: E) => Next<S, unknown> | Refused,
): string[] {
  const arrows = new Set<string>();
  for (const state of states)
    for (const event of events) {
      const answer = transition(state, event);
      if (isRefused(answer) || answer.state.name === state.name) continue;
      arrows.add(`${state.name} --${event.name}--> ${answer.state.name}`);
    }
  return [...arrows].sort();
}

function arrowsIn(file: string): string[] {
  const text = readFileSync(join(import.meta.dirname, file), 'utf8');
  const arrows = [...text.matchAll(/^ \* {3}(\S+) +--(.+?)--> (\S+)/gm)].flatMap(([, from, names, to]) =>
    names!.split(', ').map((name) => `${from} --${name}--> ${to}`),
  );
  return arrows.sort();
}
