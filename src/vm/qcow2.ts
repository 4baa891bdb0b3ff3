/**
 * Reads the header of a qcow2 file, without I/O, and refuses what an image from outside must not have: a second
 * file that QEMU would open on its behalf, encryption, features that nobody here knows, tables outside the file.
 * Every image passes this before a QEMU tool sees it. Layout: QEMU's docs/interop/qcow2.txt; bounds: block/qcow2.h.
 */
import { AppError } from '../model/errors.ts';
import { GiB, MiB } from '../model/units.ts';

/** Enough of any qcow2 file for its header: one cluster of the largest size. */
export const maxHeaderBytes = 2 * MiB;
export const maxVirtualBytes = 16 * 1024 * GiB;

const magic = 0x514649fb;
const maxL1Bytes = 32 * MiB;
const maxRefcountTableBytes = 8 * MiB;
const maxSnapshots = 65_536;
const maxBackingNameBytes = 1023;

const incompatible = { dirty: 1n, corrupt: 2n, externalData: 4n, compressionType: 8n, extendedL2: 16n };
const knownIncompatible = 31n;
const extension = { end: 0, backingFormat: 0xe2792aca, externalData: 0x44415441, luks: 0x0537be77 };

export interface Qcow2Header {
  version: 2 | 3;
  clusterBytes: number;
  virtualBytes: number;
  l1: { offset: number; entries: number };
  refcountTable: { offset: number; bytes: number };
  snapshots: { offset: number; count: number };
  encrypted: boolean;
  dirty: boolean;
  corrupt: boolean;
  externalData: boolean;
  extendedL2: boolean;
  compression: 'zlib' | 'zstd';
  backing?: { file: string; format?: string };
}

/** Whether a file that begins with these bytes calls itself qcow2. */
export const isQcow2 = (head: Uint8Array): boolean =>
  head.length >= 4 && new DataView(head.buffer, head.byteOffset).getUint32(0) === magic;

/**
 * The header in the first bytes of a qcow2 file (give `maxHeaderBytes` or the whole file, if it is shorter).
 * Throws `image_corrupt` for anything that QEMU would not take, and for features that are unknown here.
 */
export function parseQcow2Header(head: Uint8Array): Qcow2Header {
  if (!isQcow2(head)) throw corrupt('the magic number is missing', 'QFI\\xfb at byte 0');
  const view = new DataView(head.buffer, head.byteOffset, head.byteLength);
  need(head, 72);
  const version = view.getUint32(4);
  if (version !== 2 && version !== 3) throw corrupt(`version is ${version}`, '2 or 3');
  const clusterBits = view.getUint32(20);
  if (clusterBits < 9 || clusterBits > 21) throw corrupt(`cluster_bits is ${clusterBits}`, '9 to 21');
  const clusterBytes = 2 ** clusterBits;
  const virtualBytes = offsetAt(view, 24, 'size');
  if (virtualBytes === 0 || virtualBytes % 512 !== 0 || virtualBytes > maxVirtualBytes)
    throw corrupt(`size is ${virtualBytes}`, `a multiple of 512 up to ${maxVirtualBytes}`);
  const encryption = view.getUint32(32);
  if (encryption > 2) throw corrupt(`crypt_method is ${encryption}`, '0 (none)');

  const { headerBytes, features, compression } =
    version === 3
      ? parseVersion3(view, head)
      : { headerBytes: 72, features: 0n, compression: 'zlib' as const };
  if (headerBytes > clusterBytes) throw corrupt(`header_length is ${headerBytes}`, 'at most one cluster');
  const extendedL2 = (features & incompatible.extendedL2) !== 0n;
  if (extendedL2 && clusterBits < 14)
    throw corrupt(`cluster_bits is ${clusterBits} with extended L2 entries`, 'at least 14');

  const backingName = { offset: offsetAt(view, 8, 'backing_file_offset'), length: view.getUint32(16) };
  const extensionsEnd = backingName.offset === 0 ? clusterBytes : Math.min(clusterBytes, backingName.offset);
  const extensions = parseExtensions(view, head, headerBytes, extensionsEnd);

  const l1 = { offset: offsetAt(view, 40, 'l1_table_offset'), entries: view.getUint32(36) };
  const perL2 = clusterBytes / (extendedL2 ? 16 : 8);
  const l1Wanted = Math.ceil(virtualBytes / (clusterBytes * perL2));
  if (l1.entries * 8 > maxL1Bytes || l1.entries < l1Wanted)
    throw corrupt(`l1_size is ${l1.entries}`, `${l1Wanted} to ${maxL1Bytes / 8}`);
  const refcountTable = {
    offset: offsetAt(view, 48, 'refcount_table_offset'),
    bytes: view.getUint32(56) * clusterBytes,
  };
  if (refcountTable.bytes === 0 || refcountTable.bytes > maxRefcountTableBytes)
    throw corrupt(
      `refcount_table_clusters is ${view.getUint32(56)}`,
      `1 to ${maxRefcountTableBytes / clusterBytes}`,
    );
  const snapshots = { offset: offsetAt(view, 64, 'snapshots_offset'), count: view.getUint32(60) };
  if (snapshots.count > maxSnapshots)
    throw corrupt(`nb_snapshots is ${snapshots.count}`, `at most ${maxSnapshots}`);
  aligned('l1_table_offset', l1.offset, clusterBytes);
  aligned('refcount_table_offset', refcountTable.offset, clusterBytes);
  if (snapshots.count > 0) aligned('snapshots_offset', snapshots.offset, clusterBytes);

  const header: Qcow2Header = {
    version,
    clusterBytes,
    virtualBytes,
    l1,
    refcountTable,
    snapshots,
    encrypted: encryption !== 0 || extensions.luks,
    dirty: (features & incompatible.dirty) !== 0n,
    corrupt: (features & incompatible.corrupt) !== 0n,
    externalData: (features & incompatible.externalData) !== 0n || extensions.externalData,
    extendedL2,
    compression,
  };
  if (backingName.offset !== 0) {
    header.backing = { file: parseBackingName(head, backingName, clusterBytes) };
    if (extensions.backingFormat !== undefined) header.backing.format = extensions.backingFormat;
  }
  return header;
}

