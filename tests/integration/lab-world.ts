/** What the tests of labs look at from outside: what pings come to, and what is left of a lab. */
import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import path from 'node:path';
import { promisify } from 'node:util';
import type { Lab } from '../../src/lab/lab.ts';
import { directoryOf } from '../../src/lab/record.ts';

const probes = path.resolve(import.meta.dirname, '../../src/lab/probes/main.ts');

/** Labs of other tests on this machine have other names. */
export const labName = (letter: string): string => `${letter}${process.pid.toString(36)}`;

export const skip = process.getuid?.() === 0 ? false : 'network namespaces need root';

export interface Pinged {
  sent: number;
  received: number;
  /** The shortest, which a busy machine makes least longer. */
  minMs: number;
}

/** `options`: of ping(8), such as how many and how often. */
export async function ping(lab: Lab, from: string, to: string, ...options: string[]): Promise<Pinged> {
  const command = lab.commandIn(from, ['ping', '-n', '-q', '-W', '1', ...options, to]);
  const [program, ...args] = command;
  // Without any answer it ends with 1.
  const { stdout } = await promisify(execFile)(program, args, { timeout: 120_000 }).catch((error) => {
    if (error.code === 1 && error.stdout) return error;
    throw error;
  });
  const [, sent, received] = /(\d+) packets transmitted, (\d+) received/.exec(stdout) ?? [];
  const [, min] = /rtt min\/\S+ = ([\d.]+)\//.exec(stdout) ?? [];
  return { sent: Number(sent), received: Number(received), minMs: Number(min) };
}

/** A measuring program at this place; `lines` are what it prints, parsed. */
export function probe(
  lab: Lab,
  at: string,
  ...argv: string[]
): { child: ChildProcess; lines: AsyncIterator<Line> } {
  return probeBy(lab, at, [], ...argv);
}

/** The same with MPTCP where it would use TCP. */
export const probeMptcp = (lab: Lab, at: string, ...argv: string[]) =>
  probeBy(lab, at, ['mptcpize', 'run'], ...argv);

function probeBy(
  lab: Lab,
  at: string,
  by: string[],
  ...argv: string[]
): { child: ChildProcess; lines: AsyncIterator<Line> } {
  const command = [...by, process.execPath, probes, ...argv] as [string, ...string[]];
  const [program, ...args] = lab.commandIn(at, command);
  const child = spawn(program, args, { stdio: ['ignore', 'pipe', 'inherit'] });
  return { child, lines: parsed(child) };
}

export interface Line {
  kind: string;
  [fact: string]: unknown;
}

async function* parsed(child: ChildProcess): AsyncGenerator<Line, undefined> {
  let rest = '';
  for await (const text of child.stdout!.setEncoding('utf8')) {
    const lines = (rest + text).split('\n');
    rest = lines.pop()!;
    for (const line of lines) yield JSON.parse(line) as Line;
  }
}

/** The next line of this kind. */
export async function lineOf(lines: AsyncIterator<Line>, kind: string): Promise<Line> {
  for (;;) {
    const { value, done } = await lines.next();
    if (done) throw new Error(`the program ended without a line '${kind}'`);
    if (value.kind === kind) return value;
  }
}

/** Namespaces, devices of the host and files of the lab of this name. */
export async function leftOf(name: string): Promise<string[]> {
  const [namespaces, links] = await Promise.all([
    promisify(execFile)('ip', ['netns', 'list']),
    promisify(execFile)('ip', ['-br', 'link']),
  ]);
  const lines = [...namespaces.stdout.split('\n'), ...links.stdout.split('\n')];
  return [
    ...lines.filter(
      (line) => line.startsWith(`viper-${name}-`) || new RegExp(`^viper-${name}[@ ]`).test(line),
    ),
    ...(existsSync(directoryOf(name)) ? [directoryOf(name)] : []),
  ];
}

/** Processes whose command line names the lab's directory or one of its namespaces. */
export async function processesOf(name: string): Promise<string[]> {
  const { stdout } = await promisify(execFile)('ps', ['-eo', 'pid,args']);
  return stdout.split('\n').filter((line) => line.includes(`${directoryOf(name)}/`));
}
