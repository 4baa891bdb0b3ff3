/**
 * `npm run bench:migrate`: the same guest moved by plain QEMU over TCP and by Viper's direct engine, in turns, in one
 * run. Shared-nothing: first its disk, then its memory, on loopback. Downtime is seen from outside, by a guest that
 * writes to its serial console every 10 ms, and told by QEMU as well.
 */
import { openAsBlob, readFileSync, statSync } from 'node:fs';
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { type LabCloudlet, LabFleet } from '../lab/fleet.ts';
import { guestImage } from '../lab/guests.ts';
import { newId } from '../model/ids.ts';
import { formatBytes, GiB, MiB } from '../model/units.ts';
import type { VmSpec } from '../model/vm.ts';
import { createDisk } from '../vm/disks.ts';
import { Machine } from '../vm/machine.ts';
import { median, table } from './report.ts';

const rounds = Number(process.env.ROUNDS ?? 3);
const memoryBytes = 2 * GiB;
const filledMiB = 1200;
const diskMiB = 256;
const probe = 'probe';

/** In the guest: memory and disk that are not zero, then a sign of life every 10 ms. */
const load = `
mkdir -p /mnt/ram && mount -t tmpfs -o size=1500m none /mnt/ram
yes viper-bench-line | head -c ${filledMiB}m > /mnt/ram/file
dd if=/mnt/ram/file of=/dev/vda bs=1M seek=64 count=${diskMiB} 2>/dev/null; sync
(while :; do echo ${probe} > /dev/ttyS0; usleep 10000; done) > /dev/null 2>&1 < /dev/null &
`;
const spec: VmSpec = {
  machine: 'pc-q35-7.2',
  accelerator: 'auto',
  cpu: { model: 'Nehalem-v1', count: 1 },
  memoryBytes,
  disk: { image: `sha256:${'0'.repeat(64)}`, sizeBytes: 64 * MiB + diskMiB * MiB + 64 * MiB },
  nets: [],
  seed: { hostname: 'bench', sshKeys: [], addresses: [] },
};

interface Move {
  diskMs: number;
  memoryMs: number;
  memoryBytes: number;
  /** The longest time without a sign of life. */
  gapMs: number;
  qemuDowntimeMs: number;
}

/** Looks at the console logs of both sides until told to stop; gives the longest silence. */
function watchSilence(logs: () => string[]): () => number {
  let last = performance.now();
  let sizes = '';
  let longestMs = 0;
  const look = () => {
    const now = performance.now();
    const found = logs()
      .map((file) => statSync(file, { throwIfNoEntry: false })?.size ?? 0)
      .join();
    if (found !== sizes) {
      longestMs = Math.max(longestMs, now - last);
      last = now;
      sizes = found;
    }
  };
  look();
  longestMs = 0;
  const timer = setInterval(look, 2);
  return () => {
    clearInterval(timer);
    return Math.max(longestMs, performance.now() - last);
  };
}

