/** An escrow as the store has it: who may go on with a VM whose destination may be lost before it is whole. */
import type { Uuid } from '../../model/ids.ts';
import type { VmToMove } from '../../model/migration.ts';

export interface EscrowRecord {
  migrationId: Uuid;
  /** The destination, which runs the VM, and alone may release it. */
  depositor: { id: Uuid; name: string };
  createdAt: string;
  /**
   * `held`: the destination owns the VM, and it may be claimed here. `released`: it never may be. `claimed`: it is this
   * cloudlet's, and has not run here yet. `run`: it has.
   */
  state: 'held' | 'released' | 'claimed' | 'run';
  /** Missing in one that was released before it came. */
  deposit?: Deposit;
  /** By which it is this cloudlet's. */
  epoch?: number;
}

export interface Deposit {
  vm: VmToMove;
  /** The destination's. */
  epoch: number;
  /** Of the internal snapshot of its disk. */
  diskMark: string;
  bytes: number;
}

export const isClaimed = ({ state }: EscrowRecord): boolean => state === 'claimed' || state === 'run';
