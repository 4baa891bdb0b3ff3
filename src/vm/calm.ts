/** Whether a guest has come to rest, seen from outside: by the processor time that its QEMU takes. */
import { readFile } from 'node:fs/promises';
import type { ProcessRef } from '../model/vm.ts';
import { delay } from '../qmp/index.ts';

/** Linux tells processor time in hundredths of a second (proc_pid_stat(5), USER_HZ). */
const msPerTick = 10;
const sampleMs = 500;
const calmSamples = 3;
/** Of one processor. */
const calmShare = 0.2;

/**
 * Resolves when the guest has been calm for some samples, or, with one that never is, after `timeoutMs`: a guest
 * that has just booted is busy for a while after its agent answers.
 */
export async function untilCalm(
  process: ProcessRef,
  { timeoutMs, signal }: { timeoutMs: number; signal: AbortSignal },
): Promise<void> {
  const deadline = performance.now() + timeoutMs;
  let calm = 0;
  let before = await busyMs(process);
  let at = performance.now();
  while (calm < calmSamples && performance.now() < deadline) {
    await delay(sampleMs, signal);
    const [now, nowAt] = [await busyMs(process), performance.now()];
    calm = (now - before) / (nowAt - at) < calmShare ? calm + 1 : 0;
    [before, at] = [now, nowAt];
  }
}

async function busyMs({ pid }: ProcessRef): Promise<number> {
  const text = await readFile(`/proc/${pid}/stat`, 'utf8').catch(() => '');
  // After the command, which may hold anything, the first field is number 3; user and system time are 14 and 15.
  const fields = text.slice(text.lastIndexOf(')') + 2).split(' ');
  return (Number(fields[14 - 3] ?? 0) + Number(fields[15 - 3] ?? 0)) * msPerTick;
}
