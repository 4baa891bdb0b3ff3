/** What the tests of whole daemons ask of them, through the SDK: tiny guests, refusals by code, and that nothing is left. */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { existsSync, openAsBlob, readdirSync, readFileSync, rmSync } from 'node:fs';
import { readdir } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { inspect, promisify } from 'node:util';
import { type LabCloudlet, LabFleet } from '../../src/lab/fleet.ts';
import { guestImage } from '../../src/lab/guests.ts';
import type { Uuid } from '../../src/model/ids.ts';
import { MiB } from '../../src/model/units.ts';
import {
  type Guest,
  type Image,
  type NodeViper,
  type Operation,
  ViperError,
  type ViperErrorCode,
  type ViperEvent,
} from '../../src/sdk/node.ts';
import { findQemu } from '../../src/vm/process.ts';

/** Long enough for a machine that is five times slower than usual; nothing waits so long unless it fails. */
export const patienceMs = 180_000;

/** A fleet for one test file, which disposes of it. A test run that is interrupted leaves nothing of it either. */
export async function openFleet(): Promise<LabFleet> {
  const fleet = await LabFleet.create();
  process.once('exit', () => sweep(fleet));
  return fleet;
}

/** What can be done while the process ends: nothing that waits. */
function sweep({ root, cloudlets }: LabFleet): void {
  if (!existsSync(root)) return;
  for (const { pid } of cloudlets) if (pid !== undefined) process.kill(pid, 'SIGKILL');
  for (const { pid } of qemusUnder(root)) process.kill(pid, 'SIGKILL');
  rmSync(root, { recursive: true, force: true });
}

const program = path.resolve(import.meta.dirname, '../../src/daemon/main.ts');

/** Runs the daemon's program to its end, which must come by itself. */
export async function runViper(...argv: string[]): Promise<{ code: number; stdout: string; stderr: string }> {
  const ended = await promisify(execFile)(process.execPath, [program, ...argv], {
    timeout: patienceMs,
  }).catch((error) => error);
  return { code: 0, ...ended, stdout: ended.stdout, stderr: ended.stderr };
}

/** Asks until the answer satisfies. An error counts as an answer that does not. */
export async function until<T>(
  what: string,
  ask: () => Promise<T> | T,
  satisfies: (value: T) => boolean = Boolean,
): Promise<T> {
  const deadline = Date.now() + patienceMs;
  let last: unknown;
  while (Date.now() < deadline) {
    try {
      const value = await ask();
      if (satisfies(value)) return value;
      last = value;
    } catch (error) {
      last = error;
    }
    await sleep(50);
  }
  throw new Error(
    `waited ${patienceMs} ms in vain for ${what}; the last answer was ${inspect(last, { depth: 4 })}`,
    {
      cause: last,
    },
  );
}

/** The refusal with which the call ends; the test fails if it succeeds or ends in another way. */
export async function refused(call: Promise<unknown>, code: ViperErrorCode): Promise<ViperError> {
  const error = await call.then(
    () => assert.fail(`the call succeeded, wanted ${code}`),
    (thrown: unknown) => thrown,
  );
  if (!(error instanceof ViperError)) throw error;
  assert.equal(error.code, code, error.message);
  return error;
}

export async function importTiny(viper: NodeViper, alias = 'tiny'): Promise<Image> {
  const file = guestImage('tiny');
  assert.ok(existsSync(file), `${file} is missing; make it with: scripts/setup tiny`);
  return viper.importImage({ body: await openAsBlob(file), query: { alias } });
}

/** The VM's id, once the operation that makes or changes it has succeeded. */
export async function done(viper: NodeViper, asked: Promise<Operation>): Promise<Uuid> {
  const { subject } = await viper.wait(await asked, { timeoutMs: patienceMs });
  return subject.vmId!;
}

/** Waits until the guest has booted; gives what it says of itself. */
export const booted = (viper: NodeViper, vm: string): Promise<Guest> =>
  until(`the agent of ${vm}`, () => viper.getGuest({ params: { vm } }));

/** Runs a command line in the guest, which must succeed, and gives its output. */
export async function sh(viper: NodeViper, vm: string, command: string): Promise<string> {
  const argv = ['/bin/sh', '-c', command];
  const reply = await viper.execInGuest({ params: { vm }, body: { argv, timeoutMs: 60_000 } });
  assert.equal(reply.exitCode, 0, `${command}: ${reply.stderr}`);
  return reply.stdout.trim();
}

/** Seconds that the guest has run. */
export const ticks = async (viper: NodeViper, vm: string): Promise<number> =>
  Number(await sh(viper, vm, 'cat /run/ticks'));

export const untilTicksPass = (viper: NodeViper, vm: string, count: number): Promise<number> =>
  until(
    `more than ${count} ticks of ${vm}`,
    () => ticks(viper, vm),
    (now) => now > count,
  );

