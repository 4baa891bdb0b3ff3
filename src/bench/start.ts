/**
 * `npm run bench:start`: from the request to a guest whose agent answers, by booting and from a golden snapshot, in
 * turns; and what of a boot is ours: everything between the request and running vCPUs but the start of QEMU itself,
 * which is measured by starting the same QEMU by hand.
 */
import { openAsBlob } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { LabFleet } from '../lab/fleet.ts';
import { guestImage } from '../lab/guests.ts';
import type { CreateVm, NodeViper } from '../sdk/node.ts';
import { Machine } from '../vm/machine.ts';
import { median, table } from './report.ts';

const guest = process.argv.includes('--tiny') ? 'tiny' : 'debian';
const instanceType = guest === 'tiny' ? 'tiny' : 'small';
const rounds = 5;

interface Times {
  /** From the request to running vCPUs. */
  runningMs: number;
  /** From the request to the first answer of the guest agent. */
  readyMs: number;
}

async function measure(viper: NodeViper, body: CreateVm): Promise<Times> {
  const began = performance.now();
  await viper.wait(await viper.createVm({ body }));
  const runningMs = performance.now() - began;
  for (;;) {
    const answers = await viper.getGuest({ params: { vm: body.name } }).then(
      () => true,
      () => false,
    );
    if (answers) break;
  }
  const readyMs = performance.now() - began;
  await viper.wait(await viper.deleteVm({ params: { vm: body.name }, query: { force: true } }));
  return { runningMs, readyMs };
}

/** QEMU alone: from its start to an answering monitor and running vCPUs, with the spec that the VM had. */
async function startQemuAlone(viper: NodeViper): Promise<number> {
  const name = 'alone';
  await viper.wait(await viper.createVm({ body: { name, image: guest, instanceType, start: false } }));
  const { id, spec } = await viper.getVm({ params: { vm: name } });
  const directory = await mkdtemp(path.join(tmpdir(), 'viper-alone-'));
  try {
    const began = performance.now();
    const machine = await Machine.launch({
      id,
      name,
      spec,
      accelerator: (await viper.getCloudlet()).accelerator,
      directory,
      diskFile: path.join(cloudlet.directory, 'vms', id, 'disk.qcow2'),
    });
    await machine.resume();
    const tookMs = performance.now() - began;
    await machine.kill();
    return tookMs;
  } finally {
    await rm(directory, { recursive: true, force: true });
    await viper.wait(await viper.deleteVm({ params: { vm: name } }));
  }
}

await using fleet = await LabFleet.create();
const cloudlet = await fleet.add('bench');
const { viper } = cloudlet;
await viper.importImage({ body: await openAsBlob(guestImage(guest)), query: { alias: guest } });
await viper.wait(await viper.createSnapshot({ body: { name: 'golden', image: guest, instanceType } }));

const boots: Times[] = [];
const golden: Times[] = [];
const alone: number[] = [];
for (let round = 0; round < rounds; round += 1) {
  alone.push(await startQemuAlone(viper));
  boots.push(await measure(viper, { name: 'booted', image: guest, instanceType }));
  golden.push(await measure(viper, { name: 'woken', snapshot: 'golden' }));
}

const ms = (value: number): string => value.toFixed(0);
const running = (times: Times[]): number => median(times.map((each) => each.runningMs));
const ready = (times: Times[]): number => median(times.map((each) => each.readyMs));
console.log(`guest ${guest}, ${rounds} rounds in turns, medians in ms\n`);
console.log(
  table(
    ['start', 'vCPUs run', 'agent answers', 'times faster than a boot'],
    [
      ['boot', ms(running(boots)), ms(ready(boots)), '1.0'],
      ['golden snapshot', ms(running(golden)), ms(ready(golden)), (ready(boots) / ready(golden)).toFixed(1)],
    ],
  ),
);
console.log(`\nQEMU alone, started by hand: ${ms(median(alone))} ms until its vCPUs run`);
console.log(`ours, create to running without that: ${ms(running(boots) - median(alone))} ms`);
