/** A guest moved by QEMU alone: its mirror over NBD, then its memory, both over TCP on loopback. */
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { guestImage } from '../lab/guests.ts';
import { newId } from '../model/ids.ts';
import { readCpuTime } from '../vm/cpu-time.ts';
import { createDisk } from '../vm/disks.ts';
import { Machine } from '../vm/machine.ts';
import { load, type Move, settleMs, spec, type Way, watchSilence } from './moving-guest.ts';

const host = '127.0.0.1';

export async function plainWay(accelerator: 'kvm' | 'tcg'): Promise<Way> {
  const root = await mkdtemp(path.join(tmpdir(), 'viper-plain-'));
  const id = newId();
  let launches = 0;
  const launch = async (incoming: boolean): Promise<Machine> => {
    launches += 1;
    const name = `s${launches}`;
    const directory = path.join(root, name);
    await mkdir(directory);
    const diskFile = path.join(directory, 'disk.qcow2');
    await createDisk({
      file: diskFile,
      imageFile: guestImage('tiny'),
      imageFormat: 'qcow2',
      sizeBytes: spec.disk.sizeBytes,
      signal: AbortSignal.timeout(60_000),
    });
    return Machine.launch({ id, name, spec, accelerator, directory, diskFile, incoming });
  };

  let source = await launch(false);
  await source.resume();
  await source.agent.waitUntilReady({ timeoutMs: 180_000 });
  await source.agent.exec({ argv: ['/bin/sh', '-c', load], timeoutMs: 120_000 });

  const move = async (): Promise<Move> => {
    const requestedAt = performance.now();
    const destination = await launch(true);
    const cpuBefore = readCpuTime(source.process.pid)!.otherMs;
    const port = 20_000 + Math.floor(Math.random() * 20_000);
    await listen(destination, port);
    await source.qmp.execute('migrate-set-capabilities', {
      capabilities: [
        { capability: 'events', state: true },
        { capability: 'pause-before-switchover', state: true },
      ],
    });
    await source.qmp.execute('migrate-set-parameters', { 'max-bandwidth': 10 ** 12, 'downtime-limit': 300 });
    const silence = watchSilence([source.paths.consoleLog, destination.paths.consoleLog]);

    const diskAt = performance.now();
    await mirrorTo(source, port);
    const memoryAt = performance.now();
    await source.qmp.execute('migrate', { uri: `tcp:${host}:${port + 1}` });
    const info = await completeMigration(source);
    while ((await destination.qmp.execute('query-migrate')).status !== 'completed') await sleep(1);
    await destination.qmp.execute('nbd-server-stop');
    await destination.resume();
    const runsAt = performance.now();

    const cpuMs = {
      source: readCpuTime(source.process.pid)!.otherMs - cpuBefore,
      destination: readCpuTime(destination.process.pid)!.otherMs,
    };
    await source.kill();
    const endedAt = performance.now();
    await sleep(settleMs);
    await rm(path.dirname(source.paths.qmp), { recursive: true, force: true });
    source = destination;
    return {
      diskMs: memoryAt - diskAt,
      memoryMs: runsAt - memoryAt,
      memoryBytes: info.ram?.transferred ?? 0,
      totalMs: endedAt - requestedAt,
      gapMs: silence(),
      qemuDowntimeMs: info.downtime ?? 0,
      cpuMs,
    };
  };
  return {
    move,
    rest: () => source.pause(),
    wake: () => source.resume(),
    async [Symbol.asyncDispose]() {
      await source.kill();
      await rm(root, { recursive: true, force: true });
    },
  };
}

async function listen({ qmp }: Machine, port: number): Promise<void> {
  await qmp.execute('nbd-server-start', {
    addr: { type: 'inet', data: { host, port: String(port) } },
  });
  await qmp.execute('block-export-add', {
    type: 'nbd',
    id: 'disk',
    name: 'disk',
    'node-name': 'disk',
    writable: true,
  });
  await qmp.execute('migrate-set-capabilities', {
    capabilities: [
      { capability: 'events', state: true },
      { capability: 'late-block-activate', state: true },
    ],
  });
  await qmp.execute('migrate-incoming', { uri: `tcp:${host}:${port + 1}` });
}

async function mirrorTo({ qmp }: Machine, port: number): Promise<void> {
  await qmp.execute('blockdev-add', {
    driver: 'nbd',
    'node-name': 'target',
    server: { type: 'inet', host, port: String(port) },
    export: 'disk',
    discard: 'unmap',
    'detect-zeroes': 'unmap',
  });
  await qmp.execute('blockdev-mirror', {
    'job-id': 'mirror',
    device: 'disk',
    target: 'target',
    sync: 'top',
  });
  while (!(await qmp.execute('query-block-jobs')).some((job) => job.ready)) await sleep(5);
}

/** Ends the mirror while the VM stands still, and lets the memory complete. */
async function completeMigration({ qmp }: Machine) {
  for (;;) {
    const info = await qmp.execute('query-migrate');
    if (info.status === 'completed') return info;
    if (info.status === 'failed') throw new Error(`plain QEMU failed: ${info['error-desc']}`);
    if (info.status === 'pre-switchover') {
      await qmp.execute('block-job-cancel', { device: 'mirror' });
      while ((await qmp.execute('query-block-jobs')).length > 0) await sleep(1);
      await qmp.execute('blockdev-del', { 'node-name': 'target' });
      await qmp.execute('migrate-continue', { state: 'pre-switchover' });
    }
    await sleep(2);
  }
}
