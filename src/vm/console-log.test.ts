import assert from 'node:assert/strict';
import { appendFile, mkdtemp, open, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type TestContext, test } from 'node:test';
import { readConsoleLog, trimConsoleLog } from './console-log.ts';

async function scratch(t: TestContext): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'viper-log-'));
  t.after(() => rm(directory, { recursive: true }));
  return directory;
}

test('the tail of a log is given, and nothing of a VM that never ran', async (t) => {
  const directory = await scratch(t);
  assert.equal((await readConsoleLog(directory, 100)).length, 0);
  await writeFile(join(directory, 'console.log'), 'one\ntwo\n');
  assert.equal((await readConsoleLog(directory, 4)).toString(), 'two\n');
  assert.equal((await readConsoleLog(directory, 100)).toString(), 'one\ntwo\n');
});

test('a log that has grown too long keeps its last half, and who appends to it goes on', async (t) => {
  const directory = await scratch(t);
  const path = join(directory, 'console.log');
  await using writer = await open(path, 'a');
  await writer.appendFile(`${'x'.repeat(1024 * 1024)}END`);
  await trimConsoleLog(directory);
  const kept = (await readConsoleLog(directory, 2 ** 30)).toString();
  assert.equal(kept.length, 512 * 1024);
  assert.ok(kept.endsWith('END'));
  await writer.appendFile('more');
  assert.equal((await readConsoleLog(directory, 7)).toString(), 'ENDmore');
});

test('a short log and a missing one are left alone', async (t) => {
  const directory = await scratch(t);
  await trimConsoleLog(directory);
  await appendFile(join(directory, 'console.log'), 'short');
  await trimConsoleLog(directory);
  assert.equal((await readConsoleLog(directory, 100)).toString(), 'short');
});
