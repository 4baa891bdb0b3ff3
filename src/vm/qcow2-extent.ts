/**
 * How far into its file the clusters of a qcow2 image reach. `qemu-img check` forgives a last cluster that is cut
 * off (an honest image may end inside one), so a download that lost its last few KiB would pass it. The tables
 * tell exactly where the guest's data ends. Layout: QEMU's docs/interop/qcow2.txt, "Cluster mapping".
 */
import { AppError } from '../model/errors.ts';
import { throwIfCancelled } from './cancel.ts';
import type { Qcow2Header } from './qcow2.ts';
import { decodeCluster, offsetMask } from './qcow2-cluster.ts';

export type ReadAt = (offset: number, length: number) => Promise<Uint8Array>;

/** First byte of the file that no table and no guest data of the active state needs, as far as bytes must be there. */
export async function dataEnd(header: Qcow2Header, readAt: ReadAt, signal: AbortSignal): Promise<number> {
  const { clusterBytes, l1, extendedL2, virtualBytes } = header;
  const entryBytes = extendedL2 ? 16 : 8;
  const guestBytesPerL2 = clusterBytes * (clusterBytes / entryBytes);
  const table = await readWhole(readAt, l1.offset, l1.entries * 8);
  const seen = new Set<number>();
  let end = 0;
  for (let i = 0; i < l1.entries; i += 1) {
    const offset = Number(table.getBigUint64(i * 8) & offsetMask);
    if (offset === 0 || seen.has(offset)) continue;
    seen.add(offset);
    throwIfCancelled(signal, 'Check image');
    const l2 = await readWhole(readAt, offset, clusterBytes);
    end = Math.max(end, offset + clusterBytes);
    for (let at = 0; at < clusterBytes; at += entryBytes) {
      const guestOffset = i * guestBytesPerL2 + (at / entryBytes) * clusterBytes;
      const visibleBytes = Math.min(clusterBytes, virtualBytes - guestOffset);
      if (visibleBytes <= 0) break;
      const entry = l2.getBigUint64(at);
      if (entry === 0n) continue;
      const bitmap = extendedL2 ? l2.getBigUint64(at + 8) : undefined;
      end = Math.max(end, clusterEnd(entry, bitmap, visibleBytes, clusterBytes));
    }
  }
  return end;
}

/** End of one cluster's bytes in the file; 0 when it has none. */
function clusterEnd(
  entry: bigint,
  bitmap: bigint | undefined,
  visibleBytes: number,
  clusterBytes: number,
): number {
  const cluster = decodeCluster(entry, bitmap, clusterBytes);
  switch (cluster.kind) {
    case 'absent':
    case 'zero':
      return 0;
    case 'data':
      return cluster.offset + visibleBytes;
    case 'compressed':
      return cluster.offset + cluster.lengthBytes;
    case 'subclusters': {
      const present = 32 - Math.clz32(cluster.data);
      return present === 0 ? 0 : cluster.offset + Math.min(visibleBytes, (present * clusterBytes) / 32);
    }
  }
}

async function readWhole(readAt: ReadAt, offset: number, length: number): Promise<DataView> {
  const bytes = await readAt(offset, length);
  if (bytes.length < length)
    throw new AppError(
      'image_corrupt',
      `Read the qcow2 tables: the file ends at byte ${offset + bytes.length}, wanted ${length} bytes from ${offset}`,
    );
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}
