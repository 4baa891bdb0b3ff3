import assert from 'node:assert/strict';
import { describe, type TestContext, test } from 'node:test';
import fc from 'fast-check';
import { AppError } from '../model/errors.ts';
import { newId } from '../model/ids.ts';
import type { Operation, Progress } from '../model/operation.ts';
import { EventLog } from './events.ts';
import { Operations, type OperationsOptions } from './operations.ts';
import { testStore } from './store/fixtures.ts';
import type { Store } from './store/index.ts';

function testOperations(
  options: Partial<OperationsOptions> = {},
  prepare: (store: Store) => void = () => {},
) {
  const fixture = testStore();
  prepare(fixture.store);
  const events = new EventLog(fixture.store);
  const bugs: AppError[] = [];
  const operations = new Operations({
    store: fixture.store,
    events,
    onBug: (error) => bugs.push(error),
    ...options,
  });
  return { ...fixture, events, operations, bugs };
}

const forEver = ({ signal }: { signal: AbortSignal }) =>
  new Promise<undefined>((_, reject) => signal.addEventListener('abort', () => reject(signal.reason)));

const steps = (phase: string, done: number): Progress => ({ phase, done, total: 100, unit: 'steps' });

/** Reports that the journal saw, as the events tell. */
const reported = (store: Store): unknown[] => store.events.since(0, 1000).map(({ kind }) => kind);

describe('an operation', () => {
  test('gives its record at once, and its result when it has ended', async () => {
    using fixture = testOperations();
    const { operations, store } = fixture;
    const begun = operations.run('vm.create', { name: 'web' }, async ({ describe }) => {
      describe({ vmId: 'id' });
      return { vmId: 'id' };
    });
    assert.equal(begun.state, 'running');
    assert.equal(store.operations.get(begun.id)!.state, 'running');
    const ended = await operations.wait(begun.id);
    assert.equal(ended.state, 'succeeded');
    assert.deepEqual([ended.result, ended.subject], [{ vmId: 'id' }, { name: 'web', vmId: 'id' }]);
    assert.deepEqual(store.operations.get(begun.id), ended);
    assert.deepEqual(reported(store), ['operation.started', 'operation.finished']);
  });

  test('that fails as expected keeps the error that callers may see', async () => {
    using fixture = testOperations();
    const error = new AppError('insufficient_memory', 'Too big.', { wantedBytes: 2, freeBytes: 1 });
    const { id } = fixture.operations.run('vm.start', {}, () => Promise.reject(error));
    const { state, error: kept } = await fixture.operations.wait(id);
    assert.equal(state, 'failed');
    assert.deepEqual(kept, { code: error.code, message: error.message, details: error.details });
    assert.deepEqual(fixture.bugs, []);
  });

  test('that fails by a bug is internal, and the bug is reported with its stack', async () => {
    using fixture = testOperations();
    const bug = new TypeError('x is undefined');
    const { id } = fixture.operations.run('vm.start', {}, () => Promise.reject(bug));
    assert.equal((await fixture.operations.wait(id)).error!.code, 'internal');
    assert.equal(fixture.bugs.length, 1);
    assert.equal(fixture.bugs[0]!.cause, bug);
  });

  test('that throws before it awaits anything fails like any other', async () => {
    using fixture = testOperations();
    const { id } = fixture.operations.run('vm.start', {}, () => {
      throw new AppError('qemu_failed', 'No.');
    });
    assert.equal((await fixture.operations.wait(id)).error!.code, 'qemu_failed');
  });

  test('is refused when too many run', async () => {
    await using fixture = closing(testOperations({ maxRunning: 1 }));
    fixture.operations.run('vm.start', {}, forEver);
    assert.throws(() => fixture.operations.run('vm.start', {}, forEver), { code: 'too_many' });
    assert.equal(fixture.operations.list({ limit: 5 }).items.length, 1);
  });

  test('left running by a daemon that died is interrupted', () => {
    const left: Operation = {
      id: newId(),
      kind: 'vm.create',
      subject: { vmId: newId() },
      state: 'running',
      progress: null,
      createdAt: '2026-01-01T00:00:00.000Z',
    };
    using fixture = testOperations({}, (store) => store.operations.insert(left));
    const { state, error, finishedAt } = fixture.operations.get(left.id)!;
    assert.deepEqual([state, error!.code, typeof finishedAt], ['failed', 'interrupted', 'string']);
    assert.deepEqual(reported(fixture.store), ['operation.finished']);
  });
});

describe('cancelling', () => {
  test('ends the operation once its work has cleaned up', async () => {
    using fixture = testOperations();
    const { operations } = fixture;
    const cleaned = Promise.withResolvers<undefined>();
    const { id } = operations.run('vm.create', {}, async (context) => {
      await forEver(context).catch(() => cleaned.promise);
      throw context.signal.reason;
    });
    assert.equal(operations.cancel(id).state, 'running');
    assert.equal(operations.get(id)!.state, 'running');
    cleaned.resolve(undefined);
    const ended = await operations.wait(id);
    assert.deepEqual([ended.state, ended.error!.code], ['cancelled', 'cancelled']);
  });

  test('before the work began means that it never begins', async () => {
    using fixture = testOperations();
    const { id } = fixture.operations.run('vm.create', {}, () => assert.fail('began'));
    fixture.operations.cancel(id);
    assert.equal((await fixture.operations.wait(id)).state, 'cancelled');
    assert.deepEqual(fixture.bugs, []);
  });

  test('is too late for work that comes to its end all the same', async () => {
    using fixture = testOperations();
    const finish = Promise.withResolvers<undefined>();
    const { id } = fixture.operations.run('vm.create', {}, () => finish.promise);
    await Promise.resolve();
    fixture.operations.cancel(id);
    finish.resolve(undefined);
    assert.equal((await fixture.operations.wait(id)).state, 'succeeded');
    assert.throws(() => fixture.operations.cancel(id), {
      code: 'wrong_state',
      details: { state: 'succeeded', allowed: [] },
    });
  });

  test('of an unknown operation is refused', () => {
    using fixture = testOperations();
    assert.throws(() => fixture.operations.cancel(newId()), { code: 'not_found' });
  });

  test('hides the abort that it caused, but not a bug in cleaning up', async () => {
    using fixture = testOperations();
    const { operations, bugs } = fixture;
    for (const thrown of [new DOMException('aborted', 'AbortError'), new TypeError('cleaning')]) {
      const { id } = operations.run('vm.create', {}, (context) =>
        forEver(context).catch(() => Promise.reject(thrown)),
      );
      await Promise.resolve();
      operations.cancel(id);
      assert.equal((await operations.wait(id)).state, 'cancelled');
    }
    assert.deepEqual(
      bugs.map(({ message }) => message),
      ['Unexpected failure: cleaning'],
    );
  });
});

