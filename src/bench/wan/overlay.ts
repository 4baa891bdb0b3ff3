/**
 * A VM that shares nothing with its destination but the image: its overlay holds 1 GB of its own, half of it in the page
 * cache as well. How many bytes travel, against the unique content of disk and memory together.
 */
import { open, readFile } from 'node:fs/promises';
import path from 'node:path';
import { statePaths } from '../../daemon/paths.ts';
import { MiB } from '../../model/units.ts';
import { contentSource } from '../../pages/index.ts';
import { openDiskContent } from '../../vm/disk-content.ts';
import type { Cell } from './grid.ts';
import { inBackground, type WarmGuest } from './guest.ts';
import { uniqueBeside } from './minimum.ts';
import { wanBytes } from './places.ts';
import { removeVms, type ViperWorld } from './viper.ts';

const vm = 'large';
const patienceMs = 400_000;
const files = 16;
const megabytesEach = 64;

export interface OverlayRun {
  at: string;
  commit: string;
  load: number;
  cell: Cell;
  totalMs: number;
  /** Of the engine, and all that went over the WAN. */
  engineBytes: number;
  wireBytes: number;
  uniqueBytes: number;
}

export async function runOverlay(
  world: ViperWorld,
  options: { guest: WarmGuest; boundMs: number },
): Promise<Pick<OverlayRun, 'totalMs' | 'engineBytes' | 'wireBytes' | 'uniqueBytes'>> {
  const { lab, source, destination } = world;
  await using undo = new AsyncDisposableStack();
  const created = await source.viper.createVm({ body: { name: vm, snapshot: 'warm' } });
  await source.viper.wait(created, { timeoutMs: patienceMs });
  undo.defer(() => removeVms(world));
  await fill(world);
  const uniqueBytes = await uniqueOf(world, options.guest);
  const bytesBefore = await wanBytes(lab);
  const beganMs = performance.now();
  const operation = await source.viper.migrateVm({ params: { vm }, body: { to: destination.name } });
  await source.viper.wait(operation, { timeoutMs: options.boundMs });
  const totalMs = performance.now() - beganMs;
  const wireBytes = (await wanBytes(lab)) - bytesBefore;
  const migration = operation.subject.migrationId!;
  const { result } = await source.viper.getMigration({ params: { migration } });
  return { totalMs, wireBytes, uniqueBytes, engineBytes: result?.condensed?.wireBytes ?? 0 };
}

async function fill({ source }: ViperWorld): Promise<void> {
  const run = async (script: string): Promise<string> => {
    const body = { argv: ['/bin/sh', '-c', script] as [string, ...string[]], timeoutMs: 60_000 };
    const reply = await source.viper.execInGuest({ params: { vm }, body });
    if (reply.exitCode !== 0) throw new Error(`the guest at '${script}': ${reply.stderr}`);
    return reply.stdout;
  };
  const program = (await readFile(path.join(import.meta.dirname, 'filler.py'))).toString('base64');
  await run(`echo ${program} | base64 -d >/root/filler.py`);
  const half = Array.from({ length: files / 2 }, (_, name) => `/root/filled/${name}`).join(' ');
  const steps = [
    `python3 /root/filler.py /root/filled ${files} ${megabytesEach}`,
    'echo 3 >/proc/sys/vm/drop_caches',
    `cat ${half} >/dev/null`,
    'sync',
    'touch /run/filled',
  ].join(' && ');
  await run(inBackground(`sh -c '${steps}'`, 'filler'));
  const deadline = performance.now() + patienceMs;
  while ((await run('test -e /run/filled && echo yes || sleep 2')).trim() !== 'yes')
    if (performance.now() > deadline)
      throw new Error(`the guest was not filled: ${await run('cat /run/filler.log')}`);
}

/** While the VM stands still. */
async function uniqueOf({ source }: ViperWorld, guest: WarmGuest): Promise<number> {
  const params = { vm };
  await source.viper.wait(await source.viper.pauseVm({ params }), { timeoutMs: patienceMs });
  const { id, pid } = await source.viper.getVm({ params });
  const disk = path.join(statePaths(source.directory).vm(id), 'disk.qcow2');
  await using content = await openDiskContent(disk, 'qcow2');
  const { signal } = new AbortController();
  async function* blocks(): AsyncIterable<Buffer> {
    for await (const { bytes } of contentSource(content).pieces(signal)) yield Buffer.from(bytes);
  }
  const { bytes } = await uniqueBeside(guest.imageFile, [blocks(), memoryOf(pid!, guest.spec.memoryBytes)]);
  await source.viper.wait(await source.viper.resumeVm({ params }), { timeoutMs: patienceMs });
  return bytes;
}

/** The mapping of the QEMU that is as large as the guest's memory. */
async function* memoryOf(pid: number, memoryBytes: number): AsyncIterable<Buffer> {
  const maps = await readFile(`/proc/${pid}/maps`, 'utf8');
  const start = maps
    .split('\n')
    .map((line) => /^([0-9a-f]+)-([0-9a-f]+) /.exec(line))
    .filter((match) => match !== null)
    .map(([, from, to]) => [Number.parseInt(from!, 16), Number.parseInt(to!, 16)] as const)
    .find(([from, to]) => to - from >= memoryBytes)?.[0];
  if (start === undefined) throw new Error(`QEMU ${pid} has no mapping of ${memoryBytes} bytes`);
  await using memory = await open(`/proc/${pid}/mem`, 'r');
  for (let at = 0; at < memoryBytes; at += MiB) {
    const { buffer } = await memory.read(Buffer.alloc(MiB), 0, MiB, start + at);
    yield buffer;
  }
}
