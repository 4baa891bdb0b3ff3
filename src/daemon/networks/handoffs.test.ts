/** Both sides of handoffs between cloudlets that are real but for their hosts and guests, which note what they are told. */
import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, test } from 'node:test';
import pino from 'pino';
import { AppError } from '../../model/errors.ts';
import { newId } from '../../model/ids.ts';
import type { Continuity, VmRecord } from '../../model/vm.ts';
import type { CloudletNetwork } from '../../network/index.ts';
import { EventLog } from '../events.ts';
import { Store } from '../store/index.ts';
import type { Managed } from '../vms/registry.ts';
import { DestinationNetworks } from './destination.ts';
import { Leases } from './leases.ts';
import type { HandoffParts } from './parts.ts';
import { SourceNetworks } from './source.ts';

const log = pino({ level: 'silent' });
const { signal } = new AbortController();
const macs = ['02:00:00:00:00:01', '02:00:00:00:00:02'];

interface Guest {
  hasAgent: boolean;
  joins: boolean;
  steps: string[];
}

class Site {
  readonly id = newId();
  readonly name: string;
  readonly source: SourceNetworks;
  readonly destination: DestinationNetworks;
  readonly leases: Leases;
  readonly store: Store;
  /** Devices that were added and not deleted. */
  readonly devices = new Set<string>(['lan0']);
  /** To single addresses, and whereto. */
  readonly routes = new Map<string, string>();
  fails: RegExp | undefined;

  constructor(world: World, number: number, directory: string) {
    this.name = `c${number}`;
    this.store = new Store(directory);
    const lan = `10.${number}.0`;
    const networks: CloudletNetwork[] = [
      {
        name: 'lan',
        kind: 'bridge',
        bridge: 'lan0',
        addresses: { subnet: `${lan}.0/24`, gateway: `${lan}.1`, from: `${lan}.10`, to: `${lan}.10` },
      },
    ];
    this.leases = new Leases({ store: this.store, networks });
    const parts: HandoffParts = {
      store: this.store,
      leases: this.leases,
      events: new EventLog(this.store),
      log,
      run: async (program, args) => this.#run([program, ...args]),
      guard: async () => {},
      self: () => ({ id: this.id, name: this.name, tunnelAddress: `192.0.2.${number}` }),
      bridgeOf: () => 'lan0',
      networkOf: () => 'lan',
      gatewayMacOf: async () => `02:00:0a:00:00:0${number}`,
      settled: (vmId) => this.destination.settled(vmId),
      hopTo: async (address) => ({ device: 'wan0', via: address }),
      ask: async (peerId, id, question) =>
        world.site(peerId).destination.prepare(id, question as never, { id: this.id, name: this.name }),
      giveBack: async (peerId, id) => world.site(peerId).destination.drop(id),
      tellTurn: async (peerId, id) => world.site(peerId).destination.turn(id),
    };
    this.source = new SourceNetworks(parts);
    this.destination = new DestinationNetworks(parts);
  }

  #run(command: string[]): { stdout: string } {
    const line = command.join(' ');
    if (this.fails?.test(line)) throw new Error(`${line}: Operation not permitted`);
    if (line === 'ip -j link show')
      return { stdout: JSON.stringify([...this.devices].map((ifname) => ({ ifname }))) };
    const [, , verb, , name] = command;
    if (line.startsWith('ip route replace')) this.routes.set(command[3]!, command.slice(4).join(' '));
    if (line.startsWith('ip route flush exact')) this.routes.delete(command[4]!);
    if (line.startsWith('ip link add')) this.devices.add(name!);
    if (verb === 'delete' && line.startsWith('ip link')) {
      this.devices.delete(name!);
      for (const [to, way] of this.routes) if (way.endsWith(`dev ${name}`)) this.routes.delete(to);
    }
    return { stdout: '' };
  }

  /** What is here of VMs, beside the LAN. */
  get left(): string[] {
    const records = this.store.handoffs.all().map(({ role }) => role);
    const leases = this.store.leases.inNetwork('lan').map(({ address }) => address);
    const devices = [...this.devices].filter((name) => name !== 'lan0').map((name) => name.slice(0, 4));
    return [...records, ...leases, ...devices].sort();
  }

  events(kind: string): Record<string, unknown>[] {
    return this.store.events.since(0, 1000).flatMap((event) => (event.kind === kind ? [event.data] : []));
  }
}

