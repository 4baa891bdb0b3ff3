/** Which addresses of this cloudlet's networks are given out. Those of a handoff that never came expire. */
import type { Uuid } from '../../model/ids.ts';
import type { Database, Statement } from './database.ts';

export interface Lease {
  network: string;
  /** Without prefix length. */
  address: string;
  vmId: Uuid;
  /** Missing: as long as the VM is. */
  expiresAt?: string;
}

interface Row {
  network: string;
  address: string;
  vm_id: string;
  expires_at: string | null;
}

export class LeaseRepository {
  readonly #inNetwork: Statement<Row>;
  readonly #ofVm: Statement<Row>;
  readonly #put: Statement<never>;
  readonly #expire: Statement<never>;
  readonly #delete: Statement<never>;
  readonly #deleteOfVm: Statement<never>;

  constructor(database: Database) {
    this.#inNetwork = database.prepare('SELECT * FROM leases WHERE network = ?');
    this.#ofVm = database.prepare('SELECT * FROM leases WHERE vm_id = ? ORDER BY network, address');
    this.#put = database.prepare(
      `INSERT INTO leases (network, address, vm_id, expires_at) VALUES (?, ?, ?, ?)
       ON CONFLICT (network, address) DO UPDATE SET vm_id = excluded.vm_id, expires_at = excluded.expires_at`,
    );
    this.#expire = database.prepare('DELETE FROM leases WHERE expires_at <= ?');
    this.#delete = database.prepare('DELETE FROM leases WHERE network = ? AND address = ? AND vm_id = ?');
    this.#deleteOfVm = database.prepare('DELETE FROM leases WHERE vm_id = ?');
  }

  inNetwork(network: string): Lease[] {
    return this.#inNetwork.all(network).map(parse);
  }

  ofVm(vmId: Uuid): Lease[] {
    return this.#ofVm.all(vmId).map(parse);
  }

  /** Inserts or overwrites. */
  put({ network, address, vmId, expiresAt }: Lease): void {
    this.#put.run(network, address, vmId, expiresAt ?? null);
  }

  /** Removes those whose time is over. */
  expire(now: string): void {
    this.#expire.run(now);
  }

  /** Only if the VM holds it. */
  delete({ network, address, vmId }: Lease): void {
    this.#delete.run(network, address, vmId);
  }

  deleteOfVm(vmId: Uuid): void {
    this.#deleteOfVm.run(vmId);
  }
}

const parse = ({ network, address, vm_id, expires_at }: Row): Lease => ({
  network,
  address,
  vmId: vm_id,
  ...(expires_at === null ? {} : { expiresAt: expires_at }),
});
