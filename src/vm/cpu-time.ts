/**
 * CPU time of a QEMU from /proc, its vCPUs apart from the rest. QEMU names its threads (`debug-threads=on`): those of
 * vCPUs are called `CPU 0/KVM` or `CPU 0/TCG`. Reads at once, for /proc never waits.
 */
import { readdirSync, readFileSync } from 'node:fs';

/** USER_HZ, which is 100 on every Linux that runs QEMU's x86 guests. */
const msPerTick = 10;

export interface CpuTime {
  /** What the guest ran. */
  vcpuMs: number;
  /** What QEMU did beside it: devices, migration. */
  otherMs: number;
}

/** Undefined when the process is gone. */
export function readCpuTime(pid: number): CpuTime | undefined {
  const time: CpuTime = { vcpuMs: 0, otherMs: 0 };
  try {
    // Of the whole process, for threads that have ended count in it.
    const totalMs = ticksOf(readFileSync(`/proc/${pid}/stat`, 'utf8')) * msPerTick;
    for (const thread of readdirSync(`/proc/${pid}/task`)) {
      const stat = readFileSync(`/proc/${pid}/task/${thread}/stat`, 'utf8');
      if (/\(CPU \d+\//.test(stat)) time.vcpuMs += ticksOf(stat) * msPerTick;
    }
    time.otherMs = Math.max(0, totalMs - time.vcpuMs);
    return time;
  } catch {
    return undefined;
  }
}

/** Fields 14 and 15 of proc_pid_stat(5); the second, the name, may itself hold spaces and parentheses. */
export function ticksOf(stat: string): number {
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  return Number(fields[14 - 3]) + Number(fields[15 - 3]);
}

/** Memory of the process that is in use; undefined when it is gone. */
export function residentBytes(pid: number): number | undefined {
  try {
    return Number(readFileSync(`/proc/${pid}/statm`, 'utf8').split(' ')[1]) * 4096;
  } catch {
    return undefined;
  }
}
