/** What is true of a VM, seen from outside of every daemon: its processes, whether their vCPUs run, its files. */
import { readdir, readFile } from 'node:fs/promises';
import path from 'node:path';
import { QmpConnection } from '../../src/qmp/index.ts';

/** The pids of the QEMUs that run this VM, or wait for it, in that state directory. */
export async function qemusOf(vmId: string, directory: string): Promise<number[]> {
  const found: number[] = [];
  for (const entry of await readdir('/proc')) {
    if (!/^\d+$/.test(entry)) continue;
    const argv = (await readFile(`/proc/${entry}/cmdline`, 'utf8').catch(() => '')).split('\0');
    const isHere = argv.some((argument) => argument.includes(`${directory}/`));
    if (isHere && argv[argv.indexOf('-uuid') + 1] === vmId && argv[0]?.includes('qemu-system'))
      found.push(Number(entry));
  }
  return found;
}

/** Clock ticks that the vCPUs of this QEMU have used. Only those of a VM that runs use any. */
export async function vcpuTicks(pid: number): Promise<number> {
  let ticks = 0;
  for (const thread of await readdir(`/proc/${pid}/task`).catch(() => [])) {
    const stat = await readFile(`/proc/${pid}/task/${thread}/stat`, 'utf8').catch(() => '');
    if (!stat.includes('(CPU ')) continue;
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    ticks += Number(fields[14 - 3]) + Number(fields[15 - 3]);
  }
  return ticks;
}

/** What a migration may leave in a QEMU; no daemon may hold its monitor meanwhile. */
export async function tracesInQemu(vmDirectory: string): Promise<string[]> {
  await using qmp = await QmpConnection.connect(path.join(vmDirectory, 'qmp.sock'), { timeoutMs: 20_000 });
  const traces: string[] = [];
  for (const { device } of await qmp.execute('query-block-jobs')) traces.push(`block job ${device}`);
  for (const node of await qmp.execute('query-named-block-nodes', { flat: true })) {
    if (node.drv === 'nbd') traces.push(`NBD node ${node['node-name']}`);
    const bitmaps = (node as { 'dirty-bitmaps'?: { name?: string }[] })['dirty-bitmaps'] ?? [];
    for (const { name } of bitmaps) traces.push(`bitmap ${name ?? '?'}`);
  }
  // Not in the command map: only here is it asked for.
  const ask = qmp.execute as unknown as (command: string) => Promise<{ id: string }[]>;
  for (const { id } of await ask.call(qmp, 'query-block-exports')) traces.push(`NBD export ${id}`);
  for (const { capability, state } of await qmp.execute('query-migrate-capabilities'))
    if (state) traces.push(`capability ${capability}`);
  return traces;
}

export const filesIn = (directory: string): Promise<string[]> =>
  readdir(directory).then(
    (names) => names.sort(),
    () => [],
  );
