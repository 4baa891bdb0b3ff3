/**
 * The disk of a VM that comes by way of relays, at its destination: from the moment at which its QEMU is to open it to the
 * one at which it is a disk like any other. Where its blocks are is written down before the source gives the VM away, so
 * that a daemon that starts again goes on.
 *
 * What is written down names no slab once all of the disk is here.
 */
import type { Duplex } from 'node:stream';
import { AppError, asAppError } from '../model/errors.ts';
import type { Uuid } from '../model/ids.ts';
import { connectNbd, type NbdServer, serveNbd } from '../nbd/index.ts';
import { delay } from '../qmp/index.ts';
import {
  belowExport,
  belowFile,
  belowSocket,
  isArriving,
  settleArrivedDisk,
  settleRestingDisk,
  writeBelow,
} from '../vm/arriving-disk.ts';
import { openDiskContent } from '../vm/disk-content.ts';
import type { ImageFormat } from '../vm/image-check.ts';
import type { Machine } from '../vm/machine.ts';
import { ArrivingDisk, type Below } from './relayed/arriving-disk.ts';
import { DiskManifest } from './relayed/disk-manifest.ts';
import { takeDiskManifest } from './relayed/take-disk-manifest.ts';

export interface DiskArrivalOptions {
  /** The VM's. */
  directory: string;
  file: string;
  sizeBytes: number;
  image: { file: string; format: ImageFormat };
  /** A file of the VM's that nobody else reads. */
  readManifest: () => Promise<Buffer | undefined>;
  /** Resolves when it is on the disk. */
  writeManifest: (bytes: Buffer) => Promise<void>;
  removeManifest: () => Promise<void>;
  /** A session of a group of slabs with a relay. */
  openRelay: (id: Uuid, group: string) => Promise<Duplex>;
  tellOperator: (message: string) => void;
  /** After something failed; 5 s if missing. */
  retryMs?: number;
}

const defaultRetryMs = 5000;
/** QEMU brings one, and one more when it has lost that. */
const mostConnections = 4;

export class DiskArrival {
  readonly #options: DiskArrivalOptions;
  readonly #retryMs: number;
  readonly #abort = new AbortController();
  #disk: ArrivingDisk | undefined;
  #server: NbdServer | undefined;
  #reopening: Promise<boolean> | undefined;
  #settling: Promise<void> | undefined;
  #isWhole = false;

  constructor(options: DiskArrivalOptions) {
    this.#options = options;
    this.#retryMs = options.retryMs ?? defaultRetryMs;
  }

  get merge(): ArrivingDisk['merge'] {
    return this.#disk?.merge;
  }

