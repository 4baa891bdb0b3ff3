/** VMs for the tests of this folder: made in a directory of their own, and gone with it when the test ends. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdir, mkdtemp, readdir, rm } from 'node:fs/promises';
import { homedir, tmpdir } from 'node:os';
import { join } from 'node:path';
import { isUuid, newId } from '../../src/model/ids.ts';
import { GiB, MiB } from '../../src/model/units.ts';
import type { VmSpec } from '../../src/model/vm.ts';
import type { Launch } from '../../src/vm/argv.ts';
import { Machine } from '../../src/vm/machine.ts';
import { findQemu, killProcess, readProcess } from '../../src/vm/process.ts';

const cache = process.env.VIPER_CACHE ?? join(homedir(), '.cache', 'viper');
export const tinyImage = join(cache, 'guests', 'tiny.qcow2');

const prefix = 'viper-it-';
export const testMac = '02:00:00:00:00:01';

export const tinySpec: VmSpec = {
  machine: 'pc-q35-7.2',
  accelerator: 'tcg',
  cpu: { model: 'Nehalem', count: 2 },
  memoryBytes: 192 * MiB,
  disk: { image: `sha256:${'0'.repeat(64)}`, sizeBytes: GiB },
  nets: [{ network: 'user', mac: testMac }],
  seed: { hostname: 'tiny', sshKeys: [], addresses: [] },
};

/** Where the test's VMs live. Dispose of it and every QEMU of theirs is ended, whatever state the test left. */
export class Workshop implements AsyncDisposable {
  readonly directory: string;

  private constructor(directory: string) {
    this.directory = directory;
  }

  static async open(): Promise<Workshop> {
    await sweep();
    return new Workshop(await mkdtemp(join(tmpdir(), `${prefix}${process.pid}-`)));
  }

  /** A launch with a disk of its own: a new overlay on the tiny guest, or an empty disk. */
  async plan(options: { image?: 'tiny' | 'none'; incoming?: boolean } = {}): Promise<Launch> {
    const id = newId();
    const directory = join(this.directory, id);
    const diskFile = join(directory, 'disk.qcow2');
    await mkdir(directory);
    makeDisk(diskFile, options.image ?? 'none');
    const { incoming } = options;
    return { id, name: 'tiny', spec: tinySpec, accelerator: 'tcg', directory, diskFile, incoming };
  }

  /** A VM that has booted, with an agent that answers. */
  async boot(): Promise<Machine> {
    const machine = await Machine.launch(await this.plan({ image: 'tiny' }));
    await machine.resume();
    await machine.agent.waitUntilReady({ timeoutMs: 120_000 });
    return machine;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await clean(this.directory);
  }
}

/** A test that was killed could not clean up: the next one does it for those whose process is gone. */
async function sweep(): Promise<void> {
  for (const name of await readdir(tmpdir())) {
    const pid = new RegExp(`^${prefix}(\\d+)-`).exec(name)?.[1];
    if (pid && !(await readProcess(Number(pid)))) await clean(join(tmpdir(), name));
  }
}

/** Each VM has a directory that is called by its id, so its QEMU is found without us having started it. */
async function clean(directory: string): Promise<void> {
  for (const name of await readdir(directory)) {
    const left = isUuid(name) ? await findQemu(name) : null;
    if (left) await killProcess(left);
  }
  await rm(directory, { recursive: true, force: true });
}

export function makeDisk(file: string, image: 'tiny' | 'none'): void {
  const options = ['create', '-q', '-f', 'qcow2'];
  if (image === 'none') {
    execFileSync('qemu-img', [...options, file, '64M']);
    return;
  }
  assert.ok(existsSync(tinyImage), `${tinyImage} is missing; make it with: scripts/setup tiny`);
  execFileSync('qemu-img', [...options, '-b', tinyImage, '-F', 'qcow2', file, '1G']);
}

/** Runs a command line in the guest, which must succeed, and gives its output. */
export async function sh(machine: Machine, command: string): Promise<string> {
  const result = await machine.agent.exec({ argv: ['/bin/sh', '-c', command], timeoutMs: 60_000 });
  assert.equal(result.exitCode, 0, `${command}: ${result.stderr}`);
  return result.stdout.trim();
}

/** Asks until the answer satisfies; the test's own timeout bounds it. */
export async function until<T>(ask: () => Promise<T>, satisfies: (value: T) => boolean): Promise<T> {
  for (;;) {
    const value = await ask();
    if (satisfies(value)) return value;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}
