/** The room's door: QEMU's migration stream, read and written without I/O. FORMAT.md is its page. */
export { BlockTable, type RamBlock } from './blocks.ts';
export { ByteQueue } from './byte-queue.ts';
export { devicesOf } from './device-state.ts';
export { command, pageBytes, pageShift } from './layout.ts';
export * from './records.ts';
export { type Refusal, refusals, streamRefused } from './refusal.ts';
export { type Answer, AnswerParser, encodeAnswer } from './return-path.ts';
export { type RamSectionKind, type StreamHandler, StreamParser } from './stream-parser.ts';