export const directoryOf = (cloudlet: LabCloudlet, id: Uuid): string =>
  path.join(cloudlet.directory, 'vms', id);

/** No process, no directory and no record is left of the VM. */
export async function assertGone(cloudlet: LabCloudlet, id: Uuid): Promise<void> {
  assert.equal(await findQemu(id), null, `QEMU of ${id} is left`);
  assert.equal(existsSync(directoryOf(cloudlet, id)), false, `the directory of ${id} is left`);
  await refused(cloudlet.viper.getVm({ params: { vm: id } }), 'not_found');
}

/** A disk that QEMU starts from and that no guest is on. */
export function importEmpty(viper: NodeViper): Promise<Image> {
  const disk = Buffer.alloc(MiB);
  disk.set([0x55, 0xaa], 510);
  return viper.importImage({ body: new Blob([disk]), query: { alias: 'empty' } });
}

/** What no crash may break: each VM rests or runs, and nothing is there that no record knows. */
export async function assertWhole(cloudlet: LabCloudlet): Promise<void> {
  const vms = (await cloudlet.viper.listVms()).items;
  for (const { id, name } of vms) {
    const { state, pid, operationId } = await cloudlet.viper.getVm({ params: { vm: id } });
    assert.ok(['running', 'paused', 'stopped', 'crashed'].includes(state), `${name} is ${state}`);
    assert.equal(operationId, undefined);
    assert.equal((await findQemu(id))?.pid, pid, `${name} is ${state}`);
  }
  const snapshots = (await cloudlet.viper.listSnapshots()).items;
  const names = (directory: string) =>
    readdir(path.join(cloudlet.directory, directory)).then(
      (found) => found.sort(),
      () => [],
    );
  assert.deepEqual(await names('vms'), vms.map(({ id }) => id).sort());
  assert.deepEqual(await names('snapshots'), snapshots.map(({ id }) => id).sort());
  assert.deepEqual(await names('captures'), []);
  assert.deepEqual(await names('images/tmp'), []);
  const images = (await cloudlet.viper.listImages()).items.map(({ digest }) => digest.replace(':', '-'));
  assert.deepEqual(await names('images'), [...images, 'tmp'].sort());
  for await (const { id, state } of cloudlet.viper.pages(cloudlet.viper.listOperations))
    assert.notEqual(state, 'running', `operation ${id} never ends`);
  for (const { id } of qemusUnder(cloudlet.directory))
    assert.ok(
      vms.some((vm) => vm.id === id),
      `a QEMU of nobody (${id}) runs`,
    );
}

/** Every QEMU that runs with files of the directory, whether a record knows it or not. */
function qemusUnder(directory: string): { pid: number; id: Uuid }[] {
  return readdirSync('/proc').flatMap((entry) => {
    if (!/^\d+$/.test(entry)) return [];
    let argv: string[];
    try {
      argv = readFileSync(`/proc/${entry}/cmdline`, 'utf8').split('\0');
    } catch {
      // It has ended meanwhile.
      return [];
    }
    const isOurs = argv[0]!.includes('qemu-system') && argv.some((each) => each.includes(`${directory}/`));
    return isOurs ? [{ pid: Number(entry), id: argv[argv.indexOf('-uuid') + 1]! }] : [];
  });
}

/** Keeps every event from `after` on, over restarts of the daemon, until it is disposed. */
export class EventRecorder implements AsyncDisposable {
  readonly events: ViperEvent[] = [];
  readonly #waiting = new Set<(event: ViperEvent) => void>();
  readonly #stop = new AbortController();
  readonly #recording: Promise<void>;

  constructor(viper: NodeViper, after = 0) {
    this.#recording = this.#record(viper, after);
    this.#recording.catch(() => {});
  }

  async #record(viper: NodeViper, after: number): Promise<void> {
    const { signal } = this.#stop;
    try {
      for await (const event of viper.events({ after, signal })) {
        this.events.push(event);
        for (const look of this.#waiting) look(event);
      }
    } catch (error) {
      if (!signal.aborted) throw error;
    }
  }

  /** The first event that fits, be it past or to come. */
  async first(what: string, fits: (event: ViperEvent) => boolean): Promise<ViperEvent> {
    const { promise, resolve, reject } = Promise.withResolvers<ViperEvent>();
    const look = (event: ViperEvent): void => {
      if (fits(event)) resolve(event);
    };
    const inVain = () => reject(new Error(`waited ${patienceMs} ms in vain for ${what}`));
    const timer = setTimeout(inVain, patienceMs);
    this.#waiting.add(look);
    this.#recording.catch(reject);
    this.events.forEach(look);
    try {
      return await promise;
    } finally {
      clearTimeout(timer);
      this.#waiting.delete(look);
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#stop.abort();
    await this.#recording.catch(() => {});
  }
}
