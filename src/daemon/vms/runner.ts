/**
 * Runs the QEMU of one VM: disk, seed, taps, process. It knows no records and no API. What fails in the middle is
 * undone before the error leaves: then no process, no tap and no socket is left of the attempt.
 */
import { mkdir, rm } from 'node:fs/promises';
import path from 'node:path';
import { AppError } from '../../model/errors.ts';
import type { Uuid } from '../../model/ids.ts';
import { MiB } from '../../model/units.ts';
import type { Accelerator, Attachment, ImageRecord, Storage, VmSpec } from '../../model/vm.ts';
import { guestRequest, requireDone, type Taps } from '../../network/index.ts';
import { belowSocket, makeArrivingDisk } from '../../vm/arriving-disk.ts';
import { backupDisk } from '../../vm/backup.ts';
import { isRemote } from '../../vm/disk-node.ts';
import { type CreateDiskOptions, copyDisk, createBlankDisk, createDisk } from '../../vm/disks.ts';
import { checkSpec, type Host, type HostFacts } from '../../vm/host.ts';
import { changeIdentity, renewLeases } from '../../vm/identity.ts';
import { imageFile } from '../../vm/images.ts';
import { setLinks } from '../../vm/links.ts';
import { Machine } from '../../vm/machine.ts';
import { captureMemoryToFile, loadMemoryFromFile } from '../../vm/memory-file.ts';
import { findQemu, killProcess, waitUntilGone } from '../../vm/process.ts';
import { createSeed } from '../../vm/seed.ts';
import {
  isSharedDiskThere,
  makeSharedDisk,
  removeSharedDisk,
  sharedDisk,
  usageOf,
} from '../../vm/shared-disks.ts';
import { freeBytes } from '../../vm/space.ts';
import type { Config } from '../config.ts';
import type { Paths } from '../paths.ts';

export interface Runnable {
  id: Uuid;
  name: string;
  spec: VmSpec;
  attachment?: Attachment;
}

/** A VM whose vCPUs run. */
export interface Started {
  machine: Machine;
  accelerator: Accelerator;
}

/** RAM and disk of a VM at one instant, in a directory of their own. */
export interface Captured {
  memory: string;
  disk: string;
}
export const capturedIn = (directory: string): Captured => ({
  memory: path.join(directory, 'memory'),
  disk: path.join(directory, 'disk.qcow2'),
});
const diskIn = (directory: string): string => path.join(directory, 'disk.qcow2');
const seedIn = (directory: string): string => path.join(directory, 'seed.iso');

/** How long a guest just resumed from captured RAM may take until its agent answers again. */
const agentAfterResumeMs = 30_000;
const endTimeoutMs = 10_000;
/** With less, a guest that writes would soon stand still again. */
const leastRoomBytes = 16 * MiB;

export class Runner {
  readonly #paths: Paths;
  readonly #host: Host;
  readonly #config: Config;
  readonly #taps: Taps;

  constructor(options: { paths: Paths; host: Host; config: Config; taps: Taps }) {
    this.#paths = options.paths;
    this.#host = options.host;
    this.#config = options.config;
    this.#taps = options.taps;
  }

  facts(): Promise<HostFacts> {
    return this.#host.facts();
  }

