/** The condensed engine between real QEMUs, in each mode, with a guest that verifies itself all the while. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { MigrationMode } from '../../src/model/migration.ts';
import { checked, startCheckers, startWriting } from './checking-guest.ts';
import { Lab } from './migration-lab.ts';

for (const mode of ['precopy', 'hybrid', 'postcopy'] satisfies MigrationMode[])
  test(`a VM that writes moves condensed in ${mode} and loses nothing`, async (context) => {
    await using lab = await Lab.make();
    const source = await lab.boot(lab.a);
    await startCheckers(source);
    if (mode !== 'precopy') await startWriting(source);
    const pair = await lab.migration(lab.a, lab.b, source, { engine: 'condensed', mode });
    await pair.source.start();
    assert.equal((await pair.source.waitUntilOver()).name, 'moved');
    await pair.untilDestination('settled');
    const { result } = pair.source;
    context.diagnostic(JSON.stringify(result));
    await checked(pair.destination.machine!);
    assert.deepEqual(pair.failures, []);
    assert.equal(result.condensed?.fallback, undefined);
    // Few: memory may refer to a block of the disk that the guest writes again at that moment, and with it goes all that
    // its batch refers to. The set is given up after eight batches, and most references are copies and deltas.
    const { repairedPages, guestBytes, pages } = result.condensed!;
    const few = Math.max(guestBytes / 4096 / 100, (pages.set + pages.copy + pages.delta) / 5);
    assert.ok(repairedPages < few, `${repairedPages} pages were repaired, wanted fewer than ${few}`);
    assert.ok(result.condensed!.pages.set > 0, 'memory refers to the disk');
    // Much of this guest's memory is random, by its own tests.
    assert.ok(result.condensed!.wireBytes < result.condensed!.guestBytes);
    // A hybrid whose rounds had nothing left to send has converged as a pre-copy.
    if (mode === 'postcopy') assert.equal(result.finishedAs, 'postcopy');
  });
