/**
 * One entry of a qcow2 L2 table: where the bytes of a cluster lie, without I/O.
 * Layout: QEMU's docs/interop/qcow2.txt, "Cluster mapping" and "Extended L2 entries".
 */
import { AppError } from '../model/errors.ts';

export const offsetMask = 0x00ff_ffff_ffff_fe00n;
const compressedBit = 1n << 62n;
const zeroBit = 1n;
const subclusters = 32;

export type Cluster =
  /** Not in this file: the backing file's, or zeroes where there is none. */
  | { kind: 'absent' }
  | { kind: 'zero' }
  | { kind: 'data'; offset: number }
  | { kind: 'compressed'; offset: number; lengthBytes: number }
  /** Bit i says whether subcluster i has data in the file, or reads as zero; neither: as if absent. */
  | { kind: 'subclusters'; offset: number; data: number; zero: number };

/** `bitmap` is the second half of an extended entry, undefined for a plain one. */
export function decodeCluster(entry: bigint, bitmap: bigint | undefined, clusterBytes: number): Cluster {
  if ((entry & compressedBit) !== 0n) return compressed(entry, clusterBytes);
  const offset = Number(entry & offsetMask);
  if (bitmap !== undefined) {
    const data = offset === 0 ? 0 : Number(bitmap & 0xffff_ffffn);
    return { kind: 'subclusters', offset, data, zero: Number(bitmap >> 32n) };
  }
  if ((entry & zeroBit) !== 0n) return { kind: 'zero' };
  return offset === 0 ? { kind: 'absent' } : { kind: 'data', offset };
}

/** The descriptor counts whole sectors after the one in which the compressed bytes begin. */
function compressed(entry: bigint, clusterBytes: number): Cluster {
  const offsetBits = BigInt(62 - (Math.log2(clusterBytes) - 8));
  const offset = Number(entry & ((1n << offsetBits) - 1n));
  const moreSectors = Number((entry & (compressedBit - 1n)) >> offsetBits);
  const end = Math.floor(offset / 512) * 512 + (moreSectors + 1) * 512;
  return { kind: 'compressed', offset, lengthBytes: end - offset };
}

/** A stretch of a cluster whose bytes are all of one kind. */
export interface Stretch {
  kind: 'absent' | 'zero' | 'data';
  /** From the start of the cluster. */
  at: number;
  lengthBytes: number;
  /** Of its first byte in the file; data only. */
  fileOffset: number;
}

/** The whole cluster as stretches, subclusters of one kind joined. Not for compressed ones. */
export function stretchesOf(
  cluster: Exclude<Cluster, { kind: 'compressed' }>,
  clusterBytes: number,
): Stretch[] {
  if (cluster.kind !== 'subclusters') {
    const fileOffset = cluster.kind === 'data' ? cluster.offset : 0;
    return [{ kind: cluster.kind, at: 0, lengthBytes: clusterBytes, fileOffset }];
  }
  const stretches: Stretch[] = [];
  const pieceBytes = clusterBytes / subclusters;
  for (let i = 0; i < subclusters; i += 1) {
    const isData = ((cluster.data >>> i) & 1) === 1;
    const isZero = ((cluster.zero >>> i) & 1) === 1;
    if (isData && isZero)
      throw new AppError('image_corrupt', `Read disk: subcluster ${i} is both data and zero, wanted one`);
    const kind = isData ? 'data' : isZero ? 'zero' : 'absent';
    const last = stretches.at(-1);
    if (last?.kind === kind) last.lengthBytes += pieceBytes;
    else {
      const at = i * pieceBytes;
      stretches.push({ kind, at, lengthBytes: pieceBytes, fileOffset: isData ? cluster.offset + at : 0 });
    }
  }
  return stretches;
}
