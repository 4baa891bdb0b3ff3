/** The same guest moved by Viper, between two daemons in the lab, over the same WAN and on a disk that both open. */
import { openAsBlob } from 'node:fs';
import { copyFile, mkdir, readFile, stat, symlink, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { statePaths } from '../../daemon/paths.ts';
import { Store } from '../../daemon/store/index.ts';
import { type LabCloudlet, LabFleet } from '../../lab/fleet.ts';
import type { Lab } from '../../lab/lab.ts';
import { nowMs } from '../../lab/probes/echo.ts';
import { EchoClient } from '../../lab/probes/echo-client.ts';
import { execute } from '../../lab/runner.ts';
import { newId } from '../../model/ids.ts';
import { GiB } from '../../model/units.ts';
import type { SnapshotRecord } from '../../model/vm.ts';
import { imageFile } from '../../vm/images.ts';
import { timelineOf } from '../timeline.ts';
import type { Cell, Holds, Mover, Wanted } from './grid.ts';
import { echoPort, guestAddress, inBackground, type Moment, type WarmGuest } from './guest.ts';
import type { Measured } from './measured.ts';
import { wanBytes } from './places.ts';

const vm = 'moving';
/** How long a VM stays away before its way back is measured. */
const awayMs = 60_000;
const settleMs = 500;
const calmMs = 1000;
const patienceMs = 120_000;

export interface ViperWorld extends AsyncDisposable {
  lab: Lab;
  source: LabCloudlet;
  destination: LabCloudlet;
  /** Sees to it that the destination has this, and no more, before the VM comes. */
  hold(holds: Holds): Promise<void>;
}

/** Two daemons with the guest's image and its index; the first can start VMs out of the warm guest. */
export async function openViperWorld(lab: Lab, guest: WarmGuest): Promise<ViperWorld> {
  await using undo = new AsyncDisposableStack();
  const fleet = undo.use(await LabFleet.create(lab));
  const shared = path.join(lab.directory, 'shared');
  await mkdir(shared, { recursive: true });
  const config = {
    networks: [{ name: 'lan', kind: 'bridge', bridge: 'lan0' }],
    storages: [{ name: 'shared', path: shared }],
    // Each run is to be the first move of its VM.
    keptMemoryBytes: 0,
  };
  const env = { VIPER_LOG: 'debug' };
  const source = await fleet.add('c1', config, { env });
  const destination = await fleet.add('c2', config, { env });
  for (const { viper } of [source, destination]) {
    const body = await openAsBlob(guest.imageFile);
    const { digest } = await viper.importImage({ body, query: { alias: 'debian' } });
    await untilIndexed(viper, digest);
  }
  await plant(source, 'warm', guest, guest.warm);
  await untilSnapshotsIndexed(source);
  let held: Holds = 'image';
  const hold = async (holds: Holds): Promise<void> => {
    if (holds === held) return;
    for (const cloudlet of [source, destination]) {
      if (held === 'golden') await cloudlet.viper.deleteSnapshot({ params: { snapshot: 'golden' } });
      if (holds === 'golden') await plant(cloudlet, 'golden', guest, guest.golden);
      if (holds === 'stayed' || held === 'stayed') await keepMemory(cloudlet, holds === 'stayed');
      await untilSnapshotsIndexed(cloudlet);
    }
    held = holds;
  };
  const all = undo.move();
  return { lab, source, destination, hold, [Symbol.asyncDispose]: () => all.disposeAsync() };
}

/** Whether what a VM leaves behind stays, from the daemon's next start on. */
async function keepMemory(cloudlet: LabCloudlet, keeps: boolean): Promise<void> {
  await cloudlet.stop();
  const file = path.join(cloudlet.directory, 'config.json');
  const config = JSON.parse(await readFile(file, 'utf8'));
  await writeFile(file, JSON.stringify({ ...config, keptMemoryBytes: keeps ? 4 * GiB : 0 }));
  await cloudlet.start();
}

async function untilSnapshotsIndexed({ viper }: LabCloudlet): Promise<void> {
  const deadline = performance.now() + patienceMs;
  const isIndexed = async () =>
    (await viper.listSnapshots()).items.every(
      ({ index }) => index.state === 'ready' || index.state === 'failed',
    );
  while (!(await isIndexed())) {
    if (performance.now() > deadline) throw new Error('a snapshot has no index');
    await sleep(100);
  }
}

async function untilIndexed(viper: LabCloudlet['viper'], image: string): Promise<void> {
  const deadline = performance.now() + patienceMs;
  while ((await viper.getImage({ params: { image } })).index.state !== 'ready') {
    if (performance.now() > deadline) throw new Error('the image has no index');
    await sleep(100);
  }
}

/** Gives a cloudlet a snapshot that it has not made itself: while its daemon is away, straight into its store. */
async function plant(cloudlet: LabCloudlet, name: string, guest: WarmGuest, moment: Moment): Promise<void> {
  await cloudlet.stop();
  const id = newId();
  const paths = statePaths(cloudlet.directory);
  const directory = paths.snapshot(id);
  await mkdir(directory, { recursive: true });
  const disk = path.join(directory, 'disk.qcow2');
  await copyFile(moment.disk, disk);
  const image = imageFile(paths.images, guest.spec.disk.image, 'qcow2');
  await execute(['qemu-img', 'rebase', '-u', '-f', 'qcow2', '-F', 'qcow2', '-b', image, disk]);
  await symlink(moment.memory, path.join(directory, 'memory'));
  const record: SnapshotRecord = {
    id,
    name,
    spec: guest.spec,
    createdAt: new Date().toISOString(),
    memoryFileBytes: (await stat(moment.memory)).size,
    diskFileBytes: (await stat(disk)).size,
    bootMs: 0,
  };
  {
    using store = new Store(cloudlet.directory);
    store.snapshots.insert(record);
  }
  await cloudlet.start();
}

export async function runViper(
  world: ViperWorld,
  options: { mover: Mover; cell: Cell; mode: Wanted['mode']; boundMs: number },
): Promise<Measured> {
  const { lab } = world;
  const { mover, cell, mode, boundMs } = options;
  await using undo = new AsyncDisposableStack();
  await world.source.viper.wait(
    await world.source.viper.createVm({ body: { name: vm, snapshot: 'warm', storage: 'shared' } }),
    { timeoutMs: patienceMs },
  );
  undo.defer(() => removeVms(world));
  const isWayBack = cell.holds === 'stayed';
  if (isWayBack) {
    const body = { to: world.destination.name, engine: 'condensed' } as const;
    const there = await world.source.viper.migrateVm({ params: { vm }, body });
    await world.source.viper.wait(there, { timeoutMs: patienceMs });
    await sleep(awayMs);
  }
  const [source, destination] = isWayBack
    ? [world.destination, world.source]
    : [world.source, world.destination];
  if (cell.writerMBps > 0) {
    const start = inBackground(`python3 /root/writer.py ${cell.writerMBps}`, 'writer');
    await source.viper.execInGuest({ params: { vm }, body: { argv: ['/bin/sh', '-c', start] } });
  }
  const client = undo.use(await EchoClient.start({ lab, at: 'c1', to: `${guestAddress}:${echoPort}` }));
  await sleep(2 * calmMs);
  const bytesBefore = await wanBytes(lab);
  const beganMs = nowMs();
  const operation = await source.viper.migrateVm({
    params: { vm },
    body: { to: destination.name, engine: mover === 'direct' ? 'direct' : 'condensed', mode },
  });
  const converged = await source.viper.wait(operation, { timeoutMs: boundMs }).then(
    () => true,
    (error) => {
      if (error.code === 'timeout' || error.name === 'TimeoutError') return false;
      throw error;
    },
  );
  const totalMs = nowMs() - beganMs;
  const bytes = (await wanBytes(lab)) - bytesBefore;
  if (!converged) await source.viper.cancelOperation({ params: { operation: operation.id } });
  await sleep(settleMs);
  const endMs = nowMs();
  const answers = await client.end();
  const migration = operation.subject.migrationId!;
  const { result } = await source.viper.getMigration({ params: { migration } });
  const timeline = await timelineOf([world.source, world.destination], migration, beganMs);
  const cpu = (cost: { daemonCpuMs: number; qemuCpuMs: number } | undefined): number =>
    (cost?.daemonCpuMs ?? 0) + (cost?.qemuCpuMs ?? 0);
  return {
    converged,
    totalMs,
    gapMs: answers.longestGapMs(beganMs, endMs),
    calmGapMs: answers.longestGapMs(beganMs - calmMs, beganMs),
    ...(result?.downtimeMs === undefined ? {} : { downtimeMs: result.downtimeMs }),
    wireBytes: bytes,
    cpuMs: { source: cpu(result?.source), destination: cpu(result?.destination) },
    qemuCpuMs: { source: result?.source?.qemuCpuMs ?? 0, destination: result?.destination?.qemuCpuMs ?? 0 },
    ...(result ? { rounds: result.rounds, finishedAs: result.finishedAs } : {}),
    ...(result?.condensed ? { condensed: result.condensed } : {}),
    timeline,
  };
}

export async function removeVms({ source, destination }: ViperWorld): Promise<void> {
  for (const { viper } of [source, destination])
    for (const { id } of (await viper.listVms()).items) {
      const deleting = viper.deleteVm({ params: { vm: id }, query: { force: true } });
      await deleting.then((operation) => viper.wait(operation, { timeoutMs: patienceMs })).catch(() => {});
    }
}
