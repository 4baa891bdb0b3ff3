/**
 * How the program ends: an exit code for each class of error, and the lines that tell people what happened and
 * what helps. `docs/cli.md` has the same table (a test compares them).
 */
import { CommanderError } from 'commander';
import { AppError } from '../model/errors.ts';
import { ViperError, type ViperErrorCode } from '../sdk/client.ts';

export const exitCodes = {
  ok: 0,
  unexpected: 1,
  usage: 2,
  access: 3,
  notFound: 4,
  conflict: 5,
  unreachable: 6,
  failed: 7,
  noRoom: 8,
  interrupted: 130,
} as const;
export type ExitClass = keyof typeof exitCodes;

/** Total: a new error code does not compile until it has its class. */
export const exitClasses: Record<ViperErrorCode, ExitClass> = {
  invalid_request: 'usage',
  unauthenticated: 'access',
  forbidden: 'access',
  not_found: 'notFound',
  name_taken: 'conflict',
  wrong_state: 'conflict',
  busy: 'conflict',
  in_use: 'conflict',
  migration_refused: 'conflict',
  migration_failed: 'failed',
  agent_unavailable: 'conflict',
  payload_too_large: 'usage',
  unsupported_media_type: 'usage',
  image_corrupt: 'usage',
  digest_mismatch: 'usage',
  unsupported: 'usage',
  too_many: 'noRoom',
  internal: 'unexpected',
  peer_unreachable: 'unreachable',
  peer_untrusted: 'unreachable',
  qemu_failed: 'failed',
  interrupted: 'failed',
  cancelled: 'failed',
  timeout: 'failed',
  insufficient_space: 'noRoom',
  no_free_address: 'noRoom',
  insufficient_memory: 'noRoom',
  state_locked: 'conflict',
  state_too_new: 'conflict',
  not_initialised: 'conflict',
  unreachable: 'unreachable',
  bad_reply: 'unexpected',
};

/** What the caller typed, or has in a file, cannot be used. `message` names it, the value and what was wanted. */
export class UsageError extends Error {}

/** Ctrl-C. `message` is for people, and may be empty. */
export class Interrupted extends Error {}

export function exitCodeOf(error: unknown): number {
  if (error instanceof Interrupted) return exitCodes.interrupted;
  if (error instanceof UsageError) return exitCodes.usage;
  if (error instanceof CommanderError) return error.exitCode === 0 ? exitCodes.ok : exitCodes.usage;
  // A newer daemon may have codes that this table has not.
  if (error instanceof ViperError || error instanceof AppError)
    return exitCodes[exitClasses[error.code] ?? 'unexpected'];
  return exitCodes.unexpected;
}

/** The lines for stderr; none where commander has told it already. */
export function describeError(error: unknown): string[] {
  if (error instanceof CommanderError) return [];
  if (!(error instanceof Error)) return [`viper: ${String(error)}`];
  if (error.message === '') return [];
  const lines = [`viper: ${headlineOf(error)}`];
  if (error instanceof ViperError) lines.push(...detailsOf(error).map((line) => `  ${line}`));
  return lines;
}

/** The message, without what the lines below it list one by one. */
function headlineOf(error: Error): string {
  const problems = error instanceof ViperError ? listOf(error.details.problems) : [];
  if (problems.length < 2) return error.message;
  const listed = `: ${problems.map((problem) => (problem as { message?: unknown } | null)?.message).join('; ')}`;
  return error.message.endsWith(listed) ? error.message.slice(0, -listed.length) : error.message;
}

function detailsOf(error: ViperError): string[] {
  const { code, details, requestId, operationId } = error;
  const headline = headlineOf(error);
  const problems = listOf(details.problems).map(problemLine);
  // The message has a single problem in its own words.
  const lines = problems.filter((line) => !headline.endsWith(line));
  if (Array.isArray(details.allowed)) {
    lines.push(`allowed now: ${details.allowed.length > 0 ? details.allowed.join(', ') : 'nothing'}`);
  }
  const usedBy = listOf(details.usedBy).map(userOf);
  if (usedBy.length > 0) lines.push(`used by: ${usedBy.join(', ')}`);
  if (typeof details.operationId === 'string')
    lines.push(`watch it: viper operation watch ${details.operationId}`);
  for (const line of outputLines(details.output)) lines.push(`| ${line}`);
  if (code === 'unauthenticated') lines.push('set VIPER_TOKEN, or add a context: viper context add --help');
  if (code === 'forbidden' && typeof details.wanted === 'string') {
    lines.push(`an admin can make a token: viper token create --name NAME --scope ${details.wanted}`);
  }
  if (operationId) lines.push(`operation: ${operationId}`);
  if (code === 'internal' && requestId) lines.push(`request: ${requestId} (the daemon's log has more)`);
  return lines;
}

const listOf = (value: unknown): unknown[] => (Array.isArray(value) ? value : []);
const textOf = (value: unknown): string => (typeof value === 'string' ? value : JSON.stringify(value));

/** `vm web` of what uses an image. */
function userOf(user: unknown): string {
  const { kind, name } = (user ?? {}) as { kind?: unknown; name?: unknown };
  return typeof kind === 'string' && typeof name === 'string' ? `${kind} ${name}` : textOf(user);
}

/** Its own words, if it has some; else `body.memoryBytes is 5, wanted a multiple of 1048576`. */
function problemLine(problem: unknown): string {
  const { field, value, wanted, message } = (problem ?? {}) as Record<string, unknown>;
  if (typeof message === 'string') return message;
  if (typeof field !== 'string') return textOf(problem);
  const met = value === undefined ? '' : ` is ${JSON.stringify(value)}`;
  return `${field}${met}${wanted === undefined ? '' : `${met ? ',' : ':'} wanted ${textOf(wanted)}`}`;
}

/** The last lines that QEMU wrote. */
function outputLines(output: unknown): string[] {
  const lines = typeof output === 'string' ? output.trimEnd().split('\n') : listOf(output).map(textOf);
  return lines.filter((line) => line !== '').slice(-20);
}
