import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { test } from 'node:test';
import { isAlive, killProcess, parseStat, readProcess, waitUntilGone } from './process.ts';

const stat = (command: string, state = 'S') =>
  `4242 (${command}) ${state} 1 4242 4242 0 -1 4194560 100 0 0 0 5 6 0 0 20 0 3 0 987654 1000 200 18446744073709551615`;

test('the start time is found whatever the command is called', () => {
  for (const command of ['qemu', 'viper-a b', 'a) S 1 (b', ')', '']) {
    assert.deepEqual(parseStat(stat(command)), { state: 'S', startTicks: 987654 });
  }
});

test('a line that is cut or empty gives nothing', () => {
  assert.equal(parseStat(''), undefined);
  assert.equal(parseStat('4242 (qemu) S 1 2'), undefined);
});

test('a process is known by its pid and its start time together', async () => {
  const self = await readProcess(process.pid);
  assert.ok(self);
  assert.equal(await isAlive(self), true);
  assert.equal(await isAlive({ ...self, startTicks: self.startTicks + 1 }), false);
});

test('a process with another start time is not killed', async () => {
  const child = spawn('sleep', ['60'], { stdio: 'ignore' });
  const exit = once(child, 'exit');
  try {
    const found = await readProcess(child.pid!);
    assert.ok(found);
    await killProcess({ ...found, startTicks: found.startTicks - 1 });
    assert.equal(await waitUntilGone(found, { timeoutMs: 1 }), false);
    await killProcess(found);
    assert.equal(await waitUntilGone(found, { timeoutMs: 10_000 }), true);
  } finally {
    child.kill('SIGKILL');
    await exit;
  }
});

test('an abort ends the wait for a process', async () => {
  const self = await readProcess(process.pid);
  const abort = new AbortController();
  const waiting = waitUntilGone(self!, { signal: abort.signal });
  abort.abort();
  await assert.rejects(waiting, { code: 'cancelled' });
});
