/**
 * What this cloudlet keeps for VMs of others, in case their destination is lost before they are whole: it is their
 * *custodian*. One row says whether it may go on with the VM; the destination asks it, and an operator claims it.
 *
 *   held      --release--> released      the destination has all of the VM, or does not want it any more
 *   held      --claim-->   claimed       all of its memory is here, and stands still
 *   claimed   --claim-->   run           written before its vCPUs run here
 *
 * Invariants: no way leads from `released`, or back from `claimed`; the row is on the disk before anybody hears of it.
 */
import { readdir, rm } from 'node:fs/promises';
import path from 'node:path';
import type { FastifyBaseLogger } from 'fastify';
import type { Static } from 'typebox';
import * as schemas from '../../contract/schemas.ts';
import type { AcceptedSession, SessionRequest } from '../../link/index.ts';
import { mostEscrowBytes, parseEscrow } from '../../migration/relayed/escrow.ts';
import { Manifest } from '../../migration/relayed/manifest.ts';
import { AppError, asAppError } from '../../model/errors.ts';
import { isUuid, type Uuid } from '../../model/ids.ts';
import type { Operation } from '../../model/operation.ts';
import type { Principal } from '../credentials.ts';
import type { EventLog } from '../events.ts';
import type { Fleet } from '../fleet.ts';
import { compileFor } from '../http/validation.ts';
import { PrivateFile } from '../migrations/private-file.ts';
import type { Operations } from '../operations.ts';
import type { Paths } from '../paths.ts';
import type { Store } from '../store/index.ts';
import { type ClaimParts, claimFromRelays } from './claim.ts';
import { type EscrowRecord, isClaimed } from './record.ts';

type Owner = Static<typeof schemas.EscrowOwner>;

export interface EscrowServiceOptions extends ClaimParts {
  store: Store;
  events: EventLog;
  operations: Operations;
  fleet: Fleet;
  paths: Paths;
  log: FastifyBaseLogger;
}

/**
 * One that was released is remembered so long: a deposit that is late must not bring it back. Of one that is held relays
 * have forgotten the pages long before.
 */
const rememberMs = 7 * 24 * 3_600_000;
/** The destination asks every second while it lacks something. */
const freshMs = 5000;
const reachTimeoutMs = 3000;

const factsAreSound = compileFor('body', schemas.EscrowFacts);

export class EscrowService {
  readonly #options: EscrowServiceOptions;
  /** By migration: when its destination asked last, and whether its QEMU is gone. */
  readonly #asked = new Map<Uuid, { at: number; isGone: boolean }>();
  readonly #claiming = new Set<Uuid>();

  constructor(options: EscrowServiceOptions) {
    this.#options = options;
    options.store.escrows.prune(new Date(Date.now() - rememberMs).toISOString());
  }

