/**
 * What is known of a lab between two commands: one directory, and in it one file that says what the lab is and who
 * made it. It is there before anything else is made and goes after everything else, so that a lab whose maker was
 * killed is found and taken away. Where a device is and which processes run is not written down: the kernel knows.
 */
import { mkdir, readdir, readFile, rename, rm, rmdir, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { AppError } from '../model/errors.ts';
import type { ProcessRef } from '../model/vm.ts';
import { isAlive, readProcess } from '../vm/process.ts';
import type { LabSpec, WireSettings } from './spec.ts';
import type { Emulator } from './wire.ts';

export interface LabRecord {
  spec: LabSpec;
  subnet: number;
  emulator: Emulator;
  maker: ProcessRef;
  /** Of the boot of the machine: none of the lab outlives it. */
  bootId: string;
  /** It is meant to outlive its maker. */
  stays: boolean;
  /** All of it has been made. */
  isReady: boolean;
}

/** All labs of this machine; short, since unix sockets lie in it. */
export const labsDirectory = (): string => process.env.VIPER_LABS ?? '/var/lib/viper-labs';

export const directoryOf = (lab: string): string => path.join(labsDirectory(), lab);

export async function newRecord(facts: Pick<LabRecord, 'spec' | 'subnet' | 'emulator'>): Promise<LabRecord> {
  const maker = (await readProcess(process.pid))!;
  return { ...facts, maker, bootId: await bootId(), stays: false, isReady: false };
}

/** Makes the lab's directory. Throws `name_taken` if there is one of that name. */
export async function claimDirectory(record: LabRecord): Promise<void> {
  const { name } = record.spec;
  // It appears with the record in it, so that nobody takes one in the making for one left behind.
  const making = path.join(labsDirectory(), `.${name}.${process.pid}`);
  await rm(making, { recursive: true, force: true });
  await mkdir(making, { recursive: true, mode: 0o700 });
  try {
    await writeFile(path.join(making, recordName), JSON.stringify(record));
    await rename(making, directoryOf(name));
  } catch (error) {
    await rm(making, { recursive: true, force: true });
    const { code } = error as NodeJS.ErrnoException;
    if (code !== 'ENOTEMPTY' && code !== 'EEXIST') throw error;
    throw new AppError(
      'name_taken',
      `Lab: there is a lab '${name}' already; take it down first or choose another name`,
      {
        name,
      },
    );
  }
}

export const saveRecord = (record: LabRecord): Promise<void> =>
  writeWhole(path.join(directoryOf(record.spec.name), recordName), record);

/** Undefined if there is no lab of that name. */
export const readRecord = (lab: string): Promise<LabRecord | undefined> =>
  readJson<LabRecord>(path.join(directoryOf(lab), recordName));

/** Names of labs of this machine, however much of them is there. */
export const listLabs = async (): Promise<string[]> =>
  (await readdir(labsDirectory()).catch(() => [])).filter((name) => !name.startsWith('.'));

/** Removes the lab's directory, and the one of all labs after the last. */
export async function removeDirectory(lab: string): Promise<void> {
  await rm(directoryOf(lab), { recursive: true, force: true });
  await rmdir(labsDirectory()).catch(() => {});
}

/** Whether nobody will ever take the lab down: its maker was killed, or the machine started again since. */
export async function isLeftBehind(record: LabRecord | undefined): Promise<boolean> {
  if (!record || record.bootId !== (await bootId())) return true;
  return !(record.isReady && record.stays) && !(await isAlive(record.maker));
}

/** As last set; undefined if they are still those of the spec. */
export const readWireSettings = (directory: string, wire: string): Promise<WireSettings | undefined> =>
  readJson<WireSettings>(path.join(directory, wire, settingsName));

export const saveWireSettings = (directory: string, wire: string, settings: WireSettings): Promise<void> =>
  writeWhole(path.join(directory, wire, settingsName), settings);

const recordName = 'lab.json';
const settingsName = 'settings.json';

const bootId = async (): Promise<string> =>
  (await readFile('/proc/sys/kernel/random/boot_id', 'utf8')).trim();

async function readJson<T>(file: string): Promise<T | undefined> {
  try {
    return JSON.parse(await readFile(file, 'utf8')) as T;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
}

async function writeWhole(file: string, value: unknown): Promise<void> {
  const next = `${file}.${process.pid}`;
  await writeFile(next, JSON.stringify(value), { mode: 0o600 });
  await rename(next, file);
}
