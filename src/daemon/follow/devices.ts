/**
 * The devices that are registered here or were handed over with their VM. A device goes where its VM goes: its record
 * and the hash of its token are at the next cloudlet before the VM is, and what stays behind says where the VM went.
 */
import type { Static } from 'typebox';
import type * as schemas from '../../contract/schemas.ts';
import { AppError } from '../../model/errors.ts';
import type { Peer } from '../../model/fleet.ts';
import type { DeviceRecord } from '../../model/follow.ts';
import { newId, type Uuid } from '../../model/ids.ts';
import type { Credentials, Principal } from '../credentials.ts';
import type { EventLog } from '../events.ts';
import type { Fleet } from '../fleet.ts';
import type { Page, PageRequest, Store } from '../store/index.ts';
import type { VmRegistry } from '../vms/registry.ts';

export type HandOver = Static<typeof schemas.HandOver>;
export type DeviceReport = Static<typeof schemas.DeviceReport>;

const maxDevices = 1000;

export interface DevicesOptions {
  store: Store;
  events: EventLog;
  credentials: Credentials;
  registry: VmRegistry;
  fleet: Fleet;
}

export class Devices {
  readonly #options: DevicesOptions;
  readonly #byId: Map<Uuid, DeviceRecord>;

  constructor(options: DevicesOptions) {
    this.#options = options;
    this.#byId = new Map(options.store.devices.all().map((device) => [device.id, device]));
  }

