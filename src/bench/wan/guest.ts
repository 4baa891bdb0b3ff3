/**
 * The guest of the bench, made once and kept in the cache: 2 GB of RAM, a Debian that has booted (`golden`), and the
 * same VM warm: an application with about 100 MB of records and an SQLite in memory, and a page cache that holds every
 * file of its disk. Each run starts from `warm`, so all of them move the same pages.
 */
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { mkdir, readFile, realpath, rename, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { pipeline } from 'node:stream/promises';
import { guestImage } from '../../lab/guests.ts';
import type { Lab } from '../../lab/lab.ts';
import { newId } from '../../model/ids.ts';
import { GiB } from '../../model/units.ts';
import type { VmSpec } from '../../model/vm.ts';
import { backupDisk } from '../../vm/backup.ts';
import { untilCalm } from '../../vm/calm.ts';
import { createDisk } from '../../vm/disks.ts';
import { Host } from '../../vm/host.ts';
import { Machine } from '../../vm/machine.ts';
import { captureMemoryToFile } from '../../vm/memory-file.ts';
import { createSeed } from '../../vm/seed.ts';
import { addTap, qemuIn } from './places.ts';

export const echoPort = 7001;
export const guestAddress = '10.1.0.150';
const streamPort = 7002;
const mac = '02:00:0a:02:00:01';
const tap = 'guest0';
const patienceMs = 300_000;
const programs = {
  'app.py': path.join(import.meta.dirname, 'app.py'),
  'writer.py': path.join(import.meta.dirname, 'writer.py'),
  'servers.py': path.join(import.meta.dirname, '../../lab/probes/servers.py'),
};

/** RAM and disk at one moment; the disk is an overlay on the guest's image. */
export interface Moment {
  memory: string;
  disk: string;
}

export interface WarmGuest {
  spec: VmSpec;
  imageFile: string;
  golden: Moment;
  warm: Moment;
}

const momentIn = (directory: string, name: string): Moment => ({
  memory: path.join(directory, `${name}.memory`),
  disk: path.join(directory, `${name}.qcow2`),
});

/** From the cache, or made at the first cloudlet of the lab, which takes some minutes. */
export async function warmGuest(lab: Lab, say: (text: string) => void): Promise<WarmGuest> {
  const imageFile = await realpath(guestImage('debian'));
  const directory = path.join(path.dirname(imageFile), '..', 'bench');
  const facts = path.join(directory, 'wan.json');
  const madeFrom = await madeFromWhat(imageFile);
  const known = await readFile(facts, 'utf8').then(JSON.parse, () => undefined);
  const moments = { golden: momentIn(directory, 'golden'), warm: momentIn(directory, 'warm') };
  if (known?.madeFrom === madeFrom) return { spec: known.spec, imageFile, ...moments };
  await rm(directory, { recursive: true, force: true });
  await mkdir(directory, { recursive: true });
  say('making the guest: it boots, then reads its disk');
  const spec = specOf(await digestOf(imageFile));
  await make(lab, spec, imageFile, moments);
  await writeFile(`${facts}.new`, JSON.stringify({ madeFrom, spec }));
  await rename(`${facts}.new`, facts);
  return { spec, imageFile, ...moments };
}

async function madeFromWhat(imageFile: string): Promise<string> {
  const hash = createHash('sha256').update(imageFile);
  for (const file of [...Object.values(programs), import.meta.filename]) hash.update(await readFile(file));
  return hash.digest('hex');
}

async function digestOf(file: string): Promise<string> {
  const hash = createHash('sha256');
  await pipeline(createReadStream(file, { highWaterMark: 1 << 20 }), hash);
  return `sha256:${hash.digest('hex')}`;
}

const specOf = (image: string): VmSpec => ({
  machine: 'pc-q35-7.2',
  accelerator: 'auto',
  cpu: { model: 'Nehalem-v1', count: 1 },
  memoryBytes: 2 * GiB,
  disk: { image, sizeBytes: 3 * GiB },
  nets: [{ network: 'lan', mac }],
  seed: {
    hostname: 'bench',
    sshKeys: [],
    addresses: [{ mac, address: `${guestAddress}/24`, gateway: '10.1.0.1' }],
  },
});

async function make(
  lab: Lab,
  spec: VmSpec,
  imageFile: string,
  { golden, warm }: Record<'golden' | 'warm', Moment>,
): Promise<void> {
  const { signal } = new AbortController();
  const directory = path.join(lab.directory, 'make');
  await mkdir(directory);
  const overlay = (file: string) =>
    createDisk({ file, imageFile, imageFormat: 'qcow2', sizeBytes: spec.disk.sizeBytes, signal });
  const [diskFile, seedFile] = [path.join(directory, 'disk.qcow2'), path.join(directory, 'seed.iso')];
  const id = newId();
  await overlay(diskFile);
  await createSeed({ file: seedFile, spec: spec.seed, instanceId: id, macs: [mac], signal });
  await using undo = new AsyncDisposableStack();
  undo.defer(() => rm(directory, { recursive: true, force: true }));
  undo.use(await addTap(lab, 'c1', tap));
  const { accelerator } = await new Host().facts();
  const qemu = await qemuIn(lab, 'c1');
  const launch = { id, name: 'bench', spec, accelerator, directory, diskFile, seedFile, taps: [tap] };
  const machine = await Machine.launch(launch, { qemu });
  undo.defer(async () => void (await machine.kill()));
  const calm = () => untilCalm(machine.process, { timeoutMs: 60_000, signal });
  const capture = async ({ memory, disk }: Moment): Promise<void> => {
    await overlay(disk);
    let copied: Promise<void> | undefined;
    const whenStopped = async () => {
      copied = (await backupDisk(machine, { targetFile: disk })).done;
    };
    await captureMemoryToFile(machine, { file: memory, whenStopped, signal });
    await copied;
  };
  await machine.resume();
  await machine.agent.waitUntilReady({ timeoutMs: patienceMs });
  await calm();
  await capture(golden);
  await warmUp(machine);
  await calm();
  await capture(warm);
}

async function warmUp({ agent }: Machine): Promise<void> {
  const run = async (script: string, input?: string): Promise<string> => {
    const argv: [string, ...string[]] = ['/bin/sh', '-c', script];
    const reply = await agent.exec({
      argv,
      timeoutMs: patienceMs,
      ...(input === undefined ? {} : { input }),
    });
    if (reply.exitCode !== 0) throw new Error(`the guest at '${script}': ${reply.stderr}`);
    return reply.stdout;
  };
  for (const [name, file] of Object.entries(programs))
    await run(`cat >/root/${name}`, await readFile(file, 'utf8'));
  await run(inBackground(`python3 /root/servers.py ${echoPort} ${streamPort}`, 'servers'));
  await run(inBackground('python3 /root/app.py', 'app'));
  await run('while ! grep -q ready /run/app.log; do sleep 1; done');
  await run('find / -xdev -type f -exec cat {} + >/dev/null 2>&1 || true; sync');
}

/** A program of the guest that outlives the agent's call. */
export const inBackground = (program: string, name: string): string =>
  `setsid ${program} </dev/null >/run/${name}.log 2>&1 & sleep 0.1`;
