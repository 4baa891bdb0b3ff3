/**
 * What the two daemons say to each other about one migration.
 *
 *   source                                              destination
 *     prepare {vm, epoch n} -------------------------->   checks all, reserves, makes disk and QEMU
 *             <------------------------- prepared {ticket} or refused {problems}
 *     ==== sessions of the ticket: disk (NBD), memory ==>
 *     VM is stopped, all is sent, QEMU can no longer
 *     resume it by itself: *released, epoch n+1*
 *     commit {epoch n+1} ----------------------------->   loaded + commit: *own, epoch n+1*, VM runs
 *             <------------------------- committed {epoch n+1}, while the VM's state is not loaded yet
 *     post-copy: only now the last state goes out, for
 *     from there QEMU has no way back
 *             <------------------------- running {epoch n+1, complete}
 *     post-copy: serves pages until `complete`
 *     QEMU quits, files go
 *     done ------------------------------------------->   forgets the migration
 *
 * Relayed: as post-copy, but what is missing goes to relays, and the destination is told where it is. When all of that is
 * in its journal:
 *             <------------------------- running {epoch n+1, complete: false, divided: true}
 *     QEMU quits, files go: the source holds nothing more
 *     done ------------------------------------------->   merges on by itself, until the VM is whole
 *
 * Not so smoothly:
 *     abort {epoch} ---------------------------------->   discards; it never had the right to run
 *             <------------------------- gone             nothing of it is left
 *             <------------------------- rejected         will never run it: only now may the source take it back
 *             <------------------------- ask              what became of it? Answered by commit, abort or done
 *     pages-lost ------------------------------------->   post-copy cannot end: the VM has crashed there
 *             <------------------------- recover {ticket} post-copy lost its session: come with a new one
 *             <------------------------- unknown          a commit for a migration without a record: for a human
 *
 * Every message may be lost, repeated or late; both sides repeat until answered. The higher epoch wins.
 */
import type { MergeStatistics, MigrationCost, MigrationOptions, VmToMove } from '../model/migration.ts';

export type SessionPurpose = 'disk' | 'memory';

/** What the destination gave for this one migration: the right to open its sessions. */
export interface Ticket {
  /** One-time secret; the destination keeps only its hash. */
  secret: string;
  expiresAt: string;
}

export interface Problem {
  /** What does not fit: 'machine', 'cpu.model', 'memory', ... */
  field: string;
  value: unknown;
  wanted: unknown;
  message: string;
}

export type ToDestination =
  | { name: 'prepare'; vm: VmToMove; options: MigrationOptions }
  | { name: 'commit'; epoch: number }
  | { name: 'abort'; epoch: number }
  | { name: 'pages-lost' }
  | { name: 'done' };

export type ToSource =
  | { name: 'prepared'; ticket: Ticket }
  | { name: 'refused'; problems: Problem[] }
  | { name: 'committed'; epoch: number }
  /**
   * `divided`: what is missing is held by relays, and by the destination where it is, so the source is not needed.
   * `cost` with the last one: what the migration cost the destination.
   */
  | { name: 'running'; epoch: number; complete: boolean; divided?: boolean; cost?: MigrationCost }
  | { name: 'rejected'; reason: string }
  | { name: 'recover'; ticket: Ticket }
  | { name: 'gone' }
  | { name: 'ask' }
  | { name: 'unknown' };

/** Relayed, after the exit, for the history of a source that is still there: the VM is whole. No part of the machines. */
export interface Merged {
  name: 'merged';
  merge: MergeStatistics;
  cost?: MigrationCost;
}

/** Why a migration ended without moving the VM, as it stands in the journal. */
export interface Ending {
  code: 'cancelled' | 'refused' | 'failed' | 'rejected' | 'interrupted' | 'vm_ended' | 'claimed';
  message: string;
  problems?: Problem[];
}

/** A transition that a state does not allow, by name. */
export type RefusalName = 'committed' | 'over' | 'nothing_to_claim' | 'has_run_elsewhere' | 'not_possible';

export interface Refused {
  refused: RefusalName;
  message: string;
}

/** The next state and what to do, in this order, after the state is journalled. */
export interface Next<State, Effect> {
  state: State;
  effects: readonly Effect[];
}

export const isRefused = (answer: Next<unknown, unknown> | Refused): answer is Refused => 'refused' in answer;

export function refuse(refused: RefusalName, message: string): Refused {
  return { refused, message };
}
