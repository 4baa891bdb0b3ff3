import assert from 'node:assert/strict';
import { test } from 'node:test';
import { AppError } from '../model/errors.ts';
import { Engine } from './engine.ts';
import { refuse } from './protocol.ts';

interface Counter {
  name: 'counting';
  count: number;
}
type Step = { name: 'add' } | { name: 'again' } | { name: 'no' };

function make(log: string[], failingJournal = false) {
  const failures: AppError[] = [];
  const engine = new Engine<Counter, Step, string>({
    state: { name: 'counting', count: 0 },
    transition: (state, event) =>
      event.name === 'no'
        ? refuse('not_possible', 'no is no')
        : { state: { ...state, count: state.count + 1 }, effects: [`${event.name} ${state.count + 1}`] },
    journal: {
      append: async ({ count }) => {
        if (failingJournal) throw new Error('disk full');
        log.push(`journal ${count}`);
      },
    },
    perform: async (effect) => {
      log.push(effect);
      return effect === 'again 1' ? { name: 'add' } : undefined;
    },
    onFailure: (error) => failures.push(error),
  });
  return { engine, failures };
}

test('a state is journalled before its effects, and what an effect ends with comes before other events', async () => {
  const log: string[] = [];
  const { engine } = make(log);
  await Promise.all([engine.dispatch({ name: 'again' }), engine.dispatch({ name: 'again' })]);
  assert.deepEqual(log, ['journal 1', 'again 1', 'journal 2', 'add 2', 'journal 3', 'again 3']);
});

test('a refusal is an error with its name, and changes nothing', async () => {
  const log: string[] = [];
  const { engine } = make(log);
  await assert.rejects(engine.dispatch({ name: 'no' }), (error) => {
    assert.ok(error instanceof AppError && error.code === 'wrong_state');
    assert.deepEqual(error.details, { state: 'counting', refused: 'not_possible' });
    return true;
  });
  await engine.dispatch({ name: 'add' });
  assert.deepEqual(log, ['journal 1', 'add 1']);
});

test('an event that cannot be journalled has no effect', async () => {
  const log: string[] = [];
  const { engine, failures } = make(log, true);
  await assert.rejects(engine.dispatch({ name: 'add' }), /disk full/);
  assert.deepEqual([log, engine.state.count, failures], [[], 0, []]);
});

test('after a stop no event is taken', async () => {
  const log: string[] = [];
  const { engine } = make(log);
  await engine.stop();
  await engine.dispatch({ name: 'add' });
  assert.deepEqual(log, []);
});

test('it is idle when no event is at work or waits', async () => {
  const { engine } = make([]);
  assert.ok(engine.isIdle);
  const both = [engine.dispatch({ name: 'add' }), engine.dispatch({ name: 'no' }).catch(() => {})];
  assert.ok(!engine.isIdle);
  await Promise.all(both);
  assert.ok(engine.isIdle);
});
