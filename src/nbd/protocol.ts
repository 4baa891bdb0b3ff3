/**
 * The numbers and bounds of the NBD protocol as Viper speaks it: FORMAT.md. All integers are big-endian.
 * Source: NetworkBlockDevice/nbd, doc/proto.md.
 */
import { AppError } from '../model/errors.ts';
import { KiB, MiB } from '../model/units.ts';

export const greetingMagic = 0x4e42_444d_4147_4943n; // NBDMAGIC
export const optionMagic = 0x4948_4156_454f_5054n; // IHAVEOPT
export const optionReplyMagic = 0x0003_e889_0455_65a9n;
export const requestMagic = 0x2560_9513;
export const simpleReplyMagic = 0x6744_6698;
export const structuredReplyMagic = 0x668e_33ef;

export const handshakeFlag = { fixedNewstyle: 1, noZeroes: 2 };

export const option = {
  exportName: 1,
  abort: 2,
  list: 3,
  info: 6,
  go: 7,
  structuredReply: 8,
  listMetaContext: 9,
  setMetaContext: 10,
};

export const optionReply = {
  ack: 1,
  server: 2,
  info: 3,
  metaContext: 4,
  errUnsupported: 0x8000_0001,
  errPolicy: 0x8000_0002,
  errInvalid: 0x8000_0003,
  errUnknown: 0x8000_0006,
  errTooBig: 0x8000_0009,
};
export const isOptionError = (type: number): boolean => type >= 0x8000_0000;

export const infoType = { export: 0, name: 1, description: 2, blockSize: 3 };

export const transmissionFlag = {
  hasFlags: 1,
  readOnly: 2,
  sendFlush: 4,
  sendFua: 8,
  rotational: 16,
  sendTrim: 32,
  sendWriteZeroes: 64,
  sendDf: 128,
  canMultiConnection: 256,
  sendResize: 512,
  sendCache: 1024,
  sendFastZero: 2048,
};

export const commandTypes = {
  read: 0,
  write: 1,
  disconnect: 2,
  flush: 3,
  trim: 4,
  cache: 5,
  writeZeroes: 6,
  blockStatus: 7,
} as const;
export type CommandName = keyof typeof commandTypes;
export const commandNames = Object.keys(commandTypes) as CommandName[];

export const commandFlag = { fua: 1, noHole: 2, df: 4, reqOne: 8, fastZero: 16 };

export const chunkType = {
  none: 0,
  offsetData: 1,
  offsetHole: 2,
  blockStatus: 5,
  error: 0x8001,
  errorOffset: 0x8002,
};
export const chunkDone = 1;

/** The errors that the protocol has, by name as in errno(3). */
export const nbdErrors = {
  EPERM: 1,
  EIO: 5,
  ENOMEM: 12,
  EINVAL: 22,
  ENOSPC: 28,
  EOVERFLOW: 75,
  ENOTSUP: 95,
  ESHUTDOWN: 108,
} as const;
export type NbdErrorName = keyof typeof nbdErrors;

export const baseAllocation = 'base:allocation';
/** Bits of a status in `base:allocation`. */
export const extentFlag = { hole: 1, zero: 2 };

export const requestHeaderBytes = 28;
/** Payload of a read or a write; what every server must take, and QEMU's own bound. */
export const maxPayloadBytes = 32 * MiB;
export const maxNameBytes = 4096;
/** An option of the largest name, with some queries of metadata contexts. */
export const maxOptionBytes = 16 * KiB;
/** Extents that one answer to BLOCK_STATUS has at most. */
export const maxExtents = 4096;
export const maxErrorTextBytes = 4096;
/** Options before the transmission begins; QEMU sends 4. */
export const maxOptions = 32;

/** What an export is like; `flags` are transmission flags. */
export interface ExportInfo {
  sizeBytes: number;
  flags: number;
  minBlockBytes: number;
  preferredBlockBytes: number;
  maxPayloadBytes: number;
}

export interface Extent {
  lengthBytes: number;
  flags: number;
}

/** The other side does not keep to the protocol: the connection cannot go on. */
export const nbdRefused = (met: string, wanted: string): AppError =>
  new AppError('qemu_failed', `Read NBD: ${met}, wanted ${wanted}`, { output: met });

/** The other side answered a command with an error. */
export class NbdError extends Error {
  readonly nbdCode: NbdErrorName;

  constructor(nbdCode: NbdErrorName, message: string) {
    super(message);
    this.name = 'NbdError';
    this.nbdCode = nbdCode;
  }
}

export const errorNameOf = (number: number): NbdErrorName =>
  (Object.keys(nbdErrors) as NbdErrorName[]).find((name) => nbdErrors[name] === number) ?? 'EIO';
