/** How VMs are reached: where they are at home, and what two cloudlets say to each other before one moves. */
import { Type } from 'typebox';
import { continuities } from '../../model/vm.ts';
import { Exact, Mac, Name, OneOf, Uuid } from './basics.ts';

const Ipv4 = Type.String({ format: 'ipv4' });
const Subnet = Type.String({ pattern: '^[0-9.]{7,15}/[0-9]{1,2}$' });
const Index = Type.Integer({ minimum: 0, maximum: 7 });

export const Continuity = OneOf(
  continuities,
  'How connections outlive a move: `mptcp` (the address changes, MPTCP carries them), `stretch` (the address stays, its ' +
    'LAN is stretched to the VM), `host-route` (the address stays, a route to it follows the VM), `none`.',
);
export const Place = Exact({
  address: Type.String({ pattern: '^[0-9.]{7,15}/[0-9]{1,2}$', description: 'Address/prefix length.' }),
  subnet: Subnet,
  gateway: Ipv4,
});
export const Attachment = Exact({
  serving: Type.Integer({ ...Index, description: 'Index in `nets` of the interface that serves.' }),
  waiting: Type.Optional(
    Type.Integer({ ...Index, description: 'Of the one that waits for the next network.' }),
  ),
  place: Place,
  home: Type.Optional(Exact({ cloudletId: Uuid, name: Name })),
});
const Vni = Type.Integer({ minimum: 1, maximum: 2 ** 24 - 1 });
/** Asked of the destination, and where the address stays of the home of the VM, before the migration. */
export const PrepareNetwork = Exact({
  role: OneOf(['destination', 'home']),
  vmId: Uuid,
  continuity: Continuity,
  network: Type.String({ maxLength: 63 }),
  attachment: Attachment,
  /** Of its interfaces, in the order of `nets`. */
  macs: Type.Array(Mac, { minItems: 1, maxItems: 8 }),
  /** The other end of the tunnel, or of a host route, if there is to be one. */
  tunnel: Type.Optional(Exact({ vni: Vni, address: Ipv4, cloudletId: Uuid, name: Name })),
  gatewayMac: Type.Optional(Mac),
  /** The address of the VM's device in the network of the destination, if known. */
  device: Type.Optional(Ipv4),
});
export const PreparedNetwork = Exact({
  place: Type.Optional(Place),
  tunnelAddress: Type.Optional(Ipv4),
});
