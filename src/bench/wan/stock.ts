/**
 * The same guest moved by plain QEMU over the WAN, both QEMUs on one disk. Its own settings are left as they are but
 * for what the way of moving needs, and but for events, which tell when to let the VM run at the destination.
 */
import { mkdir, rm } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Lab } from '../../lab/lab.ts';
import { nowMs } from '../../lab/probes/echo.ts';
import { EchoClient } from '../../lab/probes/echo-client.ts';
import { newId } from '../../model/ids.ts';
import { untilCalm } from '../../vm/calm.ts';
import { readCpuTime } from '../../vm/cpu-time.ts';
import { createDisk } from '../../vm/disks.ts';
import { Host } from '../../vm/host.ts';
import { Machine } from '../../vm/machine.ts';
import { loadMemoryFromFile } from '../../vm/memory-file.ts';
import { createSeed } from '../../vm/seed.ts';
import type { Cell } from './grid.ts';
import { echoPort, guestAddress, inBackground, type WarmGuest } from './guest.ts';
import type { Measured } from './measured.ts';
import { addTap, qemuIn, wanBytes } from './places.ts';

type StockMover = 'precopy' | 'multifd' | 'postcopy';
const port = 20_000;
const settleMs = 500;
const calmMs = 1000;

export interface StockOptions {
  lab: Lab;
  guest: WarmGuest;
  mover: StockMover;
  cell: Cell;
  boundMs: number;
}

/** The guest as it was when it was warm, at the first cloudlet, and a QEMU at the second that waits for it. */
async function launchBoth({ lab, guest }: StockOptions, undo: AsyncDisposableStack) {
  const { signal } = new AbortController();
  const directory = path.join(lab.directory, 'stock');
  await mkdir(directory);
  undo.defer(() => rm(directory, { recursive: true, force: true }));
  const { spec } = guest;
  const id = newId();
  const [diskFile, seedFile] = [path.join(directory, 'disk.qcow2'), path.join(directory, 'seed.iso')];
  const sizeBytes = spec.disk.sizeBytes;
  await createDisk({ file: diskFile, imageFile: guest.warm.disk, imageFormat: 'qcow2', sizeBytes, signal });
  const macs = spec.nets.map(({ mac }) => mac);
  await createSeed({ file: seedFile, spec: spec.seed, instanceId: id, macs, signal });
  const { accelerator } = await new Host().facts();
  const launch = async (at: string): Promise<Machine> => {
    const tap = `stock-${at}`;
    undo.use(await addTap(lab, at, tap));
    const own = path.join(directory, at);
    await mkdir(own);
    const common = { id, name: at, spec, accelerator, diskFile, seedFile, sharedDisk: true, incoming: true };
    const machine = await Machine.launch(
      { ...common, directory: own, taps: [tap] },
      { qemu: await qemuIn(lab, at) },
    );
    undo.defer(async () => void (await machine.kill()));
    return machine;
  };
  const source = await launch('c1');
  await loadMemoryFromFile(source, { file: guest.warm.memory, signal });
  await source.resume();
  return { source, destination: await launch('c2') };
}

