/** Why bytes are no stream that we understand. A closed list: each reason has its test. */
import { AppError } from '../model/errors.ts';

export const refusals = {
  header: 'it does not begin as a migration stream of version 3',
  section: 'a section of an unknown kind',
  iterable: 'an iterable section besides ram',
  ram_version: 'a version of ram that is not 4',
  section_id: 'a section with the id of no section that was started',
  flags: 'a page record with unknown flags',
  blocks: 'a table of RAM blocks that does not add up',
  block: 'a page of an unknown block, or outside of it',
  command: 'an unknown command, or one of the wrong length',
  length: 'a length beyond its bound',
  answer: 'an unknown message on the return path',
  truncated: 'an end in the middle',
} as const;
export type Refusal = keyof typeof refusals;

export function streamRefused(reason: Refusal, found: string): AppError {
  return new AppError('qemu_failed', `Cannot read QEMU's migration stream: ${refusals[reason]} (${found})`, {
    reason,
  });
}
