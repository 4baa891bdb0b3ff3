/**
 * What stayed behind of VMs that have left, so that their way back is cheap. Two halves:
 *
 *   ROOT/key                    wraps the keys of the page files, mode 600
 *   ROOT/VM/pages, pages.index  here: the memory of the VM as it was when it left this cloudlet, encrypted
 *   ROOT/VM/elsewhere.index     for a VM that came from elsewhere: what the cloudlet that it left has kept
 *
 * Both indexes are made from the same digests, so both cloudlets call the set the same. Bounded by a quota, and by half
 * of what its disk has besides, for journals and VMs come before it; the oldest goes first. A set belongs to its VM: nobody else's migration may name it.
 */
import { randomBytes } from 'node:crypto';
import { mkdir, open, readdir, readFile, rm, stat } from 'node:fs/promises';
import path from 'node:path';
import { AppError } from '../../model/errors.ts';
import { isUuid, type Uuid } from '../../model/ids.ts';
import { MiB } from '../../model/units.ts';
import {
  type BlockReader,
  blockBytes,
  buildIndexFromDigests,
  digestBlocks,
  digestBytes,
  type IndexFile,
  isZeroBlock,
  openIndex,
  openPageFile,
  PageFileWriter,
  pageFileKeyBytes,
  readIndexHeader,
  type SetName,
} from '../../pages/index.ts';
import { freeBytes } from '../../vm/space.ts';

const checkedBytes = 16 * MiB;

export interface KeptMemoryOptions {
  root: string;
  /** The most that all page files take; 0: nothing is ever kept. */
  quotaBytes: number;
  /** What the disk below `root` has left; by default as the system says. */
  freeBytes?: () => Promise<number>;
}

export class KeptMemory {
  readonly #root: string;
  readonly #quotaBytes: number;
  readonly #freeBytes: () => Promise<number>;
  #wrapping: Promise<Buffer> | undefined;
  /** VMs whose memory is being written now: these are not evicted. */
  readonly #keeping = new Set<Uuid>();

  constructor({ root, quotaBytes, freeBytes: freeOf = () => freeBytes(root) }: KeptMemoryOptions) {
    this.#root = root;
    this.#quotaBytes = quotaBytes;
    this.#freeBytes = freeOf;
  }

  get isOn(): boolean {
    return this.#quotaBytes > 0;
  }

