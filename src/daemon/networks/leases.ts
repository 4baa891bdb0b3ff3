/** The addresses that this cloudlet gives to VMs: reserved before a VM comes, kept while it is here, then free again. */
import { AppError } from '../../model/errors.ts';
import type { Uuid } from '../../model/ids.ts';
import type { Place } from '../../model/vm.ts';
import { type AddressPlan, type CloudletNetwork, chooseAddress, findNetwork } from '../../network/index.ts';
import type { Store } from '../store/index.ts';

export interface Reservation {
  network: string;
  vmId: Uuid;
  /** Of the VM's device in this network, if known. */
  device?: string;
  /** The address is free again at this time unless it is kept; absent: it is the VM's. */
  expiresAt?: string;
}

export class Leases {
  readonly #store: Store;
  readonly #networks: readonly CloudletNetwork[];

  constructor({ store, networks }: { store: Store; networks: readonly CloudletNetwork[] }) {
    this.#store = store;
    this.#networks = networks;
  }

  /** Whether this cloudlet gives addresses in that network. */
  gives(network: string): boolean {
    return this.#networks.some((each) => each.name === network && each.kind === 'bridge' && each.addresses);
  }

  /** A VM that has an unexpired address there gets it again. Errors: `unsupported`, `no_free_address`. */
  reserve({ network, vmId, device, expiresAt }: Reservation): Place {
    const plan = this.#plan(network);
    return this.#store.transact(() => {
      const { leases } = this.#store;
      leases.expire(new Date().toISOString());
      const held = leases.inNetwork(network);
      const own = held.find((lease) => lease.vmId === vmId)?.address;
      const taken = new Set(held.filter((lease) => lease.vmId !== vmId).map(({ address }) => address));
      const address = own
        ? `${own}/${plan.subnet.split('/')[1]}`
        : chooseAddress(network, plan, { taken, device });
      leases.put({ network, address: hostOf(address), vmId, ...(expiresAt ? { expiresAt } : {}) });
      return { address, subnet: plan.subnet, gateway: plan.gateway };
    });
  }

  /** The address is the VM's for as long as it is here. */
  keep(network: string, vmId: Uuid, { address }: Place): void {
    this.#store.leases.put({ network, address: hostOf(address), vmId });
  }

  release(network: string, vmId: Uuid, { address }: Place): void {
    this.#store.leases.delete({ network, address: hostOf(address), vmId });
  }

  /** All that the VM holds. */
  releaseAll(vmId: Uuid): void {
    this.#store.leases.deleteOfVm(vmId);
  }

  #plan(network: string): AddressPlan {
    const found = findNetwork(this.#networks, network);
    if (found.kind === 'bridge' && found.addresses) return found.addresses;
    throw new AppError('unsupported', `This cloudlet gives no addresses in its network ${network}`, {
      missing: `addresses of network ${network}`,
    });
  }
}

const hostOf = (address: string): string => address.split('/')[0]!;
