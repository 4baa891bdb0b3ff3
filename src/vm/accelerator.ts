/**
 * Which accelerator a VM gets. The device node alone proves nothing: there are hosts where /dev/kvm opens and a
 * guest hangs after its firmware, because the CPU has no virtualisation to give. So KVM also wants vmx or svm.
 */
import { constants } from 'node:fs';
import { access, readFile } from 'node:fs/promises';
import { AppError } from '../model/errors.ts';
import type { Accelerator } from '../model/vm.ts';

export interface AcceleratorFacts {
  /** /dev/kvm can be opened for reading and writing. */
  kvmOpens: boolean;
  /** /proc/cpuinfo shows vmx or svm. */
  cpuVirtualises: boolean;
}

/** Throws `unsupported` where KVM was asked for by name and does not work. */
export function chooseAccelerator(wanted: Accelerator | 'auto', facts: AcceleratorFacts): Accelerator {
  const works = facts.kvmOpens && facts.cpuVirtualises;
  if (wanted === 'auto') return works ? 'kvm' : 'tcg';
  if (wanted === 'tcg' || works) return wanted;
  const why = facts.kvmOpens ? 'its CPU shows neither vmx nor svm' : '/dev/kvm does not open';
  throw new AppError('unsupported', `This host cannot run a VM with KVM: ${why}; wanted 'auto' or 'tcg'`, {
    field: 'accelerator',
    value: wanted,
    wanted: ['auto', 'tcg'],
  });
}

export async function readAcceleratorFacts(): Promise<AcceleratorFacts> {
  const [kvmOpens, cpuinfo] = await Promise.all([
    access('/dev/kvm', constants.R_OK | constants.W_OK).then(
      () => true,
      () => false,
    ),
    readFile('/proc/cpuinfo', 'utf8').catch(() => ''),
  ]);
  return { kvmOpens, cpuVirtualises: /^flags\s*:.*\b(vmx|svm)\b/m.test(cpuinfo) };
}
