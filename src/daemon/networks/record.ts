/** What a cloudlet keeps of its part in one change of a VM's network. */
import type { Uuid } from '../../model/ids.ts';
import type { Place } from '../../model/vm.ts';
import type { Handoff } from '../../network/index.ts';

export interface HandoffRecord {
  /** Of the migration that it belongs to. */
  id: Uuid;
  vmId: Uuid;
  /**
   * `source` and `destination` of a migration; afterwards, as long as a VM keeps its address, `home` (whose LAN it is of) and
   * `away` (where the VM is).
   */
  role: 'source' | 'destination' | 'home' | 'away';
  /** The cloudlet at the other end. */
  peer: { id: Uuid; name: string };
  /** Who asked the home for it, beside `peer`. */
  askedBy?: Uuid;
  /** As this cloudlet plans it. */
  handoff: Handoff;
  /** At the source: how many of the steps before the migration have begun. */
  begun?: number;
  /** Where the VM will be at home after the move; at the destination. */
  place?: Place;
  home?: { cloudletId: Uuid; name: string };
  /** At the destination, until the VM begins to come: when it is given up. */
  expiresAt?: string;
}
