/** The state of a cloudlet: one SQLite file, one repository for each kind of record. */

import { CredentialRepository } from './credentials.ts';
import { Database } from './database.ts';
import { DecisionRepository } from './decisions.ts';
import { DeviceRepository } from './devices.ts';
import { EscrowRepository } from './escrows.ts';
import { EventRepository } from './events.ts';
import { HandoffRepository } from './handoffs.ts';
import { ImageRepository } from './images.ts';
import { JoinTokenRepository } from './join-tokens.ts';
import { LeaseRepository } from './leases.ts';
import { MetaRepository } from './meta.ts';
import { MigrationRepository } from './migrations.ts';
import { NeighbourRepository } from './neighbours.ts';
import { OperationRepository } from './operations.ts';
import { PeerRepository } from './peers.ts';
import { ProfileRepository } from './profile.ts';
import { SnapshotRepository } from './snapshots.ts';
import { VmRepository } from './vms.ts';

export type { CredentialRecord, CredentialScope } from './credentials.ts';
export { stateFileName } from './database.ts';
export type { NewEvent } from './events.ts';
export type { Page, PageRequest } from './page.ts';
export type { VmSummary } from './vms.ts';

export interface StoreOptions {
  /** Events kept, by default 10,000. */
  keepEvents?: number;
}

export class Store implements Disposable {
  readonly vms: VmRepository;
  readonly images: ImageRepository;
  readonly snapshots: SnapshotRepository;
  readonly operations: OperationRepository;
  readonly events: EventRepository;
  readonly credentials: CredentialRepository;
  readonly joinTokens: JoinTokenRepository;
  readonly peers: PeerRepository;
  readonly migrations: MigrationRepository;
  readonly escrows: EscrowRepository;
  readonly leases: LeaseRepository;
  readonly handoffs: HandoffRepository;
  readonly neighbours: NeighbourRepository;
  readonly devices: DeviceRepository;
  readonly decisions: DecisionRepository;
  readonly profile: ProfileRepository;
  readonly meta: MetaRepository;
  readonly #database: Database;

  /** Opens the state file of a directory. Errors: `state_locked`, `state_too_new`. */
  constructor(directory: string, { keepEvents = 10_000 }: StoreOptions = {}) {
    const database = Database.open(directory);
    this.#database = database;
    this.vms = new VmRepository(database);
    this.images = new ImageRepository(database);
    this.snapshots = new SnapshotRepository(database);
    this.operations = new OperationRepository(database);
    this.migrations = new MigrationRepository(database);
    this.escrows = new EscrowRepository(database);
    this.leases = new LeaseRepository(database);
    this.handoffs = new HandoffRepository(database);
    this.meta = new MetaRepository(database);
    this.events = new EventRepository(database, this.meta, keepEvents);
    this.credentials = new CredentialRepository(database);
    this.joinTokens = new JoinTokenRepository(database);
    this.peers = new PeerRepository(database);
    this.neighbours = new NeighbourRepository(database);
    this.devices = new DeviceRepository(database);
    this.decisions = new DecisionRepository(database);
    this.profile = new ProfileRepository(database);
  }

  /** All of the synchronous work is kept, or nothing if it throws; see `Database.transact`. */
  transact<T>(work: () => T): T {
    return this.#database.transact(work);
  }

  /** Runs once what was written is committed; see `Database.afterCommit`. */
  afterCommit(run: () => void): void {
    this.#database.afterCommit(run);
  }

  /** Writes that a power cut may lose; see `Database.relaxed`. */
  relaxed<T>(work: () => T): T {
    return this.#database.relaxed(work);
  }

  close(): void {
    this.#database.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