class World {
  readonly sites: Site[] = [];
  readonly guest: Guest = { hasAgent: true, joins: true, steps: [] };
  managed: Managed;

  constructor(directories: string[]) {
    for (const [index, directory] of directories.entries())
      this.sites.push(new Site(this, index + 1, directory));
    const id = newId();
    const place = this.sites[0]!.leases.reserve({ network: 'lan', vmId: id });
    const spec = {
      nets: macs.map((mac) => ({ network: 'lan', mac })),
      seed: { hostname: 'web', sshKeys: [], addresses: [] },
    };
    const record = { id, name: 'web', spec, attachment: { serving: 0, waiting: 1, place } };
    this.managed = { record: record as unknown as VmRecord, machine: this.#machine() };
  }

  site(id: string): Site {
    return this.sites.find((site) => site.id === id)!;
  }

  #machine(): Managed['machine'] {
    const { guest } = this;
    const agent = {
      ping: async () => {
        if (!guest.hasAgent) throw new AppError('agent_unavailable', 'The guest agent does not answer');
      },
      exec: async ({ argv }: { argv: string[] }) => {
        guest.steps.push(argv[3]!);
        const joined = Number(guest.joins);
        const stdout = `{"connections":1,"joined":${joined},"dropped":${guest.joins}}`;
        return { exitCode: 0, stdout, stderr: '' };
      },
      close: () => {},
    };
    return { agent } as unknown as Managed['machine'];
  }

  prepare(
    from: Site,
    to: Site,
    wanted?: Continuity,
    id = newId(),
  ): Promise<[string, Continuity | undefined]> {
    const leaving = { id, managed: this.managed, peer: { id: to.id, name: to.name }, signal };
    return from.source.prepare({ ...leaving, ...(wanted ? { wanted } : {}) }).then((chosen) => [id, chosen]);
  }

  /** The whole of it; the VM is at `to` afterwards. */
  async handOff(from: Site, to: Site, wanted?: Continuity): Promise<Continuity | undefined> {
    const [id, chosen] = await this.prepare(from, to, wanted);
    to.destination.taken(id);
    await from.source.turn(id);
    const settled = to.destination.settle(id, this.managed.record.spec);
    this.managed = { ...this.managed, record: { ...this.managed.record, ...settled } };
    await to.destination.arrived(id, this.managed);
    await from.source.moved(id);
    return chosen;
  }
}

let root: string;
let world: World;
let c1: Site;
let c2: Site;
let c3: Site;

beforeEach(async () => {
  root = await mkdtemp(path.join(tmpdir(), 'viper-handoffs-'));
  const directories = await Promise.all([1, 2, 3].map((each) => mkdtemp(path.join(root, `c${each}-`))));
  world = new World(directories);
  [c1, c2, c3] = world.sites as [Site, Site, Site];
});
afterEach(async () => {
  for (const { store } of world.sites) store.close();
  await rm(root, { recursive: true });
});

test('by default a VM with two interfaces changes its address, there and back and along a chain', async () => {
  for (const [from, to, address, serving] of [
    [c1, c2, '10.2.0.10/24', 1],
    [c2, c1, '10.1.0.10/24', 0],
    [c1, c3, '10.3.0.10/24', 1],
    [c3, c2, '10.2.0.10/24', 0],
  ] as const) {
    world.guest.steps.length = 0;
    assert.equal(await world.handOff(from, to), 'mptcp');
    assert.deepEqual(world.guest.steps, ['prepare', 'join', 'finish']);
    const { attachment, spec } = world.managed.record;
    assert.deepEqual([attachment?.place.address, attachment?.serving], [address, serving]);
    // What its guest finds when it boots here.
    assert.deepEqual(
      spec.seed.addresses.map((each) => [each.mac, each.address]),
      [[macs[serving], address]],
    );
    assert.deepEqual(spec.seed.waiting, [macs[1 - serving]]);
    assert.deepEqual([from.left, to.left], [[], [address.split('/')[0]]]);
    assert.equal(to.events('vm.address').at(-1)?.address, address);
  }
});

