/**
 * Cloudlets around a router in a lab: each has one link to all others, so the source's uplink, the destination's
 * downlink and those of relays can be as fast or slow as wanted. The guests' disks are on storage that all open.
 *
 * Where there is no lab it is on loopback, without delay: the source limits what leaves it, and proxies what its peers
 * take and give; what relays give the destination is limited at each of them, to a share of what it takes.
 */
import { openAsBlob } from 'node:fs';
import { mkdir, stat } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { type LabCloudlet, LabFleet } from '../../lab/fleet.ts';
import { guestImage } from '../../lab/guests.ts';
import { Lab } from '../../lab/lab.ts';
import { AppError } from '../../model/errors.ts';
import type { MigrationResult } from '../../model/migration.ts';
import { GiB, MiB } from '../../model/units.ts';
import { type Step, timelineOf } from '../timeline.ts';

export const [hub, sourceName, destinationName] = ['hub', 'src', 'dst'];
const patienceMs = 300_000;
/** One that has not ended by then is called off: a pre-copy whose guest changes more than the link takes never ends. */
const mostMoveMs = 280_000;
const sampleMs = 250;
/** All guests are one tenant's. */
const tenant = 'bench';

/** Of the links, towards the router and from it. */
export interface Rates {
  uplinkMbps: number;
  destinationMbps: number;
  relayMbps: number;
}

export interface Wanted {
  engine: 'direct' | 'condensed' | 'relayed';
  mode: 'precopy' | 'postcopy' | 'hybrid';
  relays: number;
  replicas: number;
}

export interface Move {
  /** Until the source held nothing of any of the VMs any more, or it was called off; until all of them were whole. */
  exitMs: number;
  isCalledOff: boolean;
  totalMs: number;
  results: MigrationResult[];
  /** What the first guest did in each moment, in turns per second, by ms from the request. */
  throughput: { at: number; value: number }[];
  sentBytes: number;
  /** Of the first VM. */
  timeline: Step[];
}

/** Memory that a guest which writes works on, beside what it has. */
const scratchMiB = 8;

export interface Guest {
  memoryMiB: number;
  filledMiB: number;
  does: 'reads' | 'writes';
}

const turns: Record<Guest['does'], (filledMiB: number) => string> = {
  reads: (filledMiB) =>
    `dd if=/dev/shm/file bs=16k skip=$((RANDOM % ${(filledMiB * MiB) / 16384})) count=8 2>/dev/null | md5sum >/dev/null`,
  writes: () =>
    `dd if=/dev/urandom of=/dev/shm/scratch bs=16k seek=$((RANDOM % ${(scratchMiB * MiB) / 16384})) count=8 conv=notrunc 2>/dev/null`,
};

/**
 * What each guest does: it reads its memory here and there, or writes it, 128 KiB each time, and says so on its console. Half
 * of what it has in memory is random and half is text; nothing of it is there twice, but all guests have the same text.
 */
const load = ({ filledMiB, does }: Guest) => `
set -e
cd /dev/shm
head -c ${(filledMiB / 2) * MiB} /dev/urandom > file
seq 1000000 9999999 | head -c ${(filledMiB / 2) * MiB} >> file
md5sum file > /run/file.md5
cat > /run/work <<'END'
while :; do
  ${turns[does](filledMiB)}
  echo . >/dev/ttyS0
done
END
touch /run/ready
`;
const startWorking = 'setsid sh /run/work </dev/null >/dev/null 2>&1 &';

export class ExitWorld implements AsyncDisposable {
  readonly #made: AsyncDisposableStack;
  readonly #lab: Lab | undefined;
  source!: LabCloudlet;
  destination!: LabCloudlet;
  readonly relays: LabCloudlet[] = [];

  private constructor(made: AsyncDisposableStack, lab: Lab | undefined) {
    this.#made = made;
    this.#lab = lab;
  }