export async function runStock(options: StockOptions): Promise<Measured> {
  const { lab, mover, cell, boundMs } = options;
  await using undo = new AsyncDisposableStack();
  const { source, destination } = await launchBoth(options, undo);
  if (cell.writerMBps > 0) {
    const start = inBackground(`python3 /root/writer.py ${cell.writerMBps}`, 'writer');
    await source.agent.exec({ argv: ['/bin/sh', '-c', start], timeoutMs: 30_000 });
  }
  await setUp(source, destination, mover, `${lab.site('c2').address}:${port}`);
  await untilCalm(source.process, { timeoutMs: 5000, signal: new AbortController().signal });
  const client = undo.use(await EchoClient.start({ lab, at: 'c1', to: `${guestAddress}:${echoPort}` }));
  await sleep(calmMs);
  const bytesBefore = await wanBytes(lab);
  const cpuBefore = cpuOf(source, destination);
  const beganMs = nowMs();
  const converged = await migrate(source, destination, mover, {
    uri: `tcp:${lab.site('c2').address}:${port}`,
    boundMs,
  });
  const totalMs = nowMs() - beganMs;
  const cpuAfter = cpuOf(source, destination);
  const bytes = (await wanBytes(lab)) - bytesBefore;
  await sleep(settleMs);
  const endMs = nowMs();
  const info = await source.qmp.execute('query-migrate');
  const answers = await client.end();
  return {
    converged,
    totalMs,
    gapMs: answers.longestGapMs(beganMs, endMs),
    calmGapMs: answers.longestGapMs(beganMs - calmMs, beganMs),
    ...(converged && info.downtime !== undefined ? { downtimeMs: info.downtime } : {}),
    wireBytes: bytes,
    cpuMs: {
      source: cpuAfter.source - cpuBefore.source,
      destination: cpuAfter.destination - cpuBefore.destination,
    },
    ...(info.ram ? { rounds: info.ram['dirty-sync-count'] } : {}),
    finishedAs: mover === 'postcopy' ? 'postcopy' : 'precopy',
  };
}

const cpuOf = (source: Machine, destination: Machine) => ({
  source: readCpuTime(source.process.pid)?.otherMs ?? 0,
  destination: readCpuTime(destination.process.pid)?.otherMs ?? 0,
});

async function setUp(source: Machine, destination: Machine, mover: StockMover, at: string): Promise<void> {
  for (const { qmp } of [source, destination]) {
    await qmp.execute('migrate-set-capabilities', {
      capabilities: [
        { capability: 'events', state: true },
        ...(mover === 'postcopy' ? [{ capability: 'postcopy-ram', state: true } as const] : []),
        ...(mover === 'multifd' ? [{ capability: 'multifd', state: true } as const] : []),
      ],
    });
    if (mover === 'multifd') await qmp.execute('migrate-set-parameters', { 'multifd-compression': 'zstd' });
  }
  await destination.qmp.execute('migrate-incoming', { uri: `tcp:${at}` });
}

/** False when it had not ended within the bound. */
async function migrate(
  source: Machine,
  destination: Machine,
  mover: StockMover,
  { uri, boundMs }: { uri: string; boundMs: number },
): Promise<boolean> {
  const deadline = performance.now() + boundMs;
  const arrived = letRun(destination, mover, deadline);
  await source.qmp.execute('migrate', { uri });
  let isPostcopy = false;
  for (;;) {
    const { status, ram, 'error-desc': why } = await source.qmp.execute('query-migrate');
    if (status === 'failed') throw new Error(`plain QEMU failed: ${why}`);
    if (status === 'completed') return arrived;
    if (performance.now() > deadline) {
      await source.qmp.execute('migrate_cancel');
      return false;
    }
    if (mover === 'postcopy' && status === 'active' && !isPostcopy && (ram?.normal ?? 0) > 0) {
      isPostcopy = true;
      await source.qmp.execute('migrate-start-postcopy');
    }
    await sleep(isPostcopy ? 20 : 5);
  }
}

/** QEMU was told to wait for us (`-S`), so the VM is let run as soon as it could. Resolves when all of it is there. */
async function letRun({ qmp }: Machine, mover: StockMover, deadline: number): Promise<boolean> {
  const completed = Promise.withResolvers<void>();
  qmp.onEvent((event) => {
    if (event.name === 'MIGRATION' && event.data.status === 'completed') completed.resolve();
  });
  if (mover === 'postcopy') {
    for (;;) {
      const { status } = await qmp.execute('query-status', undefined, { timeoutMs: 120_000 });
      if (status === 'paused') break;
      if (performance.now() > deadline) return false;
      await sleep(5);
    }
    await qmp.execute('cont', undefined, { timeoutMs: 120_000 });
    await completed.promise;
    return true;
  }
  await completed.promise;
  // The event comes a moment before QEMU has left the state in which it cannot run.
  while ((await qmp.execute('query-status')).status === 'inmigrate') await sleep(1);
  await qmp.execute('cont');
  return true;
}
