/** For Linux devices: the companion of a VM that follows. */
export { type Attachment, type CompanionEvent, type CompanionOptions, DeviceCompanion } from './companion.ts';
export { attachmentOf, type Links, measureByHandshake, measureConnections, runProgram } from './linux.ts';