  /**
   * Begins to keep the memory of a VM that has left. `pageCount`: of all its RAM. Undefined where nothing is kept.
   * What was kept of the VM before goes when the new is whole.
   */
  async keep(vmId: Uuid, pageCount: number): Promise<Keeping | undefined> {
    if (this.#quotaBytes === 0 || this.#keeping.has(vmId)) return undefined;
    await mkdir(this.#directory(vmId), { recursive: true, mode: 0o700 });
    const file = this.#pages(vmId);
    const writer = await PageFileWriter.create({ file, pageCount, wrapping: await this.#key() });
    this.#keeping.add(vmId);
    return new Keeping({
      writer,
      vmId,
      pageCount,
      indexFile: `${file}.index`,
      makeRoom: () => this.#makeRoom(vmId, writer.writtenBytes),
      onEnd: () => this.#keeping.delete(vmId),
    });
  }

  /**
   * A VM has come, and the cloudlet that it left keeps its memory: `digests` are those of its pages as they came, by
   * page number, zeroes for pages of zeroes. Gives the name of the set.
   */
  async remember(vmId: Uuid, digests: Buffer, signal: AbortSignal): Promise<SetName> {
    await mkdir(this.#directory(vmId), { recursive: true, mode: 0o700 });
    const file = this.#elsewhere(vmId);
    const { name } = await buildIndexFromDigests({ file, name: prefixOf(vmId), stamp: '', digests, signal });
    return name;
  }

  /** The set that is kept here for the VM, if any. */
  async setFor(vmId: Uuid): Promise<SetName | undefined> {
    const isThere = await stat(this.#pages(vmId)).catch(() => undefined);
    if (!isThere || this.#keeping.has(vmId)) return undefined;
    return (await readIndexHeader(`${this.#pages(vmId)}.index`).catch(() => undefined))?.name;
  }

  /** The set that another cloudlet keeps for the VM, as far as is known here. */
  async remembered(vmId: Uuid): Promise<SetName | undefined> {
    return (await readIndexHeader(this.#elsewhere(vmId)).catch(() => undefined))?.name;
  }

  /** The destination's half: undefined when this very set is not here. */
  async openBlocks(vmId: Uuid, name: SetName): Promise<BlockReader | undefined> {
    if ((await this.setFor(vmId)) !== name) return undefined;
    return await openPageFile(this.#pages(vmId), await this.#key());
  }

  /** The source's half. */
  async openIndex(vmId: Uuid, name: SetName): Promise<IndexFile | undefined> {
    const file = this.#elsewhere(vmId);
    const header = await readIndexHeader(file).catch(() => undefined);
    return header?.name === name ? await openIndex(file) : undefined;
  }

  /** Everything about the VM goes: it was deleted, or nobody is to keep it any more. */
  async forget(vmId: Uuid): Promise<void> {
    await rm(this.#directory(vmId), { recursive: true, force: true });
  }

  /** Bytes on the disk of all that is kept whole. */
  async usedBytes(): Promise<number> {
    return (await this.#kept()).reduce((sum, { bytes }) => sum + bytes, 0);
  }

  /** Takes away what a daemon that died was writing. */
  async recover(): Promise<void> {
    await mkdir(this.#root, { recursive: true, mode: 0o700 });
    for (const vmId of (await readdir(this.#root)).filter(isUuid))
      for (const name of await readdir(this.#directory(vmId)))
        if (/\.(partial|spill)$/.test(name)) await rm(path.join(this.#directory(vmId), name));
  }

  #key(): Promise<Buffer> {
    this.#wrapping ??= loadKey(path.join(this.#root, 'key'));
    return this.#wrapping;
  }

  async #makeRoom(vmId: Uuid, writingBytes: number): Promise<void> {
    const kept = (await this.#kept()).filter((each) => each.vmId !== vmId);
    let used = kept.reduce((sum, { bytes }) => sum + bytes, 0) + writingBytes;
    const quotaBytes = Math.min(this.#quotaBytes, ((await this.#freeBytes()) + used) / 2);
    for (const oldest of kept.toSorted((a, b) => a.changedMs - b.changedMs)) {
      if (used <= quotaBytes) return;
      if (this.#keeping.has(oldest.vmId)) continue;
      // An index of what is elsewhere stays: it counts little.
      await rm(this.#pages(oldest.vmId), { force: true });
      await rm(`${this.#pages(oldest.vmId)}.index`, { force: true });
      used -= oldest.bytes;
    }
    if (used <= quotaBytes) return;
    throw new AppError(
      'insufficient_space',
      `Keep memory of VM ${vmId}: ${used} bytes, wanted at most ${quotaBytes}`,
      { wantedBytes: used, freeBytes: quotaBytes },
    );
  }

  async #kept(): Promise<{ vmId: Uuid; bytes: number; changedMs: number }[]> {
    const all = (await readdir(this.#root)).filter(isUuid).map(async (vmId) => {
      const facts = await stat(this.#pages(vmId)).catch(() => undefined);
      return facts && { vmId, bytes: facts.blocks * 512, changedMs: facts.mtimeMs };
    });
    return (await Promise.all(all)).filter((each) => each !== undefined);
  }

  #directory(vmId: Uuid): string {
    if (!isUuid(vmId)) throw new AppError('invalid_request', `Find kept memory: '${vmId}' is no VM's id`);
    return path.join(this.#root, vmId);
  }

  #pages(vmId: Uuid): string {
    return path.join(this.#directory(vmId), 'pages');
  }

  #elsewhere(vmId: Uuid): string {
    return path.join(this.#directory(vmId), 'elsewhere.index');
  }
}

interface KeepingParts {
  writer: PageFileWriter;
  vmId: Uuid;
  pageCount: number;
  indexFile: string;
  makeRoom: () => Promise<void>;
  onEnd: () => void;
}

/** Memory on its way into the store. Dispose of it in any case; what is not finished is as if never begun. */
export class Keeping implements AsyncDisposable {
  readonly #parts: KeepingParts;
  readonly #digests: Buffer;
  /** Used again for each write: one follows the other. */
  #content: Buffer = Buffer.alloc(0);
  /** Written since the quota was looked at. */
  #unchecked = 0;

  constructor(parts: KeepingParts) {
    this.#parts = parts;
    this.#digests = Buffer.alloc(parts.pageCount * digestBytes);
  }

  /**
   * Pages in any order, each once; those of zeroes are left out. Throws `insufficient_space` when the quota cannot take
   * the VM, which is looked at now and then.
   */
  async write(pages: Uint32Array, bytes: Buffer): Promise<void> {
    const places = [...pages.keys()].filter((i) => !isZeroBlock(bytes, i * blockBytes));
    if (places.length === 0) return;
    if (this.#content.length < bytes.length) this.#content = Buffer.allocUnsafeSlow(bytes.length);
    for (const [to, i] of places.entries())
      bytes.copy(this.#content, to * blockBytes, i * blockBytes, (i + 1) * blockBytes);
    const kept = Uint32Array.from(places, (i) => pages[i]!);
    const content = this.#content.subarray(0, places.length * blockBytes);
    const digests = digestBlocks(content);
    for (const [i, page] of kept.entries())
      digests.copy(this.#digests, page * digestBytes, i * digestBytes, (i + 1) * digestBytes);
    await this.#parts.writer.write(kept, content);
    this.#unchecked += content.length;
    if (this.#unchecked < checkedBytes) return;
    this.#unchecked = 0;
    await this.#parts.makeRoom();
  }

  /** Gives the name of the set, which is the same at the cloudlet that `remember`s the same digests. */
  async finish(signal: AbortSignal): Promise<SetName> {
    const { vmId, indexFile, writer, makeRoom } = this.#parts;
    await makeRoom();
    // The old index goes first: should the daemon die in between, there is no set rather than a wrong one.
    await rm(indexFile, { force: true });
    await writer.finish();
    const options = { file: indexFile, name: prefixOf(vmId), stamp: '', digests: this.#digests, signal };
    return (await buildIndexFromDigests(options)).name;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#parts.writer[Symbol.asyncDispose]();
    this.#parts.onEnd();
  }
}

const prefixOf = (vmId: Uuid): SetName => `stayed:${vmId}:`;

async function loadKey(file: string): Promise<Buffer> {
  try {
    await using made = await open(file, 'wx', 0o600);
    const key = randomBytes(pageFileKeyBytes);
    await made.writeFile(key);
    await made.sync();
    return key;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error;
  }
  const key = await readFile(file);
  if (key.length === pageFileKeyBytes) return key;
  // A daemon that died while it made the key has kept nothing with it.
  await rm(file);
  return loadKey(file);
}