async function plain(accelerator: 'kvm' | 'tcg', root: string): Promise<Move[]> {
  const id = newId();
  const launch = async (name: string, incoming: boolean): Promise<Machine> => {
    const directory = path.join(root, name);
    await rm(directory, { recursive: true, force: true });
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
  let source = await launch('s0', false);
  await source.resume();
  await source.agent.waitUntilReady({ timeoutMs: 180_000 });
  await source.agent.exec({ argv: ['/bin/sh', '-c', load], timeoutMs: 600_000 });
  const moves: Move[] = [];
  for (let round = 1; round <= rounds; round += 1) {
    const destination = await launch(`s${round}`, true);
    const port = 20_000 + Math.floor(Math.random() * 20_000);
    const host = '127.0.0.1';
    await destination.qmp.execute('nbd-server-start', {
      addr: { type: 'inet', data: { host, port: String(port) } },
    });
    await destination.qmp.execute('block-export-add', {
      type: 'nbd',
      id: 'disk',
      name: 'disk',
      'node-name': 'disk',
      writable: true,
    });
    for (const { qmp } of [source, destination]) {
      await qmp.execute('migrate-set-capabilities', {
        capabilities: [
          { capability: 'events', state: true },
          { capability: 'pause-before-switchover', state: qmp === source.qmp },
          { capability: 'late-block-activate', state: true },
        ],
      });
    }
    await source.qmp.execute('migrate-set-parameters', { 'max-bandwidth': 10 ** 12, 'downtime-limit': 300 });
    await destination.qmp.execute('migrate-incoming', { uri: `tcp:${host}:${port + 1}` });
    const logs = [source.paths.consoleLog, destination.paths.consoleLog];
    const silence = watchSilence(() => logs);
    const began = performance.now();
    await source.qmp.execute('blockdev-add', {
      driver: 'nbd',
      'node-name': 'target',
      server: { type: 'inet', host, port: String(port) },
      export: 'disk',
      discard: 'unmap',
      'detect-zeroes': 'unmap',
    });
    await source.qmp.execute('blockdev-mirror', {
      'job-id': 'mirror',
      device: 'disk',
      target: 'target',
      sync: 'top',
    });
    while (!(await source.qmp.execute('query-block-jobs')).some((job) => job.ready)) await sleep(5);
    const diskMs = performance.now() - began;
    await source.qmp.execute('migrate', { uri: `tcp:${host}:${port + 1}` });
    let info = await source.qmp.execute('query-migrate');
    for (; info.status !== 'completed'; info = await source.qmp.execute('query-migrate')) {
      if (info.status === 'failed') throw new Error(`plain QEMU failed: ${info['error-desc']}`);
      if (info.status === 'pre-switchover') {
        await source.qmp.execute('block-job-cancel', { device: 'mirror' });
        while ((await source.qmp.execute('query-block-jobs')).length > 0) await sleep(1);
        await source.qmp.execute('blockdev-del', { 'node-name': 'target' });
        await source.qmp.execute('migrate-continue', { state: 'pre-switchover' });
      }
      await sleep(2);
    }
    while ((await destination.qmp.execute('query-migrate')).status !== 'completed') await sleep(1);
    await destination.qmp.execute('nbd-server-stop');
    await destination.resume();
    const memoryMs = performance.now() - began - diskMs;
    await sleep(500);
    moves.push({
      diskMs,
      memoryMs,
      memoryBytes: info.ram?.transferred ?? 0,
      gapMs: silence(),
      qemuDowntimeMs: info.downtime ?? 0,
    });
    await source.kill();
    source = destination;
  }
  await source.kill();
  return moves;
}

/** The resident memory of a daemon at its most, looked at while it works. */
function watchResident(cloudlets: LabCloudlet[]): () => number {
  let most = 0;
  const timer = setInterval(() => {
    for (const { pid } of cloudlets) {
      const status = readFileSync(`/proc/${pid}/status`, 'utf8');
      most = Math.max(most, Number(/^VmRSS:\s+(\d+) kB/m.exec(status)![1]) * 1024);
    }
  }, 100);
  return () => {
    clearInterval(timer);
    return most;
  };
}

async function viper(fleet: LabFleet): Promise<{ moves: Move[]; residentBytes: number }> {
  let from = await fleet.add('north');
  let to = await fleet.add('south');
  for (const { viper: client } of [from, to]) {
    await client.importImage({ body: await openAsBlob(guestImage('tiny')), query: { alias: 'tiny' } });
  }
  const body = {
    name: 'bench',
    image: 'tiny',
    hardware: { memoryBytes, diskBytes: spec.disk.sizeBytes, nets: [] },
  };
  await from.viper.wait(await from.viper.createVm({ body }));
  const { id } = await from.viper.getVm({ params: { vm: 'bench' } });
  for (;;) {
    if (
      await from.viper.getGuest({ params: { vm: id } }).then(
        () => true,
        () => false,
      )
    )
      break;
    await sleep(200);
  }
  const argv = ['/bin/sh', '-c', load];
  await from.viper.execInGuest({ params: { vm: id }, body: { argv, timeoutMs: 600_000 } });
  const resident = watchResident([from, to]);
  const moves: Move[] = [];
  for (let round = 1; round <= rounds; round += 1) {
    const logs = [from, to].map((side) => path.join(side.directory, 'vms', id, 'console.log'));
    const silence = watchSilence(() => logs);
    const began = performance.now();
    let diskMs = 0;
    const operation = await from.viper.migrateVm({
      params: { vm: id },
      body: { to: to.name, mode: 'precopy' },
    });
    const migrationId = operation.subject.migrationId!;
    for (;;) {
      const phase = await from.viper.getMigration({ params: { migration: migrationId } }).then(
        ({ progress }) => progress?.phase,
        () => undefined,
      );
      if (phase === 'memory' || phase === 'switchover' || phase === 'done') break;
      await sleep(5);
    }
    diskMs = performance.now() - began;
    await from.viper.wait(operation);
    const memoryMs = performance.now() - began - diskMs;
    await sleep(500);
    const { result } = await from.viper.getMigration({ params: { migration: migrationId } });
    moves.push({
      diskMs,
      memoryMs,
      memoryBytes: result!.memoryBytes,
      gapMs: silence(),
      qemuDowntimeMs: result!.qemuDowntimeMs ?? 0,
    });
    [from, to] = [to, from];
  }
  return { moves, residentBytes: resident() };
}

await using fleet = await LabFleet.create();
const scratch = await mkdtemp(path.join(tmpdir(), 'viper-plain-'));
try {
  const { moves: ours, residentBytes } = await viper(fleet);
  const { accelerator } = await fleet.cloudlets[0]!.viper.getCloudlet();
  for (const { viper: client } of fleet.cloudlets) {
    for (const { id } of (await client.listVms()).items) {
      await client.wait(await client.deleteVm({ params: { vm: id }, query: { force: true } }));
    }
  }
  const theirs = await plain(accelerator, scratch);

  const of = (moves: Move[], pick: (move: Move) => number): number => median(moves.map(pick));
  const memoryRate = (move: Move): number => move.memoryBytes / move.memoryMs / 1000;
  const diskRate = (move: Move): number => (diskMiB * MiB) / move.diskMs / 1000;
  const row = (name: string, pick: (move: Move) => number, digits: number, inverse = false): string[] => {
    const [a, b] = [of(theirs, pick), of(ours, pick)];
    return [name, a.toFixed(digits), b.toFixed(digits), (inverse ? a / b : b / a).toFixed(2)];
  };
  console.log(
    `guest of ${formatBytes(memoryBytes)}, ${filledMiB} MiB of it filled, ${diskMiB} MiB on disk; ${rounds} moves each, medians\n`,
  );
  console.log(
    table(
      ['shared-nothing, loopback', 'plain QEMU', 'Viper direct', 'Viper / plain'],
      [
        row('memory, MB/s', memoryRate, 0),
        row('disk, MB/s', diskRate, 0),
        row('memory phase, ms', (move) => move.memoryMs, 0),
        row('disk phase, ms (with what comes before)', (move) => move.diskMs, 0),
        row('longest silence of the guest, ms', (move) => move.gapMs, 0),
        row("downtime by QEMU's count, ms", (move) => move.qemuDowntimeMs, 0),
      ],
    ),
  );
  console.log(`\nresident memory of a daemon at its most: ${(residentBytes / 1e6).toFixed(0)} MB`);
} finally {
  await rm(scratch, { recursive: true, force: true });
}