  list(): Static<typeof schemas.EscrowList> {
    return { items: this.#options.store.escrows.all().flatMap(viewOf) };
  }

  /** A destination brings what it knows. It ends its side with the last byte, and this one when it is held. */
  accept({ hello, cloudletId }: SessionRequest): AcceptedSession {
    const { migrationId } = hello;
    if (typeof migrationId !== 'string' || !isUuid(migrationId))
      throw new AppError('invalid_request', 'This is no session of an escrow', {
        problems: [{ field: 'hello', wanted: 'migrationId' }],
      });
    return {
      onSession: (session) => {
        session.on('error', () => {});
        const take = async (): Promise<void> => {
          const pieces: Buffer[] = [];
          let length = 0;
          for await (const bytes of session.iterator({ destroyOnReturn: false }) as AsyncIterable<Buffer>) {
            length += bytes.length;
            if (length > mostEscrowBytes)
              throw new AppError('payload_too_large', `An escrow of more than ${mostEscrowBytes} bytes`, {});
            pieces.push(Buffer.from(bytes));
          }
          await this.#hold(migrationId, cloudletId, Buffer.concat(pieces));
          session.end();
        };
        take().catch((error) => {
          this.#options.log.warn({ err: error, migrationId }, 'an escrow was not taken');
          session.destroy(asAppError(error));
        });
      },
    };
  }

  async #hold(migrationId: Uuid, cloudletId: Uuid, bytes: Buffer): Promise<void> {
    const { facts, manifest } = parseEscrow(bytes);
    const told: unknown = JSON.parse(facts.toString('utf8'));
    const { division } = Manifest.fromBytes(manifest);
    if (!factsAreSound(told) || division.migrationId !== migrationId)
      throw new AppError('invalid_request', 'The facts of an escrow are not sound', {
        problems: [{ field: 'facts', wanted: 'vm, epoch, diskMark' }],
      });
    // Whoever has both pages and key can read the VM without ever claiming it.
    if (division.relays.includes(this.#options.cloudletId))
      throw new AppError('forbidden', 'This cloudlet is a relay of the migration, and may not have its key', {
        wanted: 'a custodian that is no relay',
      });
    const deposit = { ...(told as Static<typeof schemas.EscrowFacts>), bytes: bytes.length };
    this.#requireHeld(migrationId, cloudletId);
    await this.#file(migrationId).write(bytes);
    const { store, events } = this.#options;
    store.transact(() => {
      // Meanwhile its destination may have become whole.
      this.#requireHeld(migrationId, cloudletId);
      const depositor = { id: cloudletId, name: this.#nameOf(cloudletId) };
      const createdAt = new Date().toISOString();
      store.escrows.put({ migrationId, depositor, createdAt, state: 'held', deposit } as EscrowRecord);
      const data = { migrationId, name: deposit.vm.name, cloudlet: depositor.name };
      events.append({ kind: 'escrow.held', data });
    });
  }

  #requireHeld(migrationId: Uuid, cloudletId: Uuid): void {
    const known = this.#known(migrationId, cloudletId);
    if (known && known.state !== 'held')
      throw new AppError('wrong_state', `The escrow of migration ${migrationId} is ${known.state}`, {
        state: known.state,
        allowed: [],
      });
  }

  /** The record, for its destination and nobody else. */
  #known(migrationId: Uuid, cloudletId: Uuid): EscrowRecord | undefined {
    const known = this.#options.store.escrows.get(migrationId);
    if (known && known.depositor.id !== cloudletId)
      throw new AppError('forbidden', `Cloudlet ${cloudletId} has no part in migration ${migrationId}`, {
        wanted: 'its destination',
      });
    return known;
  }

  /** Asked by the destination. */
  owner(migrationId: Uuid, isGone: boolean, caller: Principal): Owner {
    const known = this.#known(migrationId, idOf(caller));
    if (known) this.#asked.set(migrationId, { at: performance.now(), isGone });
    return known && isClaimed(known) ? { claimed: true, epoch: known.epoch! } : { claimed: false };
  }

  /** Asked by the destination: from now on it alone owns the VM, unless it was claimed before. */
  async release(migrationId: Uuid, caller: Principal): Promise<Owner> {
    const { store, events } = this.#options;
    const cloudletId = idOf(caller);
    const known = this.#known(migrationId, cloudletId);
    if (known && isClaimed(known)) return { claimed: true, epoch: known.epoch! };
    if (known?.state !== 'released')
      store.transact(() => {
        const depositor = { id: cloudletId, name: this.#nameOf(cloudletId) };
        const createdAt = new Date().toISOString();
        store.escrows.put({ migrationId, depositor, createdAt, state: 'released' });
        const data = { migrationId, cloudlet: depositor.name };
        events.append({ kind: 'escrow.released', data });
      });
    this.#asked.delete(migrationId);
    await this.#file(migrationId).remove();
    return { claimed: false };
  }

  /**
   * An operator's word that the destination is gone for good: the VM goes on here, as it left its source. `vm`: its
   * name or id, so that a wrong migration is noticed.
   */
  async claim(
    migrationId: Uuid,
    { vm: wanted, reason }: Static<typeof schemas.ClaimEscrow>,
    caller: Principal,
  ): Promise<Operation> {
    const { store, operations } = this.#options;
    const record = store.escrows.get(migrationId);
    const vm = record?.deposit?.vm;
    if (!record || !vm)
      throw new AppError('not_found', `This cloudlet keeps no escrow of migration ${migrationId}`, {
        kind: 'escrow',
        name: migrationId,
      });
    if (wanted !== vm.id && wanted !== vm.name)
      throw new AppError(
        'not_found',
        `Migration ${migrationId} is that of VM '${vm.name}', not '${wanted}'`,
        {
          kind: 'vm',
          name: wanted,
        },
      );
    if (record.state === 'run' || this.#claiming.has(migrationId))
      throw new AppError('wrong_state', `VM '${vm.name}' has been claimed here already`, {
        action: 'claim',
        state: record.state,
        allowed: [],
      });
    this.#claiming.add(migrationId);
    try {
      await this.#requireLost(record);
      const bytes = await this.#file(migrationId).read();
      if (!bytes)
        throw new AppError(
          'not_found',
          `The escrow of migration ${migrationId} is not in its file any more`,
          {
            kind: 'escrow',
            name: migrationId,
          },
        );
      const subject = { vmId: vm.id, name: vm.name, migrationId };
      return operations.run('vm.claim', subject, async (work) => {
        try {
          const { manifest, whole } = parseEscrow(bytes);
          await claimFromRelays(this.#options, {
            record,
            manifest: Manifest.fromBytes(manifest),
            whole,
            work,
            // One row, and whoever writes it first has the VM.
            onState: (state) => this.#advance(migrationId, state, { reason, by: caller.name }),
          });
          await this.#file(migrationId).remove();
          return { migrationId, vmId: vm.id };
        } finally {
          this.#claiming.delete(migrationId);
        }
      });
    } catch (error) {
      this.#claiming.delete(migrationId);
      throw error;
    }
  }

  /** Throws `wrong_state` when the destination has released it meanwhile. */
  #advance(migrationId: Uuid, state: 'claimed' | 'run', audit: { reason: string; by: string }): number {
    const { store, events } = this.#options;
    const record = store.escrows.get(migrationId)!;
    const epoch = record.epoch ?? claimedEpoch(record);
    if (record.state !== 'held' && record.state !== 'claimed')
      throw new AppError(
        'wrong_state',
        `The destination of VM '${record.deposit?.vm.name}' owns it for good`,
        {
          action: 'claim',
          state: record.state,
          allowed: [],
        },
      );
    store.transact(() => {
      store.escrows.put({ ...record, state, epoch });
      if (state !== 'claimed') return;
      const { id: vmId, name } = record.deposit!.vm;
      const data = { name, ...audit, migrationId, from: record.depositor.name, epoch };
      events.append({ kind: 'vm.claimed', vmId, data });
    });
    return epoch;
  }

  /** Refuses while the destination is there: what it does is not an operator's word against its own. */
  async #requireLost({ migrationId, depositor, deposit }: EscrowRecord): Promise<void> {
    const asked = this.#asked.get(migrationId);
    const isFresh = asked && performance.now() - asked.at < freshMs;
    if (isFresh && asked.isGone) return;
    const { fleet } = this.#options;
    const peer = fleet.peers().find(({ id }) => id === depositor.id);
    const isThere =
      peer &&
      (await fleet.client.fetch(peer, '/healthz', { timeoutMs: reachTimeoutMs }).then(
        () => true,
        () => false,
      ));
    if (!isThere && !isFresh) return;
    const why = isThere
      ? `the daemon at ${depositor.name} answers`
      : `${depositor.name} asked for it a moment ago`;
    throw new AppError(
      'wrong_state',
      `Cannot claim VM '${deposit!.vm.name}' from ${depositor.name}, which has it: ${why}`,
      { action: 'claim', state: 'merging', allowed: [] },
    );
  }

