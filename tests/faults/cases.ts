/** The table of faults: every state that a journal can show, and everything that can go wrong while it is there. */
import type { MigrationEngine, MigrationMode } from '../../src/model/migration.ts';

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
  /** `direct` if it is not named. */
  engine?: MigrationEngine;
  /** What makes it come to this state; a migration that goes well does not. */
  by?: 'cancel';
}

const directMoments: Moment[] = [
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
  { role: 'destination', state: 'arrived', mode: 'postcopy' },
  { role: 'destination', state: 'rejecting', mode: 'precopy', by: 'cancel' },
];

/** Where its agents take part; the other states are the machines' alone, and the same. */
const condensedMoments: Moment[] = (
  [
    { role: 'source', state: 'copying', phase: 'disk', mode: 'precopy' },
    { role: 'source', state: 'copying', phase: 'memory', mode: 'precopy' },
    { role: 'source', state: 'copying', phase: 'memory', mode: 'auto' },
    { role: 'source', state: 'switching', mode: 'precopy' },
    { role: 'source', state: 'switching', mode: 'postcopy' },
    { role: 'source', state: 'serving', mode: 'hybrid' },
    { role: 'source', state: 'serving', mode: 'postcopy' },
    { role: 'destination', state: 'owning', mode: 'precopy' },
    { role: 'destination', state: 'owning', mode: 'postcopy' },
    { role: 'destination', state: 'arrived', mode: 'postcopy' },
  ] as const
).map((moment) => ({ ...moment, engine: 'condensed' }));

export const moments: Moment[] = [...directMoments, ...condensedMoments];

export interface Case {
  moment: Moment;
  fault: Fault;
}

export const cases: Case[] = [
  ...moments.flatMap((moment) => faults.map((fault) => ({ moment, fault }))),
  // It strikes when the last state is read, whatever the source does: so once for each way to end.
  ...(['precopy', 'postcopy'] as const).flatMap((mode) =>
    (['direct', 'condensed'] as const).map(
      (engine): Case => ({
        moment: { role: 'destination', state: 'waiting', mode, engine },
        fault: 'destination refuses the state',
      }),
    ),
  ),
];

/**
 * Stock QEMU has no way out of a post-copy that the destination cannot load: the VM is stopped at the source, the
 * operator is told, and its disk is whole.
 */
export const stopsTheVm = ({ moment: { mode, engine }, fault }: Case): boolean =>
  mode === 'postcopy' && engine !== 'condensed' && fault === 'destination refuses the state';

/** What is not said is `direct` and `precopy`. */
export const nameOf = ({ moment: { role, state, phase, mode, engine }, fault }: Case): string => {
  const how = [engine === 'condensed' ? ' condensed' : '', mode === 'precopy' ? '' : ` ${mode}`].join('');
  return `${role} ${state}${phase ? ` (${phase})` : ''}${how}: ${fault}`;
};

/** A few that end soon and cover both daemons, a QEMU, the link and both engines. */
export const quickCases: Case[] = [
  'source copying (memory): kill source daemon',
  'source switching: kill destination daemon',
  'destination waiting: kill destination QEMU',
  'destination owning condensed postcopy: cut 1 s',
].map((name) => {
  const found = cases.find((one) => nameOf(one) === name);
  if (!found) throw new Error(`There is no case ${name}`);
  return found;
});
