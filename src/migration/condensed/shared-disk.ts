/**
 * The disk of a VM on storage that both cloudlets see, as a reference set: what the guest has read from it and still has
 * in memory, the destination reads from the storage itself. After the paper on NAS, but without its map of memory to
 * disk: the source makes an index of the disk as it is when the VM leaves, and pages are found by content.
 *
 * A `qemu-nbd` of our own reads the disk at each side: it knows every storage that QEMU knows, and one that hangs holds
 * that process and nothing of ours. The guest writes meanwhile, so what is read may be stale; every batch is judged by
 * its digest.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { rm } from 'node:fs/promises';
import path from 'node:path';
import type { Uuid } from '../../model/ids.ts';
import { MiB } from '../../model/units.ts';
import { connectNbd, extentFlag, type NbdClient } from '../../nbd/index.ts';
import {
  type BlockReader,
  buildIndex,
  type Content,
  contentSource,
  inTime,
  openIndex,
  type SetIndex,
  type SetName,
} from '../../pages/index.ts';
import { delay } from '../../qmp/index.ts';
import { diskNode } from '../../vm/disk-node.ts';
import { diskReader } from './disk-destination.ts';

export interface SharedDiskOptions {
  /** Path or URL of a qcow2. */
  disk: string;
  /** For a socket, and the index. */
  directory: string;
}

const exportName = 'disk';
const openTimeoutMs = 5000;
/** A disk that takes longer to read costs the VM more time than it saves. */
const buildTimeoutMs = 20_000;
const pollMs = 20;
const extentBytes = 1024 * MiB;

export const sharedDiskSet = (vmId: Uuid): SetName => `disk:${vmId}`;

/** The destination's half: undefined where the disk cannot be read. */
export async function openSharedDisk(options: SharedDiskOptions): Promise<BlockReader | undefined> {
  const served = await serve(options, 'set-reader').catch(() => undefined);
  return served && { ...diskReader(served.disk), [Symbol.asyncDispose]: () => served[Symbol.asyncDispose]() };
}

/** The source's half, made now. Undefined where the disk cannot be read, or not in time. */
export async function indexSharedDisk(vmId: Uuid, options: SharedDiskOptions): Promise<SetIndex | undefined> {
  const file = path.join(options.directory, 'disk.index');
  const served = await serve(options, 'set-index').catch(() => undefined);
  if (!served) return undefined;
  const signal = AbortSignal.timeout(buildTimeoutMs);
  const source = contentSource(contentOf(served.disk));
  const built = buildIndex({ file, name: sharedDiskSet(vmId), stamp: '', source, signal });
  try {
    await inTime(built, buildTimeoutMs);
  } catch {
    return undefined;
  } finally {
    // A read that hangs ends with it.
    await served[Symbol.asyncDispose]();
  }
  const index = await openIndex(file);
  return {
    entries: index.entries,
    lookup: (digests) => index.lookup(digests),
    async [Symbol.asyncDispose]() {
      await index[Symbol.asyncDispose]();
      await rm(file, { force: true });
    },
  };
}

/** What can be read over NBD; the connection stays the caller's. */
function contentOf(disk: NbdClient): Content {
  return {
    virtualBytes: disk.sizeBytes,
    async read(offset, into) {
      (await disk.read(offset, into.length)).copy(into);
    },
    async *dataRanges(signal) {
      for (let at = 0; at < disk.sizeBytes; ) {
        signal.throwIfAborted();
        for (const { lengthBytes, flags } of await disk.extents(
          at,
          Math.min(extentBytes, disk.sizeBytes - at),
        )) {
          const length = Math.min(lengthBytes, disk.sizeBytes - at);
          if ((flags & extentFlag.zero) === 0) yield { offset: at, lengthBytes: length };
          at += length;
        }
      }
    },
    async [Symbol.asyncDispose]() {},
  };
}

/** It ends with its only connection, so nothing stays when the daemon dies. */
async function serve(
  { disk, directory }: SharedDiskOptions,
  name: string,
): Promise<AsyncDisposable & { disk: NbdClient }> {
  const socket = path.join(directory, `${name}.sock`);
  await rm(socket, { force: true });
  const node = { driver: 'qcow2', 'read-only': true, 'force-share': true, file: diskNode(disk) };
  const server = spawn(
    'qemu-nbd',
    ['--read-only', '--socket', socket, '--export-name', exportName, `json:${JSON.stringify(node)}`],
    { stdio: 'ignore', env: { PATH: process.env.PATH ?? '/usr/sbin:/usr/bin:/sbin:/bin', LC_ALL: 'C' } },
  );
  // Not installed: then it has no exit code either, and the connection is never made.
  server.on('error', () => {});
  try {
    const client = await connect(server, socket);
    return {
      disk: client,
      async [Symbol.asyncDispose]() {
        // Not asked first: it may hang in a read.
        await end(server);
        await client[Symbol.asyncDispose]();
        await rm(socket, { force: true });
      },
    };
  } catch (error) {
    await end(server);
    await rm(socket, { force: true });
    throw error;
  }
}

/** It listens when it has opened the disk. */
async function connect(server: ChildProcess, socket: string): Promise<NbdClient> {
  const signal = AbortSignal.timeout(openTimeoutMs);
  for (;;) {
    try {
      return await connectNbd({ path: socket, exportName, timeoutMs: openTimeoutMs, signal });
    } catch (error) {
      if (server.pid === undefined || server.exitCode !== null || signal.aborted) throw error;
      await delay(pollMs, signal);
    }
  }
}

async function end(server: ChildProcess): Promise<void> {
  if (server.pid === undefined || server.exitCode !== null || server.signalCode !== null) return;
  const ended = once(server, 'exit');
  server.kill('SIGKILL');
  await ended;
}
