/**
 * What a guest does about its addresses when its network changes, as requests to its agent: one script, one call for
 * each step (`guest-network.sh` tells what they do). Its answers are the word of a guest: parsed here, and bounded.
 */
import { readFileSync } from 'node:fs';
import { AppError } from '../model/errors.ts';
import type { Place } from '../model/vm.ts';

/** An interface of the guest, and where it is at home. */
export interface GuestPlace extends Place {
  mac: string;
}

export type GuestStep =
  | { name: 'prepare' | 'finish'; next: GuestPlace; last: GuestPlace; mtu: number }
  /** Waits for the peers of all connections, no longer than `waitMs`. */
  | { name: 'join'; next: GuestPlace; last: GuestPlace; waitMs: number }
  /** Of a guest whose memory came from another; `idleMac`: of the interface that waits. */
  | { name: 'take'; next: GuestPlace; idleMac?: string }
  | { name: 'forget'; address: string }
  | { name: 'status' };

export interface GuestRequest {
  argv: [string, ...string[]];
  input: string;
  timeoutMs: number;
}

export interface GuestReply {
  exitCode: number;
  stdout: string;
  stderr: string;
}

/** How many MPTCP connections the guest has, and how many of them have joined the new address. */
export interface Joined {
  connections: number;
  joined: number;
  /** Whether the old address has gone out of use: only when all have joined. */
  dropped: boolean;
}

export interface GuestNetwork {
  interfaces: { name: string; mac: string; mtu: number; addresses: string[] }[];
  endpoints: { address: string; id: number }[];
  /** Established subflows of MPTCP connections; those of one connection have one token. */
  subflows: { local: string; remote: string; token: string }[];
}

const script = readFileSync(new URL('guest-network.sh', import.meta.url), 'utf8');
/** Without KVM a process takes a fifth of a second, and a step is some dozens of them. */
const stepTimeoutMs = 30_000;
const maxItems = 1000;

export function guestRequest(step: GuestStep): GuestRequest {
  const waitMs = step.name === 'join' ? step.waitMs : 0;
  return {
    argv: ['/bin/sh', '-s', '--', step.name, ...argumentsOf(step)],
    input: script,
    timeoutMs: stepTimeoutMs + waitMs,
  };
}

function argumentsOf(step: GuestStep): string[] {
  switch (step.name) {
    case 'prepare':
    case 'finish':
      return [word(step.next), word(step.last), String(step.mtu)];
    case 'join':
      return [word(step.next), word(step.last), String(Math.ceil(step.waitMs / 1000))];
    case 'take':
      return [word(step.next), ...(step.idleMac === undefined ? [] : [step.idleMac])];
    case 'forget':
      return [step.address];
    case 'status':
      return [];
  }
}

const word = ({ mac, address, subnet, gateway }: GuestPlace): string =>
  [mac, address, subnet, gateway].join(',');

/** Throws `qemu_failed` with the guest's words when the step failed, or its answer makes no sense. */
export function parseJoined(reply: GuestReply): Joined {
  const { connections, joined, dropped } = parse('join', reply);
  if (!isCount(connections) || !isCount(joined) || typeof dropped !== 'boolean')
    throw nonsense('join', reply);
  return { connections, joined, dropped };
}

/** Throws as `parseJoined` does. */
export function parseStatus(reply: GuestReply): GuestNetwork {
  const { interfaces, endpoints, subflows } = parse('status', reply);
  for (const list of [interfaces, endpoints, subflows])
    if (!Array.isArray(list) || list.length > maxItems) throw nonsense('status', reply);
  return { interfaces, endpoints, subflows } as GuestNetwork;
}

/** Throws as `parseJoined` does. */
export function requireDone(step: GuestStep['name'], reply: GuestReply): void {
  parse(step, reply);
}

function parse(step: string, reply: GuestReply): Record<string, unknown> {
  const { exitCode, stdout, stderr } = reply;
  if (exitCode !== 0) {
    const output = stderr.trim().slice(-1000);
    const message = `The guest failed to ${step} its network (exit ${exitCode}): ${output}`;
    throw new AppError('qemu_failed', message, { step, exitCode, output });
  }
  try {
    const value: unknown = JSON.parse(stdout);
    if (typeof value === 'object' && value !== null && !Array.isArray(value))
      return value as Record<string, unknown>;
  } catch {
    // Said below.
  }
  throw nonsense(step, reply);
}

const isCount = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) >= 0;

const nonsense = (step: string, { stdout }: GuestReply): AppError =>
  new AppError('qemu_failed', `The guest's answer to '${step}' makes no sense: '${stdout.slice(0, 200)}'`, {
    step,
  });
