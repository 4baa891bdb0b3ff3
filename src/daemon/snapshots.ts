/**
 * Golden snapshots: an image is booted once in a VM that nobody sees, and its RAM and disk are kept at the moment
 * its guest agent answers and it has come to rest. VMs that start from there skip the boot.
 */
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { rm, stat } from 'node:fs/promises';
import type { Static } from 'typebox';
import type { CreateSnapshot } from '../contract/schemas.ts';
import { AppError } from '../model/errors.ts';
import { newId, type Uuid } from '../model/ids.ts';
import type { Operation } from '../model/operation.ts';
import type { ImageRecord, SnapshotRecord, VmSpec } from '../model/vm.ts';
import { untilCalm } from '../vm/calm.ts';
import type { Config } from './config.ts';
import type { EventLog } from './events.ts';
import type { ImageService } from './images.ts';
import type { OperationContext, Operations } from './operations.ts';
import type { Paths } from './paths.ts';
import type { SnapshotIndexes } from './references/snapshot-indexes.ts';
import type { Page, PageRequest, Store } from './store/index.ts';
import { specFor } from './vms/hardware.ts';
import { capturedIn, type Runner } from './vms/runner.ts';

/** A guest that never rests is captured all the same. */
const settleTimeoutMs = 60_000;

export interface SnapshotServiceOptions {
  store: Store;
  events: EventLog;
  operations: Operations;
  images: ImageService;
  indexes: SnapshotIndexes;
  runner: Runner;
  paths: Paths;
  config: Config;
  /** Names of VMs that are being started from the snapshot now. */
  usersOf: (id: Uuid) => string[];
}

export class SnapshotService {
  readonly #options: SnapshotServiceOptions;
  /** Names of snapshots that are being made. */
  readonly #making = new Set<string>();
  /** What needs a snapshot as it is, by its id. */
  readonly #holds = new Set<{ id: Uuid; by: string }>();

  constructor(options: SnapshotServiceOptions) {
    this.#options = options;
  }

  list(request: PageRequest): Page<SnapshotRecord> {
    return this.#options.store.snapshots.list(request);
  }

  /** By id or name. */
  get(reference: string): SnapshotRecord {
    const found = this.#options.store.snapshots.find(reference);
    if (found) return found;
    throw new AppError('not_found', `There is no snapshot '${reference}'`, {
      kind: 'snapshot',
      name: reference,
    });
  }

  async create(request: Static<typeof CreateSnapshot>): Promise<Operation> {
    const { operations, images, runner, config } = this.#options;
    const { name } = request;
    this.requireFreeName(name);
    const image = images.get(request.image);
    const spec = specFor(request, image, config);
    await runner.check(spec);
    // Both may have changed meanwhile; from here on they are kept.
    images.get(image.digest);
    const kept = new DisposableStack();
    kept.use(this.making(name));
    kept.use(images.hold(image.digest, { kind: 'snapshot', name }));
    const id = newId();
    const readyTimeoutMs = request.readyTimeoutMs ?? 180_000;
    try {
      return operations.run('snapshot.create', { snapshotId: id, name }, async (work) => {
        using _ = kept;
        await this.#make({ id, name, spec, image, readyTimeoutMs }, work);
        return { snapshotId: id };
      });
    } catch (error) {
      kept.dispose();
      throw error;
    }
  }

