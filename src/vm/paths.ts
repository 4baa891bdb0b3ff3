/** The files of one running VM inside its own directory. */
import { join } from 'node:path';
import { AppError } from '../model/errors.ts';

export interface MachinePaths {
  qmp: string;
  agent: string;
  console: string;
  /** Where an incoming VM listens for its memory. */
  incoming: string;
  /** Where the daemon listens for memory that is captured. */
  capture: string;
  /** Named pipes of the spare monitor, and what QEMU calls both. */
  spare: string;
  spareIn: string;
  spareOut: string;
  consoleLog: string;
  qemuLog: string;
}

/** `sun_path` holds 108 bytes, the last of them 0 (unix(7)). */
const maxSocketPathBytes = 107;

export function machinePaths(directory: string): MachinePaths {
  return {
    qmp: join(directory, 'qmp.sock'),
    agent: join(directory, 'agent.sock'),
    console: join(directory, 'console.sock'),
    incoming: join(directory, 'incoming.sock'),
    capture: join(directory, 'capture.sock'),
    spare: join(directory, 'spare'),
    spareIn: join(directory, 'spare.in'),
    spareOut: join(directory, 'spare.out'),
    consoleLog: join(directory, 'console.log'),
    qemuLog: join(directory, 'qemu.log'),
  };
}

export const pipePaths = (paths: MachinePaths): string[] => [paths.spareIn, paths.spareOut];

export const socketPaths = (paths: MachinePaths): string[] => [
  paths.qmp,
  paths.agent,
  paths.console,
  paths.incoming,
  paths.capture,
];

/** Refuses a directory whose sockets the kernel could not name: it would cut the path without a word. */
export function checkSocketPaths(paths: MachinePaths): void {
  for (const path of socketPaths(paths)) {
    const bytes = Buffer.byteLength(path);
    if (bytes > maxSocketPathBytes) {
      throw new AppError(
        'unsupported',
        `Cannot make the socket ${path}: the path has ${bytes} bytes and a unix socket's has at most ` +
          `${maxSocketPathBytes}; use a shorter state directory`,
        { field: 'directory', path, bytes, maxBytes: maxSocketPathBytes },
      );
    }
  }
}