  /** Oldest first. */
  all(): DeviceRecord[] {
    return [...this.#byId.values()];
  }

  list(request: PageRequest): Page<DeviceRecord> {
    const page = this.#options.store.devices.list(request);
    return { ...page, items: page.items.map((device) => this.#byId.get(device.id) ?? device) };
  }

  /** By id or by name. */
  find(reference: string): DeviceRecord {
    const found = this.#byId.get(reference) ?? this.all().find(({ name }) => name === reference);
    if (found) return found;
    throw new AppError('not_found', `There is no device '${reference}'`, { kind: 'device', name: reference });
  }

  /** The device of a token. Errors: `not_found`. */
  ofCaller(caller: Principal): DeviceRecord {
    const found =
      caller.kind === 'credential' &&
      this.all().find(({ credentialId }) => credentialId === caller.credentialId);
    if (found) return found;
    throw new AppError('not_found', `The token '${caller.name}' is that of no device`, {
      kind: 'device',
      name: caller.name,
    });
  }

  ofVm(vmId: Uuid): DeviceRecord | undefined {
    return this.all().find((device) => device.vmId === vmId);
  }

  /** Errors: `name_taken`, `not_found` for the VM, `in_use` if another device has it, `too_many`. */
  create(wanted: Static<typeof schemas.CreateDevice>): { device: DeviceRecord; secret: string } {
    const { store, credentials, events } = this.#options;
    const { name, vm, macs = [], addresses = [], expiresInS } = wanted;
    if (this.#byId.size >= maxDevices)
      throw new AppError('too_many', `${maxDevices} devices are registered`, { limit: maxDevices });
    const vmId = vm === undefined ? undefined : this.#freeVm(vm);
    return store.transact(() => {
      const id = newId();
      if (this.all().some((each) => each.name === name))
        throw new AppError('name_taken', `There is a device '${name}' already`, { kind: 'device', name });
      const { token, secret } = credentials.create({
        name: `device ${name} ${id.slice(0, 8)}`,
        scopes: ['device'],
        expiresInS,
      });
      const device: DeviceRecord = {
        id,
        name,
        createdAt: new Date().toISOString(),
        credentialId: token.id,
        macs,
        addresses,
        ...(vmId === undefined ? {} : { vmId }),
      };
      this.put(device);
      events.append({ kind: 'device.created', data: { deviceId: id, name }, ...(vmId && { vmId }) });
      return { device, secret: secret! };
    });
  }

  /** Errors: `not_found`, `in_use`. */
  pair(reference: string, vm: string | undefined): DeviceRecord {
    const { vmId: _, vmAt: __, ...device } = this.find(reference);
    const vmId = vm === undefined ? undefined : this.#freeVm(vm, device.id);
    return this.put({ ...device, ...(vmId === undefined ? {} : { vmId }) });
  }

  #freeVm(vm: string, forDevice?: Uuid): Uuid {
    const { id, name } = this.#options.registry.find(vm).record;
    const other = this.ofVm(id);
    if (!other || other.id === forDevice) return id;
    throw new AppError('in_use', `VM '${name}' follows the device '${other.name}' already`, {
      usedBy: [other.name],
    });
  }

  remove(reference: string): DeviceRecord {
    const { store, credentials, events } = this.#options;
    const device = this.find(reference);
    store.transact(() => {
      store.devices.delete(device.id);
      credentials.revoke(device.credentialId);
      events.append({ kind: 'device.deleted', data: { deviceId: device.id, name: device.name } });
      store.afterCommit(() => this.#byId.delete(device.id));
    });
    return device;
  }

  put(device: DeviceRecord): DeviceRecord {
    const { store } = this.#options;
    store.devices.put(device);
    store.afterCommit(() => this.#byId.set(device.id, device));
    return device;
  }

  /** What the device told of itself. */
  report(device: DeviceRecord, { addresses, macs }: DeviceReport): DeviceRecord {
    const changed = {
      ...device,
      ...(addresses ? { addresses } : {}),
      ...(macs ? { macs } : {}),
      reportedAt: new Date().toISOString(),
    };
    const isSame = String(addresses ?? device.addresses) === String(device.addresses) && !macs;
    if (!isSame) return this.put(changed);
    // That it is alive is no news that has to outlive the daemon.
    this.#byId.set(device.id, changed);
    return changed;
  }

  /** Gives the device of a VM over to the cloudlet where the VM goes. */
  async handOver(vmId: Uuid, peer: Peer): Promise<void> {
    const { credentials, fleet } = this.#options;
    const device = this.ofVm(vmId);
    const credential = device && credentials.handOut(device.credentialId);
    if (!device || !credential) return;
    const { name, macs, addresses, createdAt } = device;
    const body: HandOver = { name, vmId, macs, addresses, createdAt, credential };
    await fleet.client.fetch(peer, `/v1/devices/${device.id}/handover`, { method: 'PUT', json: body });
  }

  /** Takes a device that a peer gives over; `freshVmId` is a VM that was started here for it. Errors: `too_many`, `forbidden`. */
  takeOver(id: Uuid, handOver: HandOver, from: { cloudletId: Uuid }, freshVmId?: Uuid): void {
    const { store, credentials, fleet, registry } = this.#options;
    const known = this.#byId.get(id);
    if (!known && this.#byId.size >= maxDevices)
      throw new AppError('too_many', `${maxDevices} devices are registered`, { limit: maxDevices });
    // What is here is not theirs to change.
    const isHere = (vmId: Uuid | undefined): boolean =>
      vmId !== undefined &&
      vmId !== freshVmId &&
      registry.all().some(({ record }) => record.id === vmId && record.state !== 'arriving');
    if (isHere(known?.vmId) || isHere(handOver.vmId)) {
      const message = `The VM of device '${handOver.name}' is here already`;
      throw new AppError('forbidden', message, { wanted: ['the cloudlet that has the VM'] });
    }
    const { name, vmId, macs, addresses, createdAt, credential } = handOver;
    const peer = fleet.directory.get(from.cloudletId);
    store.transact(() => {
      const isTaken = this.all().some((each) => each.name === name && each.id !== id);
      this.put({
        id,
        // Two cloudlets may each have had a device of that name.
        name: isTaken ? `${name.slice(0, 54)}-${id.slice(0, 8)}` : name,
        createdAt,
        credentialId: credentials.adoptDevice({ name, ...credential }),
        macs,
        addresses,
        vmId,
        ...(peer ? { vmAt: { cloudletId: peer.id, name: peer.name, url: peer.url } } : {}),
      });
    });
  }

  /** Where the VM of a device is: here, or the cloudlet to which it went. */
  vmOf(device: DeviceRecord): { here?: { id: Uuid; name: string }; at?: DeviceRecord['vmAt'] } {
    const { registry, store, fleet } = this.#options;
    const { vmId, vmAt } = device;
    if (vmId === undefined) return {};
    const managed = registry.all().find(({ record }) => record.id === vmId && record.state !== 'arriving');
    if (managed) return { here: { id: vmId, name: managed.record.name } };
    const last = store.migrations.lastOf(vmId);
    const peer = last?.role === 'source' && last.finishedAt ? fleet.directory.get(last.peer.id) : undefined;
    const at = peer ? { cloudletId: peer.id, name: peer.name, url: peer.url } : vmAt;
    return at ? { at } : {};
  }
}
