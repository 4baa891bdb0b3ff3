/** The table of faults: every state that a journal can show, and everything that can go wrong while it is there. */
import type { MigrationMode } from '../../src/model/migration.ts';

export const faults = [
  'kill source daemon',
  'kill destination daemon',
  'kill source QEMU',
  'kill destination QEMU',
  'cut 1 s',
  'cut 30 s',
  'cut for good',
  'destination disk full',
] as const;
export type Fault = (typeof faults)[number] | 'destination refuses the state';

/** Where a migration is caught. */
export interface Moment {
  role: 'source' | 'destination';
  state: string;
  /** Of a state that lasts, the phase in which the fault strikes; else it is held right after its journal entry. */
  phase?: 'disk' | 'memory';
  mode: MigrationMode;
  /** What makes it come to this state; a migration that goes well does not. */
  by?: 'cancel';
}

export const moments: Moment[] = [
  { role: 'source', state: 'preparing', mode: 'precopy' },
  { role: 'source', state: 'copying', phase: 'disk', mode: 'precopy' },
  { role: 'source', state: 'copying', phase: 'memory', mode: 'precopy' },
  { role: 'source', state: 'switching', mode: 'precopy' },
  { role: 'source', state: 'switching', mode: 'postcopy' },
  { role: 'source', state: 'serving', mode: 'postcopy' },
  { role: 'source', state: 'leaving', mode: 'precopy' },
  { role: 'source', state: 'undoing', mode: 'precopy', by: 'cancel' },
  { role: 'source', state: 'withdrawing', mode: 'precopy', by: 'cancel' },
  { role: 'destination', state: 'reserved', mode: 'precopy' },
  { role: 'destination', state: 'waiting', mode: 'precopy' },
  { role: 'destination', state: 'owning', mode: 'precopy' },
  { role: 'destination', state: 'owning', mode: 'postcopy' },
  { role: 'destination', state: 'arrived', mode: 'precopy' },
  { role: 'destination', state: 'rejecting', mode: 'precopy', by: 'cancel' },
];

export interface Case {
  moment: Moment;
  fault: Fault;
}

export const cases: Case[] = [
  ...moments.flatMap((moment) => faults.map((fault) => ({ moment, fault }))),
  // It strikes when the last state is read, whatever the source does: so once for each way to end.
  ...(['precopy', 'postcopy'] as const).map(
    (mode): Case => ({
      moment: { role: 'destination', state: 'waiting', mode },
      fault: 'destination refuses the state',
    }),
  ),
];

/**
 * Stock QEMU has no way out of a post-copy that the destination cannot load: the VM is stopped at the source, the
 * operator is told, and its disk is whole.
 */
export const stopsTheVm = ({ moment: { mode }, fault }: Case): boolean =>
  mode === 'postcopy' && fault === 'destination refuses the state';

/** A few that end soon and cover both daemons, a QEMU and the link. */
export const quickCases: Case[] = [
  find('source', 'copying', 'kill source daemon', 'memory'),
  find('source', 'switching', 'kill destination daemon'),
  find('destination', 'waiting', 'kill destination QEMU'),
  find('destination', 'owning', 'cut 1 s'),
];

function find(role: Moment['role'], state: string, fault: Fault, phase?: Moment['phase']): Case {
  const found = cases.find(
    ({ moment, fault: each }) =>
      moment.role === role && moment.state === state && each === fault && moment.phase === phase,
  );
  if (!found) throw new Error(`There is no case ${role} ${state} ${fault}`);
  return found;
}

export const nameOf = ({ moment: { role, state, phase, mode }, fault }: Case): string =>
  `${role} ${state}${phase ? ` (${phase})` : ''}${mode === 'precopy' ? '' : ` ${mode}`}: ${fault}`;
