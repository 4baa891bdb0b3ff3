/** The numbers of QEMU's migration stream. FORMAT.md tells what they mean and where they come from. */

export const magic = 0x5145_564d;
export const version = 3;
/** The section version of `ram` in every QEMU since 2.0. */
export const ramVersion = 4;

export const pageBytes = 4096;
export const pageShift = 12;

export const section = {
  eof: 0x00,
  start: 0x01,
  part: 0x02,
  end: 0x03,
  full: 0x04,
  subsection: 0x05,
  description: 0x06,
  configuration: 0x07,
  command: 0x08,
  footer: 0x7e,
} as const;

/** The low 12 bits of the be64 in front of each record of a RAM section. */
export const flag = {
  zero: 0x02,
  memSize: 0x04,
  page: 0x08,
  eos: 0x10,
  continue: 0x20,
} as const;

export const command = {
  openReturnPath: 1,
  ping: 2,
  postcopyAdvise: 3,
  postcopyListen: 4,
  postcopyRun: 5,
  discard: 6,
  packaged: 7,
  postcopyResume: 9,
  receivedBitmap: 10,
  switchoverStart: 11,
} as const;

export const answer = {
  shut: 1,
  pong: 2,
  requestPagesOf: 3,
  requestPages: 4,
  receivedBitmap: 5,
  resumeAck: 6,
  switchoverAck: 7,
} as const;

export const bitmapEnd = 0x0123_4567_89ab_cdefn;

/** Bounds of what a stream may claim. QEMU's own: 16 MiB for a package, 256 for names. */
export const limits = {
  blocks: 256,
  /** 4 TiB, so that a page's number fits 30 bits. */
  memoryBytes: 2 ** 42,
  packageBytes: 16 * 1024 * 1024,
  configurationBytes: 4096,
  commandBytes: 4096,
} as const;
