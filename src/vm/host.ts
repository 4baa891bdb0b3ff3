/** What this host and its QEMU can do, and whether a VM spec fits them: asked before anything is started. */
import { spawn } from 'node:child_process';
import { constants } from 'node:fs';
import { access, readFile } from 'node:fs/promises';
import { availableParallelism } from 'node:os';
import { delimiter, join } from 'node:path';
import { Duplex } from 'node:stream';
import { AppError } from '../model/errors.ts';
import { KiB } from '../model/units.ts';
import type { Accelerator, VmSpec } from '../model/vm.ts';
import { QmpConnection } from '../qmp/index.ts';
import { type AcceleratorFacts, chooseAccelerator, readAcceleratorFacts } from './accelerator.ts';
import { maxNets } from './argv.ts';

export interface QemuFacts {
  path: string;
  /** Such as '10.0.2'. */
  version: string;
  /** Versioned machine types that Viper can lay out, newest last. */
  machines: { name: string; maxCpus: number }[];
  cpuModels: string[];
  /** Features that a model has and a VM of it would not get here, with the accelerator that 'auto' gives. */
  missingCpuFeatures: Record<string, string[]>;
  /** Its host lets it serve pages when a guest asks for them (userfaultfd). */
  canPostcopy: boolean;
}

export interface HostFacts {
  qemu: QemuFacts;
  cpus: number;
  memory: { totalBytes: number; availableBytes: number };
  /** What 'auto' gives here. */
  accelerator: Accelerator;
  acceleratorFacts: AcceleratorFacts;
}

const probeTimeoutMs = 30_000;

/** The host, seen through one QEMU binary. What a binary can do is asked once. */
export class Host {
  readonly #program: string;
  #qemu: Promise<QemuFacts> | undefined;

  constructor(program = 'qemu-system-x86_64') {
    this.#program = program;
  }

  async facts(signal?: AbortSignal): Promise<HostFacts> {
    const acceleratorFacts = await readAcceleratorFacts();
    const accelerator = chooseAccelerator('auto', acceleratorFacts);
    const [qemu, memory] = await Promise.all([this.#readQemu(accelerator, signal), readMemory()]);
    return { qemu, cpus: availableParallelism(), memory, accelerator, acceleratorFacts };
  }

  #readQemu(accelerator: Accelerator, signal?: AbortSignal): Promise<QemuFacts> {
    this.#qemu ??= probeQemu(this.#program, accelerator, signal).catch((error) => {
      // Perhaps it gets installed; the next one asks again.
      this.#qemu = undefined;
      throw error;
    });
    return this.#qemu;
  }
}

/** Versioned q35: the layout of `argv.ts` is for this board, and an alias would differ between hosts. */
const machinePattern = /^pc-q35-(\d+)\.(\d+)$/;
/** These are what the host happens to be, so they name nothing on another host. */
const hostCpus = ['host', 'max', 'base'];

/** Throws `unsupported` with `field`, `value` and `wanted` for the first thing that this host lacks. */
export function checkSpec(spec: VmSpec, facts: Pick<HostFacts, 'qemu' | 'acceleratorFacts'>): Accelerator {
  const { version, machines, cpuModels } = facts.qemu;
  const names = machines.map(({ name }) => name);
  const machine = machines.find(({ name }) => name === spec.machine);
  if (!machine) {
    const why = machinePattern.test(spec.machine)
      ? `QEMU ${version} does not have it`
      : 'it is not a versioned q35 type';
    throw lacks('machine', spec.machine, names, why);
  }
  const { model, count } = spec.cpu;
  if (hostCpus.includes(model))
    throw lacks('cpu.model', model, cpuModels, 'it means another CPU on each host');
  if (!cpuModels.includes(model))
    throw lacks('cpu.model', model, cpuModels, `QEMU ${version} does not have it`);
  if (count > machine.maxCpus) {
    throw lacks('cpu.count', count, `at most ${machine.maxCpus}`, `${machine.name} has no more`);
  }
  if (spec.nets.length > maxNets) {
    throw lacks('nets', spec.nets.length, `at most ${maxNets}`, 'a VM has no more interfaces');
  }
  return chooseAccelerator(spec.accelerator, facts.acceleratorFacts);
}

function lacks(field: string, value: unknown, wanted: unknown, why: string): AppError {
  return new AppError('unsupported', `This host cannot run a VM with ${field} ${value}: ${why}`, {
    field,
    value,
    wanted,
  });
}

/** Asks a QEMU without a machine, over its standard input and output. */
async function probeQemu(
  program: string,
  accelerator: Accelerator,
  signal?: AbortSignal,
): Promise<QemuFacts> {
  const path = await findProgram(program);
  const argv = [
    '-machine',
    'none',
    '-accel',
    accelerator,
    '-nodefaults',
    '-no-user-config',
    '-display',
    'none',
    '-S',
    '-qmp',
    'stdio',
    // Only one that is to receive a VM looks whether it may do post-copy.
    '-incoming',
    'defer',
  ];
  // QEMU does not notice that nobody asks it any more; `timeout` ends it should we die meanwhile.
  const child = spawn('timeout', [String(probeTimeoutMs / 1000), path, ...argv], {
    stdio: ['pipe', 'pipe', 'ignore'],
  });
  const gone = Promise.withResolvers<void>();
  child.once('exit', () => gone.resolve());
  child.once('error', () => gone.resolve());
  try {
    const stream = Duplex.from({ readable: child.stdout, writable: child.stdin });
    await using qmp = await QmpConnection.over(stream, { timeoutMs: probeTimeoutMs, signal });
    const machines = await qmp.execute('query-machines', undefined, { signal });
    const models = await qmp.execute('query-cpu-definitions', undefined, { signal });
    const capabilities = [{ capability: 'postcopy-ram', state: true } as const];
    const canPostcopy = await qmp.execute('migrate-set-capabilities', { capabilities }, { signal }).then(
      () => true,
      () => false,
    );
    const { major, minor, micro } = qmp.version;
    return {
      path,
      version: `${major}.${minor}.${micro}`,
      machines: machines
        .filter(({ name }) => machinePattern.test(name))
        .map((machine) => ({ name: machine.name, maxCpus: machine['cpu-max'] }))
        .sort(byVersion),
      cpuModels: models.map(({ name }) => name).sort(),
      missingCpuFeatures: Object.fromEntries(
        models.map(({ name, 'unavailable-features': features = [] }) => [name, features]),
      ),
      canPostcopy,
    };
  } finally {
    // Passed on to QEMU, which ends at once.
    child.kill('SIGTERM');
    await gone.promise;
  }
}

const byVersion = (a: { name: string }, b: { name: string }): number =>
  a.name.localeCompare(b.name, 'en', { numeric: true });

async function findProgram(program: string): Promise<string> {
  const directories = program.includes('/') ? [''] : (process.env.PATH ?? '').split(delimiter);
  for (const directory of directories) {
    const path = directory === '' ? program : join(directory, program);
    const isThere = await access(path, constants.X_OK).then(
      () => true,
      () => false,
    );
    if (isThere) return path;
  }
  throw new AppError('unsupported', `${program} is not installed on this host`, { missing: program });
}

async function readMemory(): Promise<HostFacts['memory']> {
  const text = await readFile('/proc/meminfo', 'utf8');
  const bytes = (key: string): number =>
    Number(new RegExp(`^${key}:\\s+(\\d+) kB`, 'm').exec(text)?.[1] ?? 0) * KiB;
  return { totalBytes: bytes('MemTotal'), availableBytes: bytes('MemAvailable') };
}
