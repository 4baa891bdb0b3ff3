/** A guest moved between two daemons by the direct engine. */
import { openAsBlob, readFileSync } from 'node:fs';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { type LabCloudlet, LabFleet } from '../lab/fleet.ts';
import { guestImage } from '../lab/guests.ts';
import { load, type Move, memoryBytes, settleMs, spec, type Way, watchSilence } from './moving-guest.ts';

export interface ViperWay extends Way {
  accelerator: 'kvm' | 'tcg';
  /** The most that a daemon had while a guest moved, and both after their start, when they knew each other. */
  residentBytes(): { idle: number[]; most: number };
}

export async function viperWay(): Promise<ViperWay> {
  await using undo = new AsyncDisposableStack();
  const fleet = undo.use(await LabFleet.create());
  let from = await fleet.add('north');
  let to = await fleet.add('south');
  for (const cloudlet of [from, to]) {
    // The first start on a machine compiles its code.
    await cloudlet.stop();
    await cloudlet.start();
  }
  await sleep(2000);
  const idle = [from, to].map(residentBytes);
  for (const { viper } of [from, to])
    await viper.importImage({ body: await openAsBlob(guestImage('tiny')), query: { alias: 'tiny' } });
  const { accelerator } = await from.viper.getCloudlet();

  const hardware = { memoryBytes, diskBytes: spec.disk.sizeBytes, nets: [] };
  await from.viper.wait(await from.viper.createVm({ body: { name: 'bench', image: 'tiny', hardware } }));
  const { id } = await from.viper.getVm({ params: { vm: 'bench' } });
  const vm = { params: { vm: id } };
  while (!(await hasGuest(from, id))) await sleep(200);
  const argv = ['/bin/sh', '-c', load];
  await from.viper.execInGuest({ ...vm, body: { argv, timeoutMs: 120_000 } });

  let mostBytes = 0;
  const move = async (): Promise<Move> => {
    const sampling = setInterval(() => {
      mostBytes = Math.max(mostBytes, residentBytes(from), residentBytes(to));
    }, 100);
    const silence = watchSilence(
      [from, to].map((side) => path.join(side.directory, 'vms', id, 'console.log')),
    );
    const requestedAt = performance.now();
    const operation = await from.viper.migrateVm({
      ...vm,
      body: { to: to.name, mode: 'precopy', engine: 'direct' },
    });
    await from.viper.wait(operation);
    const totalMs = performance.now() - requestedAt;
    await sleep(settleMs);
    const gapMs = silence();
    clearInterval(sampling);
    const { result } = await from.viper.getMigration({
      params: { migration: operation.subject.migrationId! },
    });
    const { phaseMs = {}, source, destination } = result!;
    [from, to] = [to, from];
    return {
      diskMs: phaseMs.disk!,
      memoryMs: phaseMs.memory! + phaseMs.switchover!,
      memoryBytes: result!.memoryBytes,
      totalMs,
      gapMs,
      qemuDowntimeMs: result!.qemuDowntimeMs ?? 0,
      cpuMs: {
        source: source!.qemuCpuMs,
        destination: destination!.qemuCpuMs,
        sourceDaemon: source!.daemonCpuMs,
        destinationDaemon: destination!.daemonCpuMs,
      },
    };
  };
  const owned = undo.move();
  return {
    accelerator,
    move,
    residentBytes: () => ({ idle, most: mostBytes }),
    rest: async () => void (await from.viper.wait(await from.viper.pauseVm(vm))),
    wake: async () => void (await from.viper.wait(await from.viper.resumeVm(vm))),
    [Symbol.asyncDispose]: () => owned.disposeAsync(),
  };
}

const hasGuest = ({ viper }: LabCloudlet, id: string): Promise<boolean> =>
  viper.getGuest({ params: { vm: id } }).then(
    () => true,
    () => false,
  );

const residentBytes = ({ pid }: LabCloudlet): number =>
  Number(/^VmRSS:\s+(\d+) kB/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))![1]) * 1024;
