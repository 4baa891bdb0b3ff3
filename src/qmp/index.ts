/** The room's door: one connection to one QEMU monitor. */
export * from './commands.ts';
export * from './connection.ts';
export * from './deadline.ts';
export * from './lines.ts';
export type { QemuVersion } from './messages.ts';
