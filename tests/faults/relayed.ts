/**
 * The faults of a relayed migration, with real daemons: what may break after the source has left, and relays that are
 * not what they say. After each the guest verifies its memory, one side has the VM, and nothing is left over.
 *   node tests/faults/relayed.ts [--only TEXT]... [--cut SECONDS]
 * Exit code 1 if a VM was lost or doubled, or if something was left over.
 */
import { openAsBlob } from 'node:fs';
import { readdir, readFile, stat, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import Table from 'cli-table3';
import { type LabCloudlet, LabFleet } from '../../src/lab/fleet.ts';
import { guestImage } from '../../src/lab/guests.ts';
import type { MigrationResult } from '../../src/model/migration.ts';
import { MiB } from '../../src/model/units.ts';

const { values } = parseArgs({
  options: { only: { type: 'string', multiple: true }, cut: { type: 'string', default: '30' } },
});
const patienceMs = 240_000;
const lentBytes = 256 * MiB;
const one = { params: { vm: 'one' } };

interface World {
  north: LabCloudlet;
  south: LabCloudlet;
  relays: LabCloudlet[];
  faultFile: string;
}

interface Fault {
  name: string;
  before?: (world: World) => Promise<unknown>;
  /** As soon as nothing of the VM is at the source any more. */
  atExit?: (world: World) => Promise<unknown>;
  /** When the VM is whole. */
  heal?: (world: World) => Promise<unknown>;
}

const cutMs = Number(values.cut) * 1000;
const faults: Fault[] = [
  {
    name: 'one relay of three is killed',
    atExit: ({ relays }) => relays[0]!.stop('SIGKILL'),
    heal: ({ relays }) => relays[0]!.start(),
  },
  {
    name: 'the source is killed right after the exit',
    atExit: ({ north }) => north.stop('SIGKILL'),
    heal: ({ north }) => north.start(),
  },
  {
    name: `the destination is cut off for ${values.cut} s while it merges`,
    atExit: async ({ relays, south }) => {
      const links = [south, ...relays].map(({ link }) => link!);
      for (const link of links) link.cut();
      await sleep(cutMs);
      for (const link of links) link.restore({ forget: true });
    },
  },
  {
    name: "the destination's daemon is killed while it merges",
    atExit: async ({ south }) => {
      await south.stop('SIGKILL');
      await south.start();
    },
  },
  {
    name: 'a relay returns wrong bytes',
    before: ({ faultFile }) => writeFile(faultFile, 'relay corrupt'),
    heal: ({ faultFile }) => writeFile(faultFile, ''),
  },
  {
    name: 'a relay is slow',
    atExit: async ({ relays }) => relays[0]!.link!.limit({ outBytesPerSecond: 20_000 }),
  },
  {
    name: 'a relay lies about its free memory',
    before: async ({ faultFile, relays }) => {
      await writeFile(faultFile, 'relay boast');
      await relays[0]!.viper.lendMemory({ body: { memoryBytes: 4 * MiB } });
    },
    heal: async ({ faultFile, relays }) => {
      await writeFile(faultFile, '');
      await relays[0]!.viper.lendMemory({ body: { memoryBytes: lentBytes } });
    },
  },
];

const load =
  'head -c 25165824 /dev/urandom >/dev/shm/own; md5sum /dev/shm/own >/run/own; ' +
  '(while :; do head -c 65536 /dev/urandom >/dev/shm/hot; md5sum </dev/shm/hot >/run/hot; ' +
  'md5sum </dev/shm/hot | cmp -s - /run/hot || echo bad >>/run/bad; echo >>/run/turns; done) </dev/null >/dev/null 2>&1 &';

const table = new Table({
  head: ['fault', 'exit, s', 'whole, s', 'slabs', 'wrong', 'fetched twice', 'guest', 'left over'],
  style: { head: [] },
});
let bad = 0;
{
  await using fleet = await LabFleet.create();
  const faultFile = path.join(fleet.root, 'fault');
  await writeFile(faultFile, '');
  const lends = { relayMemoryBytes: lentBytes };
  // With what stayed behind of the VM before it would be whole at once, and nothing left to go wrong.
  const forgets = { keptMemoryBytes: 0 };
  const world: World = {
    north: await fleet.add('north', forgets),
    south: await fleet.add('south', forgets, { proxied: true }),
    relays: [await fleet.add('r1', lends, { proxied: true, env: { VIPER_FAULT: faultFile } })],
    faultFile,
  };
  for (const name of ['r2', 'r3']) world.relays.push(await fleet.add(name, lends, { proxied: true }));
  await boot(world);
  for (const fault of faults.filter(({ name }) => values.only?.some((text) => name.includes(text)) ?? true)) {
    const { result, guest, leftovers } = await strike(world, fault);
    const { exitMs = 0, totalMs, relayed, merge } = result;
    const seconds = (ms: number) => (ms / 1000).toFixed(1);
    const times = merge ? [seconds(exitMs), seconds(totalMs)] : [seconds(exitMs), ''];
    table.push([
      fault.name,
      ...times,
      relayed?.slabs ?? 0,
      merge?.wrong ?? '',
      merge?.refetched ?? '',
      guest,
      leftovers.join('\n') || '0',
    ]);
    console.error(
      `${fault.name}: ${guest}; ${leftovers.join('; ')} ${JSON.stringify({ exitMs, relayed, merge })}`,
    );
    if (guest !== 'verified' || leftovers.length > 0) bad += 1;
  }
}
console.log(table.toString());
process.exitCode = bad > 0 ? 1 : 0;

async function boot({ north, south }: World): Promise<void> {
  for (const { viper } of [north, south])
    await viper.importImage({ body: await openAsBlob(guestImage('tiny')), query: { alias: 'tiny' } });
  const hardware = { memoryBytes: 128 * MiB, diskBytes: 64 * MiB, nets: [] };
  await north.viper.wait(await north.viper.createVm({ body: { name: 'one', image: 'tiny', hardware } }));
  await until('the guest', () => north.viper.getGuest(one).then(Boolean));
  await inGuest(north, load);
}

async function strike(world: World, fault: Fault) {
  const { north, south, relays } = world;
  await fault.before?.(world);
  south.link!.limit({ inBytesPerSecond: 2_000_000 });
  for (const { link } of relays) link!.limit({ outBytesPerSecond: 1_000_000 });
  const operation = await north.viper.migrateVm({ ...one, body: { to: 'south', engine: 'relayed' } });
  const migration = { params: { migration: operation.subject.migrationId! } };
  await north.viper.wait(operation, { timeoutMs: patienceMs });
  let result = (await north.viper.getMigration(migration)).result as MigrationResult;
  const vms = await readdir(path.join(north.directory, 'vms'));
  const isMerging = (await south.viper.getMigration(migration)).state === 'merging';
  await fault.atExit?.(world);
  await until('the merge', async () => (await south.viper.getMigration(migration)).over);
  await fault.heal?.(world);
  for (const { link } of [south, ...relays]) link!.limit({});
  // What its destination says at the end is lost if it was away.
  await sleep(500);
  result = (await north.viper.getMigration(migration)).result as MigrationResult;
  const leftovers = [
    ...vms.map((id) => `${id} at the source`),
    ...(isMerging ? [] : ['it was whole at the exit already']),
    ...(await leftOf(world)),
  ];
  const guest = await inGuest(south, 'md5sum -c /run/own && [ ! -e /run/bad ]').then(
    () => 'verified',
    (error) => `LOST: ${error}`,
  );
  const body = { to: 'north', mode: 'precopy', limits: { downtimeMs: 1000 } } as const;
  const back = await south.viper.migrateVm({ ...one, body });
  await south.viper.wait(back, { timeoutMs: patienceMs });
  // Its destination ends a moment after its source.
  const home = { params: { migration: back.subject.migrationId! } };
  await until('the way back', async () => (await north.viper.getMigration(home)).over);
  return { result, guest, leftovers };
}

async function leftOf({ south, relays }: World): Promise<string[]> {
  const left: string[] = [];
  const { id } = await south.viper.getVm(one);
  const manifest = path.join(south.directory, 'vms', id, 'manifest');
  if (await stat(manifest).then(Boolean, () => false)) left.push('the manifest');
  for (const { name, viper } of relays) {
    const deadline = Date.now() + 10_000;
    let { usedBytes } = await viper.getRelay();
    while (usedBytes > 0 && Date.now() < deadline) {
      await sleep(200);
      ({ usedBytes } = await viper.getRelay());
    }
    if (usedBytes > 0) left.push(`${usedBytes} bytes at ${name}`);
  }
  // A VM that runs at two places has two QEMUs.
  const found = (await readdir('/proc')).filter((pid) => /^\d+$/.test(pid));
  const lines = await Promise.all(
    found.map((pid) => readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '')),
  );
  const qemus = lines.filter((line) => line.includes(id) && line.split('\0')[0]!.includes('qemu-system'));
  if (qemus.length !== 1) left.push(`${qemus.length} QEMUs`);
  return left;
}

async function inGuest({ viper }: LabCloudlet, script: string): Promise<void> {
  const argv = ['/bin/sh', '-c', script];
  const { exitCode, stderr } = await viper.execInGuest({ ...one, body: { argv, timeoutMs: 60_000 } });
  if (exitCode !== 0) throw new Error(`${script} ended with ${exitCode}: ${stderr}`);
}

async function until(what: string, ask: () => Promise<unknown>): Promise<void> {
  const deadline = Date.now() + patienceMs;
  while (!(await ask().catch(() => false))) {
    if (Date.now() > deadline) throw new Error(`waited in vain for ${what}`);
    await sleep(100);
  }
}
