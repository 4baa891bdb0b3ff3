/** What an earlier daemon has left of its migrations goes on: at once, or when the QEMU of the VM answers. */
import { setTimeout as sleep } from 'node:timers/promises';
import { machinePaths } from '../../vm/paths.ts';
import { SpareMonitor } from '../../vm/spare-monitor.ts';
import type { Managed } from '../vms/registry.ts';
import { type HalfParts, narrate } from './half.ts';
import type { Halves } from './halves.ts';
import type { MigrationRecord, SourceRecord } from './record.ts';

export type RecoveryOptions = Pick<
  HalfParts,
  'registry' | 'vms' | 'paths' | 'log' | 'events' | 'journal' | 'peers'
> & {
  halves: Halves;
  /** Takes a migration up again as the source of a VM that is here. */
  resume: (managed: Managed, record: SourceRecord) => void;
};

export class Recovery {
  readonly #options: RecoveryOptions;

  constructor(options: RecoveryOptions) {
    this.#options = options;
  }

  /** The VMs whose QEMU runs have been taken hold of before. */
  async run(): Promise<void> {
    const { registry, vms, log } = this.#options;
    const unfinished = this.#options.journal.unfinished();
    for (const record of unfinished) {
      const managed = registry.all().find((each) => each.record.id === record.vm.id);
      if (managed?.silent) this.#takeUpLater(record, managed, managed.silent);
      else this.#takeUp(record);
    }
    // A daemon may die between a VM's record and that of its migration.
    for (const managed of registry.all()) {
      const { id, state, epoch = 1 } = managed.record;
      if (state !== 'migrating' || unfinished.some(({ vm }) => vm.id === id)) continue;
      log.warn({ vmId: id, state }, 'a VM is in no migration any more');
      await vms.settle(managed, { epoch });
    }
  }

  /** What a silent QEMU does nobody knows, so nothing is said or decided about its VM until it answers or has ended. */
  #takeUpLater(record: MigrationRecord, managed: Managed, silent: Promise<void>): void {
    const { paths, log } = this.#options;
    const message =
      'The QEMU of the VM does not answer; the migration goes on when it does, or when its process ends';
    narrate(this.#options, record).attention(message);
    const machinePathsOf = machinePaths(paths.vm(record.vm.id));
    // What it waits for may be a page of a stream that the daemon before took with it.
    const spare = record.role === 'destination' ? SpareMonitor.open(machinePathsOf) : undefined;
    const waiting =
      spare && record.role === 'destination'
        ? this.#options.halves.beDestination(record, managed, {
            paths: machinePathsOf,
            recover: (socketPath) => spare.recover(socketPath),
          })
        : undefined;
    silent
      .finally(() => spare?.[Symbol.dispose]())
      .then(
        () => {
          this.#options.journal.noteAttention(record.id, undefined);
          if (!waiting) return this.#takeUp(record);
          managed.operationId = record.id;
          return waiting.answers(managed.machine ?? null);
        },
        // The daemon closes.
        () => {},
      )
      .catch((error) => log.error({ err: error, migrationId: record.id }, 'migration stands still'));
  }

  #takeUp(record: MigrationRecord): void {
    const { registry, log } = this.#options;
    const { id, vm } = record;
    const fields = { migrationId: id, vmId: vm.id };
    log.warn({ ...fields, role: record.role, state: record.state.name }, 'a migration goes on');
    if (mayBeInDoubt(record)) this.#options.journal.noteAttention(id, undefined);
    const managed = registry.all().find((each) => each.record.id === vm.id);
    const onFailure = (error: unknown) => log.error({ ...fields, err: error }, 'migration stands still');
    if (record.role === 'destination')
      this.#options.halves.beDestination(record, managed).restart().catch(onFailure);
    else if (!managed) this.#options.halves.beSource(undefined, record).restart().catch(onFailure);
    else this.#options.resume(managed, record);
  }

  /** Until it is heard: QEMU at the other side cannot know that nobody will resume its sessions. */
  async tellLostSessions({ id, peer }: SourceRecord): Promise<void> {
    while (this.#options.halves.outgoing.has(id)) {
      try {
        return await this.#options.peers.send(peer.id, id, { name: 'sessions-lost' });
      } catch {
        await sleep(1000, undefined, { ref: false });
      }
    }
  }
}

/** What was told of it by an earlier daemon is told again if it still is so. */
const mayBeInDoubt = ({ state }: MigrationRecord): boolean =>
  ['switching', 'waiting', 'owning', 'arrived'].includes(state.name);