  /** What this cloudlet has for a VM that would come, on the file system of `directory`. */
  async capacity(directory: string): Promise<{
    host: HostFacts;
    networks: Config['networks'];
    freeMemoryBytes: number;
    freeDiskBytes: number;
  }> {
    const [host, diskBytes] = await Promise.all([this.#host.facts(), freeBytes(directory)]);
    const { networks, reserveBytes } = this.#config;
    return {
      host,
      networks,
      freeMemoryBytes: Math.max(0, host.memory.availableBytes - reserveBytes),
      freeDiskBytes: Math.max(0, diskBytes - reserveBytes),
    };
  }

  /** Refuses a spec that this host cannot run, before anything is made. */
  async check(spec: VmSpec): Promise<Accelerator> {
    this.#storageOf(spec);
    return checkSpec(spec, await this.#host.facts());
  }

  /** Names of the storages that this cloudlet shares with others. */
  get storages(): string[] {
    return this.#config.storages.map(({ name }) => name);
  }

  /** Undefined for a disk in the cloudlet's own directory. Errors: `unsupported`. */
  #storageOf({ disk }: VmSpec): Storage | undefined {
    if (disk.storage === undefined) return undefined;
    const found = this.#config.storages.find(({ name }) => name === disk.storage);
    if (found) return found;
    throw new AppError('unsupported', `This cloudlet has no storage '${disk.storage}'`, {
      field: 'storage',
      value: disk.storage,
      wanted: this.storages,
    });
  }

  /** Path or URL of the VM's disk. */
  diskOf({ id, spec }: Pick<Runnable, 'id' | 'spec'>): string {
    const storage = this.#storageOf(spec);
    return storage ? sharedDisk(storage, id) : diskIn(this.#paths.vm(id));
  }

  /** What the VM's disk takes, holes left out. */
  async diskBytesOf(vm: Pick<Runnable, 'id' | 'spec'>): Promise<number> {
    return usageOf(this.diskOf(vm));
  }

  /** Whether its disk can take a write again, as far as that can be known from here. */
  async hasRoomFor(vm: Pick<Runnable, 'id' | 'spec'>): Promise<boolean> {
    const disk = this.diskOf(vm);
    return isRemote(disk) || (await freeBytes(path.dirname(disk))) >= leastRoomBytes;
  }

  /** Whether a disk on shared storage can be opened from here, too. */
  async seesDiskOf(vm: Pick<Runnable, 'id' | 'spec'>): Promise<boolean> {
    return isSharedDiskThere(this.diskOf(vm));
  }

  /** The VM's directory, and its disk: an empty overlay on its image, or a copy of that on shared storage. */
  async makeDisk(vm: Runnable, image: ImageRecord, signal: AbortSignal): Promise<void> {
    const directory = await this.#makeDirectory(vm);
    if (vm.spec.disk.storage === undefined)
      return this.#makeOverlay(diskIn(directory), vm.spec, image, signal);
    const { digest, format, virtualBytes } = image;
    const from = { file: imageFile(this.#paths.images, digest, format), format, virtualBytes };
    await this.#makeShared(vm, from, signal);
  }

  /** The VM's directory, and its disk as a copy of a captured or resting one, which is on the same image or on none. */
  async copyDisk(vm: Runnable, from: string, signal: AbortSignal): Promise<void> {
    const directory = await this.#makeDirectory(vm);
    const { reserveBytes } = this.#config;
    if (vm.spec.disk.storage === undefined)
      return copyDisk({ from, to: diskIn(directory), reserveBytes, signal });
    const virtualBytes = vm.spec.disk.sizeBytes;
    await this.#makeShared(vm, { file: from, format: 'qcow2', virtualBytes }, signal);
  }

  async #makeDirectory(vm: Runnable): Promise<string> {
    const directory = this.#paths.vm(vm.id);
    await mkdir(directory, { recursive: true, mode: 0o700 });
    return directory;
  }

  async #makeShared(
    vm: Runnable,
    from: Parameters<typeof makeSharedDisk>[0]['from'],
    signal: AbortSignal,
  ): Promise<void> {
    const { sizeBytes } = vm.spec.disk;
    await makeSharedDisk({
      from,
      to: this.diskOf(vm),
      sizeBytes,
      reserveBytes: this.#config.reserveBytes,
      signal,
    });
  }

  async #makeOverlay(file: string, spec: VmSpec, image: ImageRecord, signal: AbortSignal): Promise<void> {
    await createDisk(this.#overlayOf(file, spec, image, signal));
  }

  #overlayOf(file: string, spec: VmSpec, image: ImageRecord, signal: AbortSignal): CreateDiskOptions {
    return {
      file,
      imageFile: imageFile(this.#paths.images, image.digest, image.format),
      imageFormat: image.format,
      sizeBytes: spec.disk.sizeBytes,
      reserveBytes: this.#config.reserveBytes,
      signal,
    };
  }

  /** Starts QEMU and lets the guest boot from its disk. */
  async boot(vm: Runnable, signal: AbortSignal): Promise<Started> {
    return this.#launch(vm, { incoming: false }, signal, (machine) => machine.resume());
  }

  /**
   * Starts QEMU with captured RAM: the guest goes on from there, under its own name, machine id and MACs. Its
   * links stay down until it has them, so that two guests never show the same address.
   */
  async resumeCaptured(
    vm: Runnable,
    captured: Captured,
    identity: { from: VmSpec } | 'keep',
    signal: AbortSignal,
  ): Promise<Started> {
    return this.#launch(vm, { incoming: true }, signal, async (machine) => {
      const load = () => loadMemoryFromFile(machine, { file: captured.memory, signal });
      if (identity === 'keep') {
        await load();
        await machine.resume();
        return;
      }
      // QEMU announces the original's addresses as soon as it has the memory, so the host's end is cut before; the
      // memory brings the guest's end with it, so that is cut after.
      await setLinks(machine, false);
      await load();
      await setLinks(machine, false);
      await machine.resume();
      await machine.agent.waitUntilReady({ timeoutMs: agentAfterResumeMs, signal });
      const macs = vm.spec.nets.map((net, index) => ({ from: identity.from.nets[index]!.mac, to: net.mac }));
      const own = { hostname: vm.spec.seed.hostname, machineId: vm.id.replaceAll('-', ''), macs };
      await changeIdentity(machine.agent, own, { signal });
      await takeAddress(machine, vm, signal);
      await setLinks(machine, true);
      await renewLeases(machine.agent, { signal });
    });
  }

  /**
   * RAM and disk of a VM at one instant, into a directory of its own. The guest stands still only until both are
   * guarded against its writes; it then runs on while they are copied. `image` is missing for a disk on none.
   */
  async capture(
    machine: Machine,
    spec: VmSpec,
    image: ImageRecord | undefined,
    directory: string,
    signal: AbortSignal,
  ): Promise<Captured> {
    const captured = capturedIn(directory);
    await mkdir(directory, { recursive: true, mode: 0o700 });
    if (image) await this.#makeOverlay(captured.disk, spec, image, signal);
    else await createBlankDisk({ file: captured.disk, sizeBytes: spec.disk.sizeBytes, signal });
    await using backup = new AsyncDisposableStack();
    let disk: Promise<void> | undefined;
    await captureMemoryToFile(machine, {
      file: captured.memory,
      signal,
      whenStopped: async () => {
        const job = await backupDisk(machine, { targetFile: captured.disk });
        backup.defer(() => job.cancel());
        signal.addEventListener('abort', () => void job.cancel(), { once: true });
        disk = job.done;
      },
    });
    await disk;
    return captured;
  }

  /** Ends the QEMU of a VM, also one whose pid the daemon that started it could not write down any more. */
  async end(id: Uuid): Promise<void> {
    const process = await findQemu(id);
    if (!process) return;
    await killProcess(process);
    if (await waitUntilGone(process, { timeoutMs: endTimeoutMs })) return;
    const { pid } = process;
    throw new AppError('timeout', `QEMU (pid ${pid}) did not end within ${endTimeoutMs} ms of SIGKILL`, {
      waitedFor: 'end of QEMU',
      timeoutMs: endTimeoutMs,
    });
  }

  /** Gives back what a VM used while it ran. */
  async cleanUp(id: Uuid): Promise<void> {
    await this.#taps.down(id);
  }

  /** Removes a disk on shared storage, for good and for all cloudlets. */
  async removeSharedDisk(vm: Pick<Runnable, 'id' | 'spec'>): Promise<void> {
    if (vm.spec.disk.storage !== undefined) await removeSharedDisk(this.diskOf(vm));
  }

  /** Removes everything of a VM that does not run, but for a disk on shared storage. */
  async discard(id: Uuid): Promise<void> {
    await this.cleanUp(id);
    await rm(this.#paths.vm(id), { recursive: true, force: true });
  }

  /**
   * A QEMU that waits for memory to come over the link, and for its disk as well: on an empty one of its own, on
   * `image`. Without an image the disk is on shared storage, and there. With `listen` what lies under the disk is served
   * from when that has resolved on.
   */
  async receive(
    vm: Runnable,
    image: ImageRecord | undefined,
    { hasPostcopy, listen }: { hasPostcopy: boolean; listen?: (() => Promise<void>) | undefined },
    signal: AbortSignal,
  ): Promise<Started> {
    const how = { incoming: true, spareMonitor: hasPostcopy };
    if (image && listen) {
      const directory = await this.#makeDirectory(vm);
      await makeArrivingDisk(this.#overlayOf(diskIn(directory), vm.spec, image, signal));
      await listen();
      return this.#launch(vm, { ...how, belowSocket: belowSocket(directory) }, signal, async () => {});
    }
    if (image) await this.makeDisk(vm, image, signal);
    else await this.#makeDirectory(vm);
    return this.#launch(vm, how, signal, async () => {});
  }

  async #launch(
    vm: Runnable,
    how: { incoming: boolean; spareMonitor?: boolean; belowSocket?: string },
    signal: AbortSignal,
    begin: (machine: Machine) => Promise<void>,
  ): Promise<Started> {
    const accelerator = await this.check(vm.spec);
    await this.#requireMemory(vm);
    const directory = this.#paths.vm(vm.id);
    await createSeed({
      file: seedIn(directory),
      spec: vm.spec.seed,
      instanceId: vm.id,
      macs: vm.spec.nets.map((net) => net.mac),
      signal,
    });
    await using undo = new AsyncDisposableStack();
    const taps = await this.#taps.up(vm.id, vm.spec.nets, signal);
    undo.defer(() => this.#taps.down(vm.id));
    const machine = await Machine.launch(
      {
        id: vm.id,
        name: vm.name,
        spec: vm.spec,
        accelerator,
        directory,
        diskFile: this.diskOf(vm),
        sharedDisk: vm.spec.disk.storage !== undefined,
        seedFile: seedIn(directory),
        taps,
        ...how,
      },
      { signal },
    );
    undo.defer(async () => {
      await machine.kill();
    });
    await begin(machine);
    undo.move();
    return { machine, accelerator };
  }

  async #requireMemory(vm: Runnable): Promise<void> {
    const { availableBytes } = (await this.#host.facts()).memory;
    const freeBytes = availableBytes - this.#config.reserveBytes;
    if (freeBytes >= vm.spec.memoryBytes) return;
    throw new AppError(
      'insufficient_memory',
      `VM '${vm.name}' wants ${vm.spec.memoryBytes} bytes of memory, the host has ${Math.max(0, freeBytes)} to give`,
      { wantedBytes: vm.spec.memoryBytes, freeBytes: Math.max(0, freeBytes) },
    );
  }
}

/** The memory of another VM brings that one's address with it. */
async function takeAddress(
  machine: Machine,
  { spec, attachment }: Runnable,
  signal: AbortSignal,
): Promise<void> {
  if (!attachment) return;
  const { serving, waiting, place } = attachment;
  const next = { ...place, mac: spec.nets[serving]!.mac };
  const idleMac = waiting === undefined ? undefined : spec.nets[waiting]!.mac;
  const step = { name: 'take', next, ...(idleMac === undefined ? {} : { idleMac }) } as const;
  requireDone('take', await machine.agent.exec({ ...guestRequest(step), signal }));
}
