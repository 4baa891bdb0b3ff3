/** What `bench:migrate` has in its guest, and how both ways of moving it are measured. */
import { statSync } from 'node:fs';
import { GiB, MiB } from '../model/units.ts';
import type { VmSpec } from '../model/vm.ts';

export const memoryBytes = 2 * GiB;
/** In memory and on disk; random, so that neither is zero. */
export const filledMiB = Number(process.env.MEMORY_MIB ?? 1024);
export const diskMiB = Number(process.env.DISK_MIB ?? 512);

/** A move of the guest. Times are of what both ways have alike. */
export interface Move {
  /** From the mirror's order to its word that it has caught up. */
  diskMs: number;
  /** From the order to send memory to vCPUs that run at the destination, and QEMU's own count of bytes. */
  memoryMs: number;
  memoryBytes: number;
  /** From the request to a source that holds nothing any more, with all that comes before and behind. */
  totalMs: number;
  /** The longest time without a sign of life, and what QEMU counts as downtime. */
  gapMs: number;
  qemuDowntimeMs: number;
  /** Over the whole move, without the vCPUs. Plain QEMU has no daemons. */
  cpuMs: { source: number; destination: number; sourceDaemon?: number; destinationDaemon?: number };
}

/** One way of moving a guest; each has its own guest, which rests while the other one moves. */
export interface Way extends AsyncDisposable {
  move(): Promise<Move>;
  rest(): Promise<void>;
  wake(): Promise<void>;
}

/**
 * Fills memory by doubling 8 MiB of random bytes, which a guest without KVM does in seconds, and then gives a sign of
 * life every 10 ms: a ping of itself, since a shell's loop would start a program for each and take a third of a core.
 */
export const load = `
set -e
mkdir -p /mnt/ram && mount -t tmpfs -o size=1800m none /mnt/ram && cd /mnt/ram
dd if=/dev/urandom of=8 bs=1M count=8
cat 8 8 8 8 8 8 8 8 > 64
: > file
for _ in $(seq ${filledMiB / 64}); do cat 64 >> file; done
rm 8 64
dd if=file of=/dev/vda bs=1M seek=64 count=${diskMiB} oflag=direct
sync
ip link set lo up
ping -i 0.01 127.0.0.1 > /dev/ttyS0 2>&1 < /dev/null &
`;

export const spec: VmSpec = {
  machine: 'pc-q35-7.2',
  accelerator: 'auto',
  cpu: { model: 'Nehalem-v1', count: 1 },
  memoryBytes,
  disk: { image: `sha256:${'0'.repeat(64)}`, sizeBytes: (64 + diskMiB + 64) * MiB },
  nets: [],
  seed: { hostname: 'bench', sshKeys: [], addresses: [] },
};

/** Looks at the console logs of both sides until told to stop; gives the longest silence. */
export function watchSilence(logs: readonly string[]): () => number {
  let last = performance.now();
  let sizes = '';
  let longestMs = 0;
  const look = () => {
    const now = performance.now();
    const found = logs.map((file) => statSync(file, { throwIfNoEntry: false })?.size ?? 0).join();
    if (found === sizes) return;
    longestMs = Math.max(longestMs, now - last);
    last = now;
    sizes = found;
  };
  look();
  longestMs = 0;
  const timer = setInterval(look, 3);
  return () => {
    clearInterval(timer);
    return Math.max(longestMs, performance.now() - last);
  };
}

/** For signs of life to be seen before the first and after the last moment of a move. */
export const settleMs = 500;
