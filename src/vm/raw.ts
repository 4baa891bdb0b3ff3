/**
 * Tells a raw disk from a file that merely is no qcow2, without I/O. A text file, an archive or a broken download
 * would otherwise be taken for a disk and fail only inside the guest. A disk shows itself by a partition table or
 * a file system, and these also say how long the disk must be.
 * Layouts: UEFI specification chapter 5 (MBR, GPT); Linux Documentation/filesystems/ext4 (superblock).
 */
import { AppError } from '../model/errors.ts';

/** How many first bytes of a file `requireRawDisk` wants to see. */
export const rawHeadBytes = 128 * 1024;

/** What people pick by mistake, by its first bytes. */
const notDisks: { name: string; at: number; bytes: string }[] = [
  { name: 'a gzip archive', at: 0, bytes: '\x1f\x8b' },
  { name: 'an xz archive', at: 0, bytes: '\xfd7zXZ\0' },
  { name: 'a zstd archive', at: 0, bytes: '\x28\xb5\x2f\xfd' },
  { name: 'a bzip2 archive', at: 0, bytes: 'BZh' },
  { name: 'a zip archive', at: 0, bytes: 'PK\x03\x04' },
  { name: 'a VMDK disk', at: 0, bytes: 'KDMV' },
  { name: 'a VMDK descriptor', at: 0, bytes: '# Disk DescriptorFile' },
  { name: 'a VHDX disk', at: 0, bytes: 'vhdxfile' },
  { name: 'a VHD disk', at: 0, bytes: 'conectix' },
  { name: 'a VDI disk', at: 64, bytes: '\x7f\x10\xda\xbe' },
];

const fileSystems: { at: number; bytes: string }[] = [
  { at: 1080, bytes: '\x53\xef' }, // ext2, ext3, ext4
  { at: 0, bytes: 'XFSB' },
  { at: 0x10040, bytes: '_BHRfS_M' }, // btrfs
  { at: 0, bytes: 'hsqs' }, // squashfs
  { at: 1024, bytes: '\xe2\xe1\xf5\xe0' }, // erofs
  { at: 512, bytes: 'LABELONE' }, // LVM
  { at: 0x8001, bytes: 'CD001' }, // ISO 9660
];

/**
 * Throws `image_corrupt` unless the file is a raw disk of `fileBytes` that is whole by its own account. With
 * `stated` the caller vouches that it is one, and a disk without partitions or file system passes too.
 */
export function requireRawDisk(head: Uint8Array, fileBytes: number, stated: boolean): void {
  const other = notDisks.find((kind) => has(head, kind.at, kind.bytes));
  if (other) throw notRaw(`it is ${other.name}`, 'a raw disk; unpack or convert it first');
  if (fileBytes === 0 || fileBytes % 512 !== 0)
    throw notRaw(`it has ${fileBytes} bytes`, 'a multiple of 512 above 0');
  const view = new DataView(head.buffer, head.byteOffset, head.byteLength);
  const endBytes = gptEnd(view, head) ?? mbrEnd(view, head) ?? extEnd(view, head);
  if (endBytes !== undefined && endBytes > fileBytes)
    throw notRaw(`it has ${fileBytes} bytes`, `the ${endBytes} bytes that its own tables speak of`);
  const known =
    endBytes !== undefined || hasBootSignature(head) || fileSystems.some((fs) => has(head, fs.at, fs.bytes));
  if (!known && !stated)
    throw notRaw('it has no partition table and no known file system', "one, or the format stated as 'raw'");
}

/** End of the disk by its GUID partition table, whose backup header lies in the last sector. */
function gptEnd(view: DataView, head: Uint8Array): number | undefined {
  for (const sectorBytes of [512, 4096]) {
    if (!has(head, sectorBytes, 'EFI PART') || head.length < sectorBytes + 92) continue;
    return (Number(view.getBigUint64(sectorBytes + 32, true)) + 1) * sectorBytes;
  }
  return undefined;
}

/** End of the last partition of an MBR; a boot sector whose entries are not partitions tells nothing. */
function mbrEnd(view: DataView, head: Uint8Array): number | undefined {
  if (!hasBootSignature(head)) return undefined;
  let end = 0;
  for (let entry = 446; entry < 510; entry += 16) {
    const status = head[entry];
    const type = head[entry + 4];
    if (status !== 0 && status !== 0x80) return undefined;
    // 0xee covers a GPT disk and may claim more than there is; 0 is an unused entry.
    if (type === 0 || type === 0xee) continue;
    end = Math.max(end, (view.getUint32(entry + 8, true) + view.getUint32(entry + 12, true)) * 512);
  }
  return end || undefined;
}

/** End of an ext2, ext3 or ext4 file system that fills the disk. */
function extEnd(view: DataView, head: Uint8Array): number | undefined {
  if (!has(head, 1080, '\x53\xef') || head.length < 2048) return undefined;
  const logBlock = view.getUint32(1024 + 24, true);
  if (logBlock > 6) return undefined;
  const is64Bit = (view.getUint32(1024 + 96, true) & 0x80) !== 0;
  const blocks = view.getUint32(1024 + 4, true) + (is64Bit ? view.getUint32(1024 + 336, true) * 2 ** 32 : 0);
  return blocks * 1024 * 2 ** logBlock;
}

const hasBootSignature = (head: Uint8Array): boolean => has(head, 510, '\x55\xaa');

function has(head: Uint8Array, at: number, bytes: string): boolean {
  if (head.length < at + bytes.length) return false;
  for (let i = 0; i < bytes.length; i += 1) if (head[at + i] !== bytes.charCodeAt(i)) return false;
  return true;
}

const notRaw = (met: string, wanted: string): AppError =>
  new AppError('image_corrupt', `Read the file as a raw disk: ${met}, wanted ${wanted}`);
