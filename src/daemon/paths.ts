/** Where things lie in the state directory of a cloudlet. */
import path from 'node:path';
import type { Uuid } from '../model/ids.ts';

export interface Paths {
  root: string;
  images: string;
  vms: string;
  vm(id: Uuid): string;
  snapshots: string;
  snapshot(id: Uuid): string;
  /** Where the RAM of a VM that is being cloned waits; emptied at start. */
  captures: string;
  /** What stayed behind of the memory of VMs that have left. */
  kept: string;
  /** What this cloudlet holds for VMs of others, as their custodian. */
  escrows: string;
  /** What it holds of the disks of others for a while, as a relay; emptied at start. */
  relay: string;
}

export function statePaths(root: string): Paths {
  const under = (...parts: string[]) => path.join(root, ...parts);
  return {
    root,
    images: under('images'),
    vms: under('vms'),
    vm: (id) => under('vms', id),
    snapshots: under('snapshots'),
    snapshot: (id) => under('snapshots', id),
    captures: under('captures'),
    kept: under('kept'),
    escrows: under('escrows'),
    relay: under('relay'),
  };
}
