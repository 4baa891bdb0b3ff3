import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import { test } from 'node:test';
import { untilCalm } from './calm.ts';

const refOf = (child: ChildProcess) => ({ pid: child.pid!, startTicks: 0 });
const options = { timeoutMs: 60_000, signal: AbortSignal.timeout(120_000) };

test('a process that rests is calm', async () => {
  const child = spawn('sleep', ['600']);
  try {
    await untilCalm(refOf(child), options);
  } finally {
    child.kill('SIGKILL');
  }
});

test('a process that is busy is waited for until it rests', async () => {
  const script =
    "require('fs').writeSync(1, 'busy'); const end = Date.now() + 3000; while (Date.now() < end); console.log('done'); setInterval(() => {}, 1e6)";
  const child = spawn(process.execPath, ['-e', script], { stdio: ['ignore', 'pipe', 'inherit'] });
  let said = '';
  child.stdout.on('data', (text) => {
    said += text;
  });
  try {
    while (said === '') await new Promise((resolve) => setTimeout(resolve, 10));
    await untilCalm(refOf(child), options);
    assert.match(said, /done/);
  } finally {
    child.kill('SIGKILL');
  }
});

test('one that never rests is not waited for longer than asked', async () => {
  const child = spawn(process.execPath, ['-e', 'while (true);']);
  try {
    await untilCalm(refOf(child), { ...options, timeoutMs: 1500 });
  } finally {
    child.kill('SIGKILL');
  }
});