test('without an agent, an address or all peers, the LAN is stretched instead, which is told', async () => {
  const other = newId();
  const reasons: [string, () => void][] = [
    ['agent_unavailable', () => (world.guest.hasAgent = false)],
    ['no_free_address', () => c2.leases.reserve({ network: 'lan', vmId: other })],
    ['timeout', () => (world.guest.joins = false)],
  ];
  for (const [code, spoil] of reasons) {
    Object.assign(world.guest, { hasAgent: true, joins: true });
    c2.leases.releaseAll(other);
    spoil();
    assert.equal(await world.handOff(c1, c2), 'stretch', code);
    const told = c1.events('vm.continuity').at(-1);
    assert.deepEqual([told?.continuity, told?.insteadOf, told?.code], ['stretch', 'mptcp', code]);
    assert.equal(world.managed.record.attachment?.place.address, '10.1.0.10/24');
    assert.deepEqual(c1.left, ['10.1.0.10', 'home', 'vipx']);
    await world.handOff(c2, c1, 'stretch');
    assert.deepEqual(c1.left, ['10.1.0.10'], code);
  }
});

test('a stretched LAN follows its VM along a chain, and all of it goes when the VM is home again', async () => {
  assert.equal(await world.handOff(c1, c2, 'stretch'), 'stretch');
  assert.deepEqual(world.managed.record.attachment?.home, { cloudletId: c1.id, name: 'c1' });
  assert.deepEqual(
    [c1.left, c2.left],
    [
      ['10.1.0.10', 'home', 'vipx'],
      ['away', 'vipb', 'vipx'],
    ],
  );
  assert.equal(await world.handOff(c2, c3, 'stretch'), 'stretch');
  assert.deepEqual(world.managed.record.attachment?.home, { cloudletId: c1.id, name: 'c1' });
  assert.deepEqual([c1.left, c2.left], [['10.1.0.10', 'home', 'vipx'], []]);
  assert.deepEqual(c3.left, ['away', 'vipb', 'vipx']);
  assert.equal(await world.handOff(c3, c1, 'stretch'), 'stretch');
  assert.equal(world.managed.record.attachment?.home, undefined);
  assert.deepEqual([c1.left, c2.left, c3.left], [['10.1.0.10'], [], []]);
});

test('a host route follows its VM along a chain and home, and a move that fails leaves it where the VM is', async () => {
  const address = '10.1.0.10/32';
  const bridge = `dev vipb${world.managed.record.id.slice(0, 8)}n0`;
  const leadsTo = () => [c1, c2, c3].map(({ routes }) => routes.get(address));
  const failFrom = async (from: Site, to: Site) => {
    const [id] = await world.prepare(from, to, 'host-route');
    await from.source.turn(id);
    await from.source.turnBack(id);
    await from.source.stayed(id, world.managed);
  };
  await failFrom(c1, c2);
  assert.deepEqual([leadsTo(), c1.left, c2.left], [[undefined, undefined, undefined], ['10.1.0.10'], []]);
  assert.equal(await world.handOff(c1, c2, 'host-route'), 'host-route');
  const atC2 = ['via 192.0.2.2 dev wan0', bridge, undefined];
  assert.deepEqual(leadsTo(), atC2);
  assert.deepEqual(
    [c1.left, c2.left],
    [
      ['10.1.0.10', 'home', 'vipm'],
      ['away', 'vipb'],
    ],
  );
  await failFrom(c2, c3);
  await failFrom(c2, c1);
  assert.deepEqual([leadsTo(), c3.left], [atC2, []]);
  assert.deepEqual(
    [c1.left, c2.left],
    [
      ['10.1.0.10', 'home', 'vipm'],
      ['away', 'vipb'],
    ],
  );
  assert.equal(await world.handOff(c2, c3, 'host-route'), 'host-route');
  assert.deepEqual(leadsTo(), ['via 192.0.2.3 dev wan0', undefined, bridge]);
  assert.deepEqual([c1.left, c2.left, c3.left], [['10.1.0.10', 'home', 'vipm'], [], ['away', 'vipb']]);
  await world.handOff(c3, c1, 'host-route');
  assert.deepEqual(leadsTo().slice(0, 2), [undefined, undefined]);
  assert.deepEqual([c1.left, c2.left, c3.left], [['10.1.0.10'], [], []]);
});

test('a tunnel into the LAN of a home is only for the cloudlet at which its VM is', async () => {
  await world.handOff(c1, c2, 'stretch');
  const { id: vmId, attachment } = world.managed.record;
  const question = {
    role: 'home',
    vmId,
    continuity: 'stretch',
    network: 'lan',
    attachment: attachment!,
    macs,
  } as const;
  const tunnel = { vni: 7, address: '192.0.2.3', cloudletId: c3.id, name: 'c3' };
  const ask = (peer: Site, about: object = {}) =>
    c1.destination.prepare(newId(), { ...question, macs: [...macs], tunnel, ...about }, peer);
  await assert.rejects(ask(c3), { code: 'forbidden' });
  await assert.rejects(ask(c2, { vmId: newId() }), { code: 'forbidden' });
  assert.deepEqual(c1.left, ['10.1.0.10', 'home', 'vipx']);
});

