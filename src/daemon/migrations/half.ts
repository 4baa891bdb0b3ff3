/** What both halves of a migration need of the daemon, and what both tell in the same way. */
import type { FastifyBaseLogger } from 'fastify';
import type { EventLog } from '../events.ts';
import type { ImageService } from '../images.ts';
import type { Networks } from '../networks/service.ts';
import type { Paths } from '../paths.ts';
import type { ReferenceSets } from '../references/reference-sets.ts';
import type { VmRegistry } from '../vms/registry.ts';
import type { Runner } from '../vms/runner.ts';
import type { VmService } from '../vms/service.ts';
import type { MigrationJournal } from './journal.ts';
import type { PeerSide } from './peer-side.ts';
import type { MigrationRecord } from './record.ts';

export interface HalfParts {
  journal: MigrationJournal;
  peers: PeerSide;
  registry: VmRegistry;
  vms: VmService;
  networks: Networks;
  runner: Runner;
  images: ImageService;
  paths: Paths;
  references: ReferenceSets;
  events: EventLog;
  log: FastifyBaseLogger;
}

/** Tells of one migration: each state once in log and events, and whatever only a human can settle. */
export function narrate(
  { events, log, journal }: Pick<HalfParts, 'events' | 'log' | 'journal'>,
  record: MigrationRecord,
) {
  const { id, role, vm, peer } = record;
  const fields = { migrationId: id, vmId: vm.id, peerId: peer.id };
  // One that has ended and answers a late question has nothing new to tell.
  let told: string | undefined = record.finishedAt === undefined ? undefined : record.state.name;
  let isPassing = false;
  return {
    state(state: string): void {
      // Events that change nothing come with the state as it was.
      if (state === told) return;
      told = state;
      if (isPassing) this.goesOn();
      log.info({ ...fields, state }, 'migration');
      const data = { migrationId: id, role, name: vm.name, peer: peer.name };
      events.append({ kind: `migration.${state}`, vmId: vm.id, data });
    },
    /** The source holds nothing of the VM any more: its host may be switched off. */
    exited(exitMs: number): void {
      const data = { migrationId: id, name: vm.name, peer: peer.name, exitMs: Math.round(exitMs) };
      events.append({ kind: 'migration.exited', vmId: vm.id, data });
    },
    step(step: string, facts: Record<string, number> = {}): void {
      log.debug({ ...fields, step, ...facts }, 'migration');
    },
    /** `passing`: it may settle itself yet, and then is no news any more. */
    attention(message: string, { passing = false } = {}): void {
      isPassing = passing;
      log.error(fields, message);
      const data = { migrationId: id, role, name: vm.name, message };
      events.append({ kind: 'migration.attention', vmId: vm.id, data });
      journal.noteAttention(id, message);
    },
    goesOn(): void {
      if (isPassing) journal.noteAttention(id, undefined);
      isPassing = false;
    },
    /** Nothing goes on any more, and no rule says how it could. */
    failure(error: Error): void {
      log.error({ ...fields, err: error }, 'migration stands still');
      const message = `The migration stands still: ${error.message}. A daemon that starts again goes on from its journal`;
      try {
        this.attention(message);
      } catch {
        // What keeps the store from being written is in the log.
      }
    },
  };
}
