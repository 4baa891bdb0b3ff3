/** The network cables of a VM. */
import type { Machine } from './machine.ts';

/**
 * Plugs all cables of a VM in or out. The cut is made at the host's end of each interface, because the end in the
 * VM is part of its state: memory that is loaded would plug it in again.
 */
export async function setLinks(machine: Machine, up: boolean): Promise<void> {
  const devices = await machine.qmp.execute('qom-list', { path: '/machine/peripheral' });
  for (const { name } of devices) {
    const index = /^nic(\d+)$/.exec(name)?.[1];
    if (index !== undefined) await machine.qmp.execute('set_link', { name: `net${index}`, up });
  }
}