  static async open({
    relays,
    rttMs,
    isLoopback = false,
  }: {
    relays: number;
    rttMs: number;
    isLoopback?: boolean;
  }): Promise<ExitWorld> {
    await using made = new AsyncDisposableStack();
    const names = Array.from({ length: relays }, (_, index) => `r${index + 1}`);
    const lab = isLoopback
      ? undefined
      : made.use(
          await Lab.up({
            name: 'exit',
            topology: 'star',
            cloudlets: [hub, sourceName, destinationName, ...names],
            // Two links lie between any two of them.
            wan: { rttMs: rttMs / 2, rateBps: 0 },
          }),
        );
    const fleet = made.use(await LabFleet.create(lab));
    const env = { VIPER_LOG: 'debug' };
    const shared = path.join(lab?.directory ?? fleet.root, 'shared');
    await mkdir(shared, { recursive: true });
    const config = { storages: [{ name: 'shared', path: shared }], keptMemoryBytes: 0 };
    const world = new ExitWorld(made.move(), lab);
    try {
      world.source = await fleet.add(sourceName, config, { env });
      const options = { env, ...(isLoopback ? { proxied: true } : {}) };
      world.destination = await fleet.add(destinationName, config, options);
      for (const name of names)
        world.relays.push(await fleet.add(name, { ...config, relayMemoryBytes: GiB }, options));
      for (const { viper } of [world.source, world.destination])
        await viper.importImage({ body: await openAsBlob(guestImage('tiny')), query: { alias: 'tiny' } });
      return world;
    } catch (error) {
      await world[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** Guests at the source that have begun with what they do. */
  async boot(names: readonly string[], guest: Guest) {
    const { viper } = this.source;
    const hardware = { memoryBytes: guest.memoryMiB * MiB, diskBytes: 64 * MiB, nets: [] };
    for (const name of names)
      await viper.wait(
        await viper.createVm({ body: { name, image: 'tiny', hardware, storage: 'shared', tenant } }),
      );
    const run = (vm: string, script: string, input?: string) =>
      viper.execInGuest({
        params: { vm },
        body: {
          argv: ['/bin/sh', '-c', script],
          timeoutMs: 60_000,
          ...(input === undefined ? {} : { input }),
        },
      });
    for (const vm of names) {
      await until(`the agent of ${vm}`, () => viper.getGuest({ params: { vm } }).then(Boolean, () => false));
      await run(vm, 'cat >/run/load; setsid sh /run/load </dev/null >/dev/null 2>&1 &', load(guest));
      const isReady = async () => (await run(vm, '[ -e /run/ready ]')).exitCode === 0;
      await until(`the load of ${vm}`, () => isReady().catch(() => false));
    }
    // Those that work take the cores from those that are still being filled.
    for (const vm of names) await run(vm, startWorking);
  }

  async setRates({ uplinkMbps, destinationMbps, relayMbps }: Rates): Promise<void> {
    const lab = this.#lab;
    if (!lab) {
      const bandwidthBps = uplinkMbps === 0 ? null : uplinkMbps * 1e6;
      await this.source.viper.limitCloudlet({ body: { bandwidthBps } });
      const bytes = (mbps: number) => (mbps === 0 ? {} : { inBytesPerSecond: mbps * 125_000 });
      this.destination.link!.limit(bytes(destinationMbps));
      for (const { link } of this.relays) {
        const share = (destinationMbps * 125_000) / this.relays.length;
        link!.limit({ ...bytes(relayMbps), ...(share > 0 ? { outBytesPerSecond: share } : {}) });
      }
      return;
    }
    const set = (name: string, mbps: number) => lab.link(hub, name, { rateBps: mbps * 1e6 });
    await set(sourceName, uplinkMbps);
    await set(destinationName, destinationMbps);
    for (const { name } of this.relays) await set(name, relayMbps);
  }

  /** All at once. `isExitAll`: when the source is free nothing is limited any more, for nobody looks how long the rest takes. */
  async move(
    names: readonly string[],
    { engine, mode, relays, replicas }: Wanted,
    isExitAll = false,
  ): Promise<Move> {
    const { viper } = this.source;
    const chosen = this.relays.slice(0, relays).map(({ name }) => name);
    const body = {
      to: destinationName,
      engine,
      mode,
      storage: 'shared',
      ...(engine === 'relayed' ? { relays: chosen, replicas } : {}),
    } as const;
    await using watch = await this.#watch(names[0]!);
    const [began, beganMs] = [performance.now(), Date.now()];
    const operations = await Promise.all(names.map((vm) => viper.migrateVm({ params: { vm }, body })));
    const migrations = operations.map(({ subject }) => ({ params: { migration: subject.migrationId! } }));
    const isCalledOff = !(await this.#haveEnded(operations));
    const exitMs = performance.now() - began;
    if (isExitAll) await this.setRates({ uplinkMbps: 0, destinationMbps: 0, relayMbps: 0 });
    const last = isCalledOff ? viper : this.destination.viper;
    for (const migration of migrations)
      await until('the merge', async () => (await last.getMigration(migration)).over);
    const totalMs = performance.now() - began;
    // What the destination says at its end comes a moment later.
    await until('the last word', async () => {
      const seen = await Promise.all(migrations.map((one) => viper.getMigration(one)));
      return seen.every(({ result }) => (result?.relayed?.slabs ?? 0) === 0 || result?.merge);
    });
    const seen = await Promise.all(migrations.map((migration) => viper.getMigration(migration)));
    const results = seen.map(({ result }) => result as MigrationResult);
    const sentBytes = results.reduce((sum, { link }) => sum + (link?.sentBytes ?? 0), 0);
    const first = operations[0]!.subject.migrationId!;
    const timeline = await timelineOf([this.source, this.destination], first, beganMs);
    return { exitMs, isCalledOff, totalMs, results, throughput: watch.samples(), sentBytes, timeline };
  }

  /** False if they had to be called off. */
  async #haveEnded(operations: readonly { id: string }[]): Promise<boolean> {
    const { viper } = this.source;
    try {
      await Promise.all(operations.map(({ id }) => viper.wait(id, { timeoutMs: mostMoveMs })));
      return true;
    } catch (error) {
      if (!(error instanceof AppError) || error.code !== 'timeout') throw error;
      for (const { id } of operations) await viper.cancelOperation({ params: { operation: id } });
      return false;
    }
  }

  /** Every guest checks that its memory is what it was, at the destination or where it was. */
  async verify(names: readonly string[], { viper } = this.destination): Promise<void> {
    for (const vm of names) {
      const argv = ['/bin/sh', '-c', 'cd /dev/shm && md5sum -c /run/file.md5'];
      const call = { params: { vm }, body: { argv, timeoutMs: 60_000 } };
      const { exitCode } = await viper.execInGuest(call);
      if (exitCode !== 0) throw new Error(`the memory of ${vm} is not what it was`);
    }
  }

  /** Back to the source, as quickly as it goes. */
  async bringBack(names: readonly string[]): Promise<void> {
    await this.setRates({ uplinkMbps: 0, destinationMbps: 0, relayMbps: 0 });
    const { viper } = this.destination;
    for (const vm of names) {
      const body = {
        to: sourceName,
        mode: 'precopy',
        storage: 'shared',
        limits: { downtimeMs: 1000 },
      } as const;
      const back = await viper.migrateVm({ params: { vm }, body });
      await viper.wait(back, { timeoutMs: patienceMs });
      const migration = { params: { migration: back.subject.migrationId! } };
      await until('its way back', async () => (await this.source.viper.getMigration(migration)).over);
    }
  }

  /** Counts the guest's turns by what its console has. */
  async #watch(name: string) {
    const { id } = await this.source.viper.getVm({ params: { vm: name } });
    const logs = [this.source, this.destination].map((side) =>
      path.join(side.directory, 'vms', id, 'console.log'),
    );
    const began = performance.now();
    const sizes = new Map<string, number>();
    const samples: { at: number; value: number }[] = [];
    let last = began;
    const sample = async () => {
      let turns = 0;
      for (const log of logs) {
        const size = await stat(log).then(
          (found) => found.size,
          () => sizes.get(log) ?? 0,
        );
        // A dot, and the ends of lines that a console adds.
        if (sizes.has(log)) turns += Math.max(0, size - sizes.get(log)!) / 3;
        sizes.set(log, size);
      }
      const now = performance.now();
      samples.push({ at: now - began, value: (turns * 1000) / Math.max(1, now - last) });
      last = now;
    };
    await sample();
    samples.length = 0;
    const timer = setInterval(() => void sample(), sampleMs);
    return { samples: () => samples, [Symbol.asyncDispose]: async () => clearInterval(timer) };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#made.disposeAsync();
  }
}

async function until(what: string, ask: () => Promise<unknown>): Promise<void> {
  const deadline = performance.now() + patienceMs;
  while (!(await ask())) {
    if (performance.now() > deadline) throw new Error(`waited in vain for ${what}`);
    await sleep(25);
  }
}
