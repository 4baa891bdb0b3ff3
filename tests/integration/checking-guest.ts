/**
 * In the guest: rewrites blocks of memory and of disk with random bytes, and before each checks that the block is
 * still what was written. A mismatch is written down and ends it.
 */
import assert from 'node:assert/strict';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Machine } from '../../src/vm/machine.ts';

const checker = `
cd $1; n=0; echo 0 >$3/count
while :; do
  i=$((n % $2)); 
  if [ -e b$i ]; then [ "$(md5sum <b$i)" = "$(cat $3/s$i)" ] || { echo "block $i of $1 at $n" >>/run/corrupt; exit 1; }; fi
  head -c $4 /dev/urandom >b$i; [ $5 = 0 ] || sync b$i
  md5sum <b$i >$3/s$i
  n=$((n + 1)); echo $n >$3/count
done`;

/** Starts both checkers in the guest. */
export async function startCheckers(machine: Machine): Promise<void> {
  const start =
    `mkdir -p /dev/shm/memory /run/sums-memory /run/sums-disk /data/disk; cat >/run/checker; ` +
    `setsid sh /run/checker /dev/shm/memory 24 /run/sums-memory 393216 0 </dev/null >/dev/null 2>&1 & ` +
    `setsid sh /run/checker /data/disk 12 /run/sums-disk 131072 1 </dev/null >/dev/null 2>&1 &`;
  await inGuest(machine, start, checker);
  // Once round, so that every block is checked from now on.
  await checked(machine, { memory: 24, disk: 12 });
}

/** From now on the guest rewrites 8 MiB of its memory whenever it has nothing better to do. */
export async function startWriting(machine: Machine): Promise<void> {
  const write = 'while :; do dd if=/dev/shm/random of=/dev/shm/hot bs=1M conv=notrunc; done';
  await inGuest(
    machine,
    `head -c 8388608 /dev/urandom >/dev/shm/random; setsid nice -n 19 sh -c '${write}' </dev/null >/dev/null 2>&1 &`,
  );
}

/** Waits until the guest has checked that many more blocks, and that none was corrupt. */
export async function checked(machine: Machine, more = { memory: 26, disk: 13 }): Promise<void> {
  const first = await counts(machine);
  for (const deadline = Date.now() + 180_000; ; ) {
    const now = await counts(machine);
    if (now.memory >= first.memory + more.memory && now.disk >= first.disk + more.disk) return;
    assert.ok(Date.now() < deadline, `the guest checks nothing any more: ${JSON.stringify({ first, now })}`);
    await sleep(200);
  }
}

async function counts(machine: Machine): Promise<{ memory: number; disk: number }> {
  const script = 'cat /run/corrupt 2>/dev/null; echo -; cat /run/sums-memory/count /run/sums-disk/count';
  const ask = () => inGuest(machine, script);
  // On a busy machine, or while its pages are elsewhere, it may answer late, and then is asked again.
  const answer = await ask().catch(ask).catch(ask).catch(ask);
  const [corrupt, numbers] = answer.split('-\n');
  assert.equal(corrupt, '');
  const [memory, disk] = numbers!.split('\n').map(Number);
  return { memory: memory!, disk: disk! };
}

export async function inGuest(machine: Machine, script: string, input?: string): Promise<string> {
  const { stdout } = await machine.agent.exec({
    argv: ['/bin/sh', '-c', script],
    timeoutMs: 30_000,
    ...(input !== undefined && { input }),
  });
  return stdout;
}