  /** Keeps the name for a snapshot that is being made, or throws `name_taken`. */
  making(name: string): Disposable {
    this.requireFreeName(name);
    this.#making.add(name);
    return { [Symbol.dispose]: () => void this.#making.delete(name) };
  }

  /** Keeps the snapshot from being removed. */
  hold(id: Uuid, by: string): Disposable {
    const hold = { id, by };
    this.#holds.add(hold);
    return { [Symbol.dispose]: () => void this.#holds.delete(hold) };
  }

  /** A snapshot has come, or was made: migrations may refer to it, once it is indexed. */
  added(record: SnapshotRecord): void {
    this.#options.indexes.add(record);
  }

  /** Indexes for what is there when the daemon starts. */
  recover(): void {
    for (const record of this.#options.store.snapshots.all()) this.added(record);
  }

  /** The record, with the digest that one of an older daemon lacks. */
  async withDigest(id: Uuid): Promise<SnapshotRecord & { digest: string }> {
    const { store, paths } = this.#options;
    const record = this.get(id);
    const digest = record.digest ?? (await digestOfFile(capturedIn(paths.snapshot(id)).memory));
    if (!record.digest) store.snapshots.update({ ...record, digest });
    return { ...record, digest };
  }

  requireFreeName(name: string): void {
    if (!this.#making.has(name) && !this.#options.store.snapshots.getByName(name)) return;
    throw new AppError('name_taken', `There is a snapshot '${name}' already`, { kind: 'snapshot', name });
  }

  async #make(
    wanted: { id: Uuid; name: string; spec: VmSpec; image: ImageRecord; readyTimeoutMs: number },
    { signal, progress }: OperationContext,
  ): Promise<void> {
    const { store, events, runner, paths } = this.#options;
    const { id, name, spec, image, readyTimeoutMs } = wanted;
    const directory = paths.snapshot(id);
    // The template VM has the snapshot's id: should the daemon die, its start finds and ends it by that.
    const template = { id, name, spec };
    const step = (phase: string, done: number) => progress({ phase, done, total: 3, unit: 'steps' });
    await using undo = new AsyncDisposableStack();
    undo.defer(() => rm(directory, { recursive: true, force: true }));
    await using templateEnd = new AsyncDisposableStack();
    templateEnd.defer(() => runner.discard(id));
    step('disk', 0);
    await runner.makeDisk(template, image, signal);
    step('boot', 1);
    const began = performance.now();
    const { machine } = await runner.boot(template, signal);
    templateEnd.defer(async () => {
      await machine.kill();
    });
    await machine.agent.waitUntilReady({ timeoutMs: readyTimeoutMs, signal });
    const bootMs = performance.now() - began;
    await untilCalm(machine.process, { timeoutMs: settleTimeoutMs, signal });
    step('capture', 2);
    await runner.capture(machine, spec, image, directory, signal);
    const files = capturedIn(directory);
    const record: SnapshotRecord = {
      id,
      name,
      spec,
      createdAt: new Date().toISOString(),
      memoryFileBytes: (await stat(files.memory)).size,
      diskFileBytes: (await stat(files.disk)).size,
      bootMs: Math.round(bootMs),
      digest: await digestOfFile(files.memory),
    };
    store.transact(() => {
      store.snapshots.insert(record);
      events.append({ kind: 'snapshot.created', data: { snapshotId: id, name } });
    });
    undo.move();
    this.added(record);
  }

  async remove(reference: string): Promise<void> {
    const { store, events, paths, usersOf, indexes } = this.#options;
    const { id, name } = this.get(reference);
    const usedBy = [...usersOf(id), ...[...this.#holds].filter((hold) => hold.id === id).map(({ by }) => by)];
    if (usedBy.length > 0) {
      throw new AppError('in_use', `Cannot remove snapshot '${name}': ${usedBy[0]} needs it`, { usedBy });
    }
    store.transact(() => {
      store.snapshots.delete(id);
      events.append({ kind: 'snapshot.deleted', data: { snapshotId: id, name } });
    });
    indexes.remove(id);
    await rm(paths.snapshot(id), { recursive: true, force: true });
  }
}

/** `sha256:HEX` of the file's bytes. */
export async function digestOfFile(file: string): Promise<string> {
  const hash = createHash('sha256');
  for await (const chunk of createReadStream(file, { highWaterMark: 1024 * 1024 })) hash.update(chunk);
  return `sha256:${hash.digest('hex')}`;
}
