/** What a daemon that starts again does about the networks of VMs, on a host that notes its commands. */
import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, test } from 'node:test';
import pino from 'pino';
import { newId } from '../../model/ids.ts';
import type { VmRecord } from '../../model/vm.ts';
import type { Handoff } from '../../network/index.ts';
import type { Config } from '../config.ts';
import type { Principal } from '../credentials.ts';
import { EventLog } from '../events.ts';
import { Store } from '../store/index.ts';
import type { HandoffRecord } from './record.ts';
import { Networks, type NetworksOptions } from './service.ts';

const owner = newId();
const peer = { id: newId(), name: 'c2' };
const vmId = newId();
const macs = ['02:00:00:00:00:01', '02:00:00:00:00:02'];
const addresses = { subnet: '10.4.0.0/24', gateway: '10.4.0.1', from: '10.4.0.10', to: '10.4.0.20' };
const place = { address: '10.4.0.10/24', subnet: '10.4.0.0/24', gateway: '10.4.0.1' };
const handoff: Handoff = {
  owner,
  vmId,
  continuity: 'stretch',
  bridge: 'lan0',
  serving: 0,
  last: { ...place, mac: macs[0]! },
  tunnel: { vni: 0xab, local: '192.0.2.1', remote: '192.0.2.2' },
};

let directory: string;
let store: Store;
let networks: Networks;
let commands: string[];
let links: { ifname: string; mtu: number; linkinfo?: { info_kind: string }; ifalias?: string }[];
let vms: VmRecord[];

beforeEach(async () => {
  directory = await mkdtemp(path.join(tmpdir(), 'viper-networks-'));
  store = new Store(directory);
  commands = [];
  links = [{ ifname: 'lan0', mtu: 1500 }];
  vms = [];
  const lan = { name: 'lan', kind: 'bridge', bridge: 'lan0', addresses } as const;
  networks = new Networks({
    identity: () => ({ id: owner, name: 'c1', url: 'https://192.0.2.1:7443' }),
    config: { networks: [lan] } as unknown as Config,
    store,
    events: new EventLog(store),
    registry: { all: () => vms.map((record) => ({ record })) },
    fleet: () => ({ peers: () => [] }),
    log: pino({ level: 'silent' }),
    run: async (program: string, args: readonly string[]) => {
      if (args.includes('-j')) return { stdout: JSON.stringify(links) };
      commands.push([program, ...args].join(' '));
      return { stdout: '' };
    },
  } as unknown as NetworksOptions);
});
afterEach(async () => {
  networks.close();
  store.close();
  await rm(directory, { recursive: true });
});

const put = (role: HandoffRecord['role'], more: Partial<HandoffRecord> = {}): string => {
  const id = newId();
  store.handoffs.put({ id, vmId, role, peer, handoff, ...more });
  return id;
};
const roles = () => store.handoffs.all().map(({ role }) => role);
const tunnelOf = (id: string) => ({
  ifname: 'vipx0000ab',
  mtu: 1500,
  linkinfo: { info_kind: 'vxlan' },
  ifalias: `viper:${owner}:${id}`,
});

test('a LAN that was stretched is stretched again after the host was away, and left alone if it still is', async () => {
  put('home');
  await networks.recover(() => false);
  assert.ok(commands.some((line) => line.startsWith('ip link add name vipx0000ab type vxlan')));
  commands.length = 0;
  links.push(tunnelOf(vmId));
  await networks.recover(() => false);
  assert.deepEqual(commands, []);
  assert.deepEqual(roles(), ['home']);
});

test('devices of ours that no record knows are removed, and no others', async () => {
  links.push(tunnelOf(newId()));
  links.push({ ...tunnelOf(newId()), ifname: 'vxlan0' });
  links.push({ ...tunnelOf(vmId), ifname: 'vipx0000ac', ifalias: `viper:${newId()}:${vmId}` });
  await networks.recover(() => false);
  assert.deepEqual(commands, ['ip link delete dev vipx0000ab']);
});

test('what belongs to no migration any more is ended: undone where the VM is, tidied up where it is not', async () => {
  const open = put('source');
  vms = [{ id: vmId, spec: { nets: [], seed: { addresses: [] } } } as unknown as VmRecord];
  await networks.recover((id) => id === open);
  assert.deepEqual(roles(), ['source']);
  await networks.recover(() => false);
  assert.deepEqual(roles(), []);
  vms = [];
  put('source');
  await networks.recover(() => false);
  // It has moved, and the LAN is stretched to it.
  assert.deepEqual(roles(), ['home']);
  put('destination');
  put('destination', { expiresAt: '2999-01-01T00:00:00.000Z' });
  await networks.recover(() => false);
  assert.deepEqual(roles().sort(), ['destination', 'home']);
});

test('only cloudlets of a migration have a say in its network', async () => {
  const id = put('destination', { expiresAt: '2999-01-01T00:00:00.000Z' });
  const cloudlet = (cloudletId: string) =>
    ({ kind: 'cloudlet', cloudletId, name: 'x' }) as unknown as Principal;
  await assert.rejects(networks.giveBack(id, cloudlet(newId())), { code: 'forbidden' });
  await assert.rejects(networks.giveBack(id, { kind: 'token' } as unknown as Principal), {
    code: 'forbidden',
  });
  await networks.giveBack(id, cloudlet(peer.id));
  assert.deepEqual(roles(), []);
  // One whose VM has begun to come is over when its migration is.
  const begun = put('destination');
  await networks.giveBack(begun, cloudlet(peer.id));
  assert.deepEqual(roles(), ['destination']);
});

test('a VM gets an address on its first interface in the network, and the second one waits', () => {
  const nets = ['user', 'lan', 'lan'].map((network, index) => ({ network, mac: `02:00:00:00:00:0${index}` }));
  const spec = { nets, seed: { hostname: 'web', sshKeys: [], addresses: [] } } as unknown as VmRecord['spec'];
  const { attachment, spec: attached } = networks.attach(newId(), spec);
  assert.deepEqual(attachment, { serving: 1, waiting: 2, place });
  assert.deepEqual(attached.seed.addresses, [
    { mac: nets[1]!.mac, address: '10.4.0.10/24', gateway: '10.4.0.1' },
  ]);
  assert.deepEqual(attached.seed.waiting, [nets[2]!.mac]);
  // What the caller has set stands.
  const own = {
    ...spec,
    seed: { ...spec.seed, addresses: [{ mac: nets[1]!.mac, address: '10.4.0.99/24' }] },
  };
  assert.deepEqual(networks.attach(newId(), own), { spec: own });
});