  /** What an earlier daemon had begun to claim: it has run, and is as its QEMU says, or is as if that had never been. */
  async recover(): Promise<void> {
    const { store, registry, vms, runner, paths, log } = this.#options;
    const escrows = store.escrows.all();
    const open = escrows.filter(({ state }) => state === 'held' || state === 'claimed');
    for (const name of await readdir(paths.escrows))
      if (!open.some(({ migrationId }) => migrationId === name)) await rm(path.join(paths.escrows, name));
    const moving = store.migrations.unfinished().map(({ vm }) => vm.id);
    for (const managed of registry.all()) {
      const { id, state } = managed.record;
      // Of several of one VM the last is the one that was claimed.
      const escrow = escrows.findLast(({ deposit }) => deposit?.vm.id === id);
      if (!escrow || state !== 'arriving' || moving.includes(id)) continue;
      log.warn({ vmId: id, state: escrow.state }, 'a claim was interrupted');
      if (escrow.state === 'run') {
        await vms.settle(managed, { epoch: escrow.epoch! });
        continue;
      }
      await managed.machine?.kill();
      // Its daemon may have died before it knew the process.
      await runner.end(id);
      await vms.forget(managed);
    }
  }

  #file(migrationId: Uuid): PrivateFile {
    return new PrivateFile(this.#options.paths.escrows, migrationId);
  }

  #nameOf(cloudletId: Uuid): string {
    return this.#options.fleet.peers().find(({ id }) => id === cloudletId)?.name ?? cloudletId;
  }
}

/** Above what the destination could claim for itself. */
const claimedEpoch = ({ deposit }: EscrowRecord): number => deposit!.epoch + 3;

function idOf(caller: Principal): Uuid {
  if (caller.kind === 'cloudlet') return caller.cloudletId;
  throw new AppError('forbidden', 'Only cloudlets of the fleet have a part in an escrow', { wanted: 'peer' });
}

/** Those that were released are of interest to nobody. */
function viewOf({ migrationId, depositor, createdAt, state, deposit }: EscrowRecord) {
  if (!deposit || state === 'released') return [];
  const { id, name, spec } = deposit.vm;
  const { memoryBytes } = spec;
  const isOpen = state === 'held' || state === 'claimed';
  return [
    { migrationId, vm: { id, name }, from: depositor, memoryBytes, createdAt, state: isOpen ? state : 'run' },
  ] as Static<typeof schemas.Escrow>[];
}
