/** Records and directories for the tests of everything that keeps state. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { newId } from '../../model/ids.ts';
import { GiB, MiB } from '../../model/units.ts';
import type { ImageRecord, VmRecord } from '../../model/vm.ts';
import { Store, type StoreOptions } from './index.ts';

export interface TestDirectory extends Disposable {
  path: string;
}

/** An empty directory that goes away with the test. */
export function testDirectory(): TestDirectory {
  const path = mkdtempSync(join(tmpdir(), 'viper-test-'));
  return { path, [Symbol.dispose]: () => rmSync(path, { recursive: true, force: true }) };
}

export interface TestStore extends Disposable {
  store: Store;
  directory: string;
}

/** A new store in a directory of its own. */
export function testStore(options: StoreOptions = {}): TestStore {
  const directory = testDirectory();
  const store = new Store(directory.path, options);
  return {
    store,
    directory: directory.path,
    [Symbol.dispose]: () => {
      store.close();
      directory[Symbol.dispose]();
    },
  };
}

export const testImage = (fill = 'a', overrides: Partial<ImageRecord> = {}): ImageRecord => ({
  digest: `sha256:${fill.repeat(64)}`,
  aliases: [],
  format: 'qcow2',
  fileBytes: 10 * MiB,
  virtualBytes: 2 * GiB,
  createdAt: '2026-01-01T00:00:00.000Z',
  ...overrides,
});

export function testVm(name: string, overrides: Partial<VmRecord> = {}): VmRecord {
  return {
    id: newId(),
    name,
    state: 'stopped',
    createdAt: '2026-01-01T00:00:00.000Z',
    spec: {
      machine: 'pc-q35-7.2',
      accelerator: 'auto',
      cpu: { model: 'qemu64', count: 2 },
      memoryBytes: 512 * MiB,
      disk: { image: testImage().digest, sizeBytes: 2 * GiB },
      nets: [{ network: 'user', mac: '02:00:00:00:00:01' }],
      seed: { hostname: name, sshKeys: [], addresses: [] },
    },
    ...overrides,
  };
}