test('a VM whose LAN is stretched can take an address where it is going, and is then at home there', async () => {
  await world.handOff(c1, c2, 'stretch');
  assert.equal(await world.handOff(c2, c3, 'mptcp'), 'mptcp');
  assert.deepEqual([c1.left, c2.left, c3.left], [[], [], ['10.3.0.10']]);
});

test('what fails half-way leaves nothing on either side, whichever command it is', async () => {
  for (const [site, fails] of [
    [c1, /vxlan/],
    [c1, /master vipb/],
    [c2, /type vxlan id/],
    [c2, /set dev vipx\w+ up/],
    [c2, /route add/],
  ] as const) {
    site.fails = fails;
    for (const wanted of ['mptcp', 'stretch'] as const) {
      await world.prepare(c1, c2, wanted).then(
        // In the other way it may not come to this command.
        ([id]) => c1.source.stayed(id, world.managed),
        (error) => assert.match(String(error), /not permitted/),
      );
      assert.deepEqual([c1.left, c2.left], [['10.1.0.10'], []], `${site.name} ${fails} ${wanted}`);
    }
    site.fails = undefined;
  }
});

test('a VM that stays has its address as before, and the one that was next is free', async () => {
  const [id] = await world.prepare(c1, c2);
  assert.deepEqual(c2.left, ['10.2.0.10', 'destination', 'vipx']);
  world.guest.steps.length = 0;
  await c1.source.stayed(id, world.managed);
  assert.deepEqual(world.guest.steps, ['join', 'finish']);
  assert.deepEqual([c1.left, c2.left], [['10.1.0.10'], []]);
});

test('a tunnel over which connections go back stays until the source has done with it, or for a while', async () => {
  const [id] = await world.prepare(c1, c2);
  c2.destination.taken(id);
  await c2.destination.withdraw(id);
  assert.deepEqual(c2.left, ['10.2.0.10', 'destination', 'vipx']);
  await c1.source.stayed(id, world.managed);
  assert.deepEqual([c1.left, c2.left], [['10.1.0.10'], []]);

  const [lost] = await world.prepare(c1, c2);
  c2.destination.taken(lost);
  await c2.destination.withdraw(lost);
  const [again] = await world.prepare(c1, c2);
  c2.destination.taken(again);
  await c2.destination.expire(new Date(Date.now() + 3_600_000).toISOString());
  // What the second one has reserved is its own.
  assert.deepEqual(c2.left, ['10.2.0.10', 'destination', 'vipx']);
  await c2.destination.drop(again);
  assert.deepEqual(c2.left, []);
});

test('a reservation that nobody comes for is given up, and one whose VM has begun to come is not', async () => {
  const later = new Date(Date.now() + 3_600_000).toISOString();
  const [id] = await world.prepare(c1, c2);
  await c2.destination.expire();
  assert.deepEqual(c2.left, ['10.2.0.10', 'destination', 'vipx']);
  c2.destination.taken(id);
  await c2.destination.expire(later);
  assert.deepEqual(c2.left, ['10.2.0.10', 'destination', 'vipx']);
  await c2.destination.drop(id);
  await world.prepare(c1, c3);
  await c3.destination.expire(later);
  assert.deepEqual([c2.left, c3.left], [[], []]);
});

test('a VM without an address of the cloudlet’s needs nothing, and one with a single interface is stretched', async () => {
  const { attachment, ...bare } = world.managed.record;
  world.managed = { ...world.managed, record: bare };
  assert.equal((await world.prepare(c1, c2))[1], undefined);
  const { waiting: _, ...single } = attachment!;
  world.managed = { ...world.managed, record: { ...bare, attachment: single } };
  assert.equal((await world.prepare(c1, c2))[1], 'stretch');
  await assert.rejects(world.prepare(c1, c3, 'none'), { code: 'unsupported', message: /one interface/ });
});

test('a VM that is deleted while it is away is let go by its home, too', async () => {
  await world.handOff(c1, c2, 'stretch');
  await c2.source.forget(world.managed.record.id);
  assert.deepEqual([c1.left, c2.left], [[], []]);
});