  /** Whether it is not like any other yet. */
  isPending(): Promise<boolean> {
    return isArriving(this.#options.directory);
  }

  /** For QEMU, which is started next, on an empty overlay. */
  async listen(): Promise<void> {
    const { directory, sizeBytes, openRelay, tellOperator } = this.#options;
    this.#disk = new ArrivingDisk({
      sizeBytes,
      openBelow: (signal) => this.#openBelow(signal),
      openWhole: () => openDiskContent(belowFile(directory), 'qcow2'),
      open: ({ division: { relays, group } }, relay) => openRelay(relays[relay]!, group),
      onLost: (message) => tellOperator(`A part of the VM's disk does not come: ${message}`),
    });
    this.#server = await serveNbd({
      path: belowSocket(directory),
      exportName: belowExport,
      backend: this.#disk,
      maxConnections: mostConnections,
    });
  }

  /**
   * After a restart of the daemon. False if nobody knows what the disk holds: then QEMU is not answered, for it must not
   * take what the image holds for that.
   */
  reopen(): Promise<boolean> {
    this.#reopening ??= this.#reopen().catch((error) => {
      this.#reopening = undefined;
      throw error;
    });
    return this.#reopening;
  }

  async #reopen(): Promise<boolean> {
    if (!(await this.isPending())) {
      await this.#removeLeftManifest();
      return true;
    }
    const bytes = await this.#options.readManifest();
    if (!bytes) return false;
    let manifest: DiskManifest;
    try {
      manifest = DiskManifest.fromBytes(bytes);
    } catch (error) {
      this.#options.tellOperator(`The manifest of the VM's disk is lost: ${asAppError(error).message}`);
      return false;
    }
    await this.listen();
    this.#disk!.begin(manifest);
    if (manifest.slabs.length === 0) {
      // QEMU may have it open itself, so nobody else must.
      await this.#disk!.becomeWhole();
      this.#isWhole = true;
    }
    return true;
  }

  /** The disk has become one like any other, and its daemon ended before it could put this away. */
  async #removeLeftManifest(): Promise<void> {
    await this.#options.removeManifest().catch((error) => {
      const { message } = asAppError(error);
      this.#options.tellOperator(`The key of the VM's disk, which is not needed any more, stays: ${message}`);
    });
  }

  /** What the source says of where its blocks are. Whatever breaks it, the link is destroyed. */
  take(link: Duplex): Promise<void> {
    const { sizeBytes, writeManifest } = this.#options;
    const keep = async (manifest: DiskManifest): Promise<void> => {
      // One that is whole meanwhile needs none.
      if (!this.#isWhole) await writeManifest(manifest.toBytes());
      this.#disk!.begin(manifest);
    };
    return takeDiskManifest(link, { sizeBytes, keep });
  }

  /**
   * Fetches what is missing, and makes it a disk like any other; resolves when it is, and tries until then. `machine`: the
   * QEMU that has it open, or had.
   */
  settle(machine: Machine | null): Promise<void> {
    this.#settling ??= this.#settle(machine).catch((error) => {
      this.#settling = undefined;
      throw error;
    });
    return this.#settling;
  }

  async #settle(machine: Machine | null): Promise<void> {
    const { signal } = this.#abort;
    let running = machine;
    machine?.exited.then(() => {
      running = null;
    });
    for (let told = ''; ; ) {
      signal.throwIfAborted();
      const tried = running;
      try {
        return await this.#settleOnce(tried);
      } catch (error) {
        signal.throwIfAborted();
        const { message } = asAppError(error);
        // Its QEMU may just have ended.
        const isEnding = tried !== null && tried.qmp.state !== 'ready';
        if (!isEnding && message !== told) {
          this.#options.tellOperator(`The disk of the VM is not in one piece yet: ${message}`);
          told = message;
        }
        await Promise.race([delay(this.#retryMs, signal), ...(tried ? [tried.exited] : [])]);
      }
    }
  }

  /** May be repeated, wherever it failed. */
  async #settleOnce(running: Machine | null): Promise<void> {
    const { directory, file, writeManifest, removeManifest } = this.#options;
    const { signal } = this.#abort;
    if (await this.isPending()) {
      if (!(await this.#isKnown()))
        throw new AppError('image_corrupt', `Nobody knows what is missing of the disk in ${directory}`);
      if (!this.#isWhole) {
        await this.#disk!.fetchAll();
        await writeManifest(this.#disk!.withoutSlabs());
        this.#isWhole = true;
      }
      if (running) await this.#settleRunning(running);
      else await settleRestingDisk(file, signal);
    }
    // First of all: it has the key.
    await removeManifest();
    await this.#finish();
  }

  async #settleRunning({ qmp }: Machine): Promise<void> {
    const { file, image } = this.#options;
    const disk = { file, imageFile: image.file, imageFormat: image.format };
    await settleArrivedDisk(qmp, disk, this.#abort.signal);
  }

  /** Also one that this daemon has made itself is known, once the source has said so. */
  async #isKnown(): Promise<boolean> {
    return this.#disk !== undefined || (await this.reopen());
  }

  /** Nobody needs what relays hold of it. */
  async #finish(): Promise<void> {
    await this.#server?.[Symbol.asyncDispose]();
    await this.#disk?.end({ drop: true });
  }

  /** Nothing of it is served any more; its files stay. `drop`: relays may forget it. */
  async end({ drop }: { drop: boolean }): Promise<void> {
    this.#abort.abort(new AppError('cancelled', 'The disk is not served any more'));
    // First of all: QEMU comes again to a server that is gone, but an error is one to its guest.
    await this.#server?.[Symbol.asyncDispose]();
    await this.#disk?.end({ drop });
    // One that was under way meets the abort.
    await this.#settling?.catch(() => {});
  }

  async #openBelow(signal: AbortSignal): Promise<Below> {
    const writer = await writeBelow(this.#options.directory, signal);
    try {
      const client = await connectNbd({ path: writer.socketPath, exportName: belowExport, signal });
      return {
        client,
        close: async () => {
          await client[Symbol.asyncDispose]();
          await writer[Symbol.asyncDispose]();
        },
      };
    } catch (error) {
      await writer[Symbol.asyncDispose]();
      throw error;
    }
  }
}