/**
 * Throws `image_corrupt` unless the file of this header is whole at first sight and stands alone: no backing file,
 * no external data file, no encryption, closed cleanly, every table inside the `fileBytes` that there are.
 */
export function requireSelfContained(header: Qcow2Header, fileBytes: number): void {
  if (header.backing)
    throw corrupt(`it has the backing file '${header.backing.file}'`, 'a file that stands alone');
  if (header.externalData) throw corrupt('it keeps its data in another file', 'a file that stands alone');
  if (header.encrypted) throw corrupt('it is encrypted', 'no encryption');
  if (header.corrupt) throw corrupt('it is marked corrupt', 'a clean image');
  if (header.dirty)
    throw corrupt('it was not closed cleanly', 'a clean image (qemu-img check -r all mends it)');
  inside('the L1 table', header.l1.offset, header.l1.entries * 8, fileBytes);
  inside('the refcount table', header.refcountTable.offset, header.refcountTable.bytes, fileBytes);
  if (header.snapshots.count > 0)
    inside('the snapshot table', header.snapshots.offset, header.snapshots.count * 40, fileBytes);
}

function parseVersion3(
  view: DataView,
  head: Uint8Array,
): { headerBytes: number; features: bigint; compression: 'zlib' | 'zstd' } {
  need(head, 104);
  const features = view.getBigUint64(72);
  const unknown = features & ~knownIncompatible;
  if (unknown !== 0n) throw corrupt(`it needs unknown features 0x${unknown.toString(16)}`, 'known features');
  const refcountOrder = view.getUint32(96);
  if (refcountOrder > 6) throw corrupt(`refcount_order is ${refcountOrder}`, '0 to 6');
  const headerBytes = view.getUint32(100);
  if (headerBytes < 104 || headerBytes % 8 !== 0)
    throw corrupt(`header_length is ${headerBytes}`, 'a multiple of 8, at least 104');
  need(head, headerBytes);
  const compression = headerBytes > 104 ? view.getUint8(104) : 0;
  const compressionStated = (features & incompatible.compressionType) !== 0n;
  if (compression > 1 || compressionStated !== (compression !== 0))
    throw corrupt(`compression_type is ${compression}`, '0 (zlib) or 1 (zstd), with its feature bit set');
  return { headerBytes, features, compression: compression === 1 ? 'zstd' : 'zlib' };
}

function parseExtensions(view: DataView, head: Uint8Array, start: number, end: number) {
  const found: { externalData: boolean; luks: boolean; backingFormat?: string } = {
    externalData: false,
    luks: false,
  };
  let at = start;
  while (at + 8 <= end) {
    need(head, at + 8);
    const type = view.getUint32(at);
    const length = view.getUint32(at + 4);
    if (type === extension.end) break;
    const next = at + 8 + Math.ceil(length / 8) * 8;
    if (next > end)
      throw corrupt(`header extension 0x${type.toString(16)} has ${length} bytes`, `an end at byte ${end}`);
    need(head, next);
    if (type === extension.externalData) found.externalData = true;
    if (type === extension.luks) found.luks = true;
    if (type === extension.backingFormat) found.backingFormat = text(head, at + 8, length);
    at = next;
  }
  return found;
}

function parseBackingName(
  head: Uint8Array,
  at: { offset: number; length: number },
  clusterBytes: number,
): string {
  if (at.length === 0 || at.length > maxBackingNameBytes || at.offset + at.length > clusterBytes)
    throw corrupt(`backing_file_size is ${at.length}`, `1 to ${maxBackingNameBytes}, in the first cluster`);
  need(head, at.offset + at.length);
  return text(head, at.offset, at.length);
}

const text = (head: Uint8Array, at: number, length: number): string =>
  new TextDecoder().decode(head.subarray(at, at + length));

function offsetAt(view: DataView, at: number, field: string): number {
  const value = view.getBigUint64(at);
  if (value > BigInt(Number.MAX_SAFE_INTEGER)) throw corrupt(`${field} is ${value}`, 'a sane offset');
  return Number(value);
}

function aligned(field: string, offset: number, clusterBytes: number): void {
  if (offset === 0 || offset % clusterBytes !== 0)
    throw corrupt(`${field} is ${offset}`, `a multiple of the cluster size ${clusterBytes}`);
}

function inside(what: string, offset: number, bytes: number, fileBytes: number): void {
  if (offset + bytes > fileBytes)
    throw corrupt(
      `${what} ends at byte ${offset + bytes}`,
      `an end within the ${fileBytes} bytes of the file`,
    );
}

function need(head: Uint8Array, bytes: number): void {
  if (head.length < bytes)
    throw corrupt(`it ends after ${head.length} bytes`, `a header of ${bytes} bytes or more`);
}

const corrupt = (met: string, wanted: string): AppError =>
  new AppError('image_corrupt', `Read the qcow2 header: ${met}, wanted ${wanted}`);