describe('waiting', () => {
  test('gives the running record when the waiter gives up', async () => {
    await using fixture = closing(testOperations());
    const { id } = fixture.operations.run('vm.start', {}, forEver);
    const abort = new AbortController();
    const waiting = fixture.operations.wait(id, { signal: abort.signal });
    abort.abort();
    assert.equal((await waiting).state, 'running');
  });

  test('for an unknown operation is refused', async () => {
    using fixture = testOperations();
    await assert.rejects(fixture.operations.wait(newId()), { code: 'not_found' });
  });
});

test('closing aborts what runs, waits for it, calls it interrupted and takes no more', async () => {
  using fixture = testOperations();
  const { operations } = fixture;
  let cleaned = false;
  const { id } = operations.run('vm.create', {}, async (context) => {
    await forEver(context).catch(() => {});
    cleaned = true;
    throw context.signal.reason;
  });
  await Promise.resolve();
  await operations.close();
  assert.equal(cleaned, true);
  const { state, error } = operations.get(id)!;
  assert.deepEqual([state, error!.code], ['failed', 'interrupted']);
  assert.throws(() => operations.run('vm.create', {}, forEver), { code: 'interrupted' });
});

describe('progress', () => {
  test('is written at once and then not more often than the interval, the last report included', async (t) => {
    t.mock.timers.enable({ apis: ['setTimeout', 'Date'] });
    await using fixture = closing(testOperations());
    const { id, report } = await beginReporting(fixture.operations);
    const writes = countWrites(t, fixture.store);
    for (let done = 1; done <= 50; done += 1) report(steps('copy', done));
    assert.equal(writes(), 1);
    assert.equal(fixture.operations.get(id)!.progress!.done, 50, 'the record in memory is always the newest');
    t.mock.timers.tick(200);
    assert.equal(writes(), 2);
    assert.equal(fixture.store.operations.get(id)!.progress!.done, 50);
    t.mock.timers.tick(1000);
    assert.equal(writes(), 2, 'nothing new, nothing written');
  });

  test('never falls within a phase', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.record({ phase: fc.constantFrom('a', 'b'), done: fc.nat(100) }), { maxLength: 30 }),
        async (reports) => {
          await using fixture = closing(testOperations());
          const { id, report } = await beginReporting(fixture.operations);
          let before: Progress | null = null;
          for (const { phase, done } of reports) {
            report(steps(phase, done));
            const now: Progress = fixture.operations.get(id)!.progress!;
            assert.equal(now.phase, phase);
            if (before?.phase === phase) assert.ok(now.done >= before.done);
            else assert.equal(now.done, done);
            before = now;
          }
        },
      ),
      { numRuns: 20 },
    );
  });

  test('that comes after the end is dropped', async () => {
    using fixture = testOperations();
    const { id, report, finish } = await beginReporting(fixture.operations);
    finish();
    await fixture.operations.wait(id);
    report(steps('late', 1));
    assert.equal(fixture.operations.get(id)!.progress, null);
  });

  test('leaves one event behind, not hundreds', async (t) => {
    t.mock.timers.enable({ apis: ['setTimeout', 'Date'] });
    using fixture = testOperations();
    const { id, report, finish } = await beginReporting(fixture.operations);
    for (let done = 1; done <= 50; done += 1) {
      report(steps('copy', done));
      t.mock.timers.tick(200);
    }
    assert.deepEqual(reported(fixture.store), ['operation.started', 'operation.progress']);
    finish();
    await fixture.operations.wait(id);
    assert.deepEqual(reported(fixture.store), ['operation.started', 'operation.finished']);
  });
});

/** Starts an operation whose progress and end the test decides. */
async function beginReporting(operations: Operations) {
  const began = Promise.withResolvers<(report: Progress) => void>();
  const finished = Promise.withResolvers<undefined>();
  const { id } = operations.run('vm.create', {}, ({ progress, signal }) => {
    began.resolve(progress);
    signal.addEventListener('abort', () => finished.resolve(undefined));
    return finished.promise;
  });
  return { id, report: await began.promise, finish: () => finished.resolve(undefined) };
}

function countWrites(t: TestContext, store: Store): () => number {
  const update = t.mock.method(store.operations, 'update');
  return () => update.mock.callCount();
}

/** The fixture with its operations closed before its store. */
function closing(fixture: ReturnType<typeof testOperations>) {
  return {
    ...fixture,
    [Symbol.asyncDispose]: async () => {
      await fixture.operations.close();
      fixture[Symbol.dispose]();
    },
  };
}
