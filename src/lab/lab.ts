/**
 * A small world on one machine: cloudlets with a LAN each, WAN links between them, devices that walk. What is made is
 * network namespaces, processes in them, one device of the host and one directory, all named after the lab. It is
 * found again by these names, so any process can look at it, change it and take it down, also after its maker died.
 */
import { mkdir } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { AppError } from '../model/errors.ts';
import { type Command, listLinksCommand, parseLinks } from '../network/index.ts';
import { planAddress, planArrival, planCellular, planDevice, planEnter, planLeave } from './device.ts';
import {
  accessPoint,
  type LabDevice,
  type LabLayout,
  lanBridge,
  layOut,
  namespaceOf,
  type Site,
  type Wire,
  type WireEnd,
  wiresOf,
} from './layout.ts';
import { inNamespace } from './namespaces.ts';
import {
  claimDirectory,
  directoryOf,
  isLeftBehind,
  type LabRecord,
  newRecord,
  readRecord,
  readWireSettings,
  saveRecord,
  saveWireSettings,
} from './record.ts';
import { execute, executeAll, tell } from './runner.ts';
import {
  defaultLabName,
  type LabWish,
  parseLab,
  parseWire,
  refusal,
  requireName,
  type WireSettings,
} from './spec.ts';
import { chooseSubnet } from './subnet.ts';
import { removeNamed, sweep, takeDown } from './take-down.ts';
import { planRoutes, planSites } from './wan.ts';
import { changeWire, type Emulator, netemProbe, planWire, type WirePlace } from './wire.ts';

export interface LabOptions {
  /** What the kernel has if absent. */
  emulator?: Emulator;
  signal?: AbortSignal;
}

export interface Walk {
  to: string;
  /** Between leaving one LAN and being in the next; 0 if absent. */
  gapMs?: number;
  /** False: the device finds itself an address in the new LAN. */
  assign?: boolean;
  signal?: AbortSignal;
}

/** Where a device is; `at` is undefined while it walks. */
export interface DevicePlaceStatus {
  name: string;
  at?: string;
  address?: string;
  cellularAddress?: string;
}

export interface LabStatus {
  name: string;
  emulator: Emulator;
  cloudlets: { name: string; lan: string; gateway: string; url: string }[];
  links: ({ places: [string, string] } & WireSettings)[];
  devices: DevicePlaceStatus[];
}

export class Lab implements AsyncDisposable {
  readonly name: string;
  readonly directory: string;
  readonly layout: LabLayout;
  readonly emulator: Emulator;

  readonly #record: LabRecord;

  private constructor(record: LabRecord) {
    const { spec, subnet, emulator } = record;
    this.#record = record;
    this.name = spec.name;
    this.directory = directoryOf(spec.name);
    this.layout = layOut(spec, subnet);
    this.emulator = emulator;
  }

  /**
   * Makes a lab, which is this process's own: once that is gone, the next lab takes it away, unless it is told to
   * `stay`. Labs that were left behind are taken away first. Throws `name_taken` if one of that name is up, and
   * `unsupported` for rights or programs that are missing; then nothing of it is left.
   */
  static async up(wish: LabWish = {}, { emulator, signal }: LabOptions = {}): Promise<Lab> {
    const spec = parseLab(wish);
    requireRoot();
    await sweep();
    const subnet = await chooseSubnet(spec.name);
    const record = await newRecord({ spec, subnet, emulator: emulator ?? 'vde' });
    await claimDirectory(record);
    await using undo = new AsyncDisposableStack();
    undo.defer(async () => void (await takeDown(spec.name)));
    // Without a directory, and so without a maker, but with the name: from a lab whose directory was removed.
    await removeNamed(spec.name);
    record.emulator = emulator ?? (await bestEmulator(spec.name));
    const lab = new Lab(record);
    await lab.#make(signal);
    record.isReady = true;
    await saveRecord(record);
    undo.move();
    return lab;
  }

  /** The lab of that name. Throws `not_found`. */
  static async open(name = defaultLabName): Promise<Lab> {
    const record = await readRecord(requireName('name', name));
    if (record?.isReady) return new Lab(record);
    throw new AppError('not_found', `Lab: there is no lab '${name}'; make it with: viper lab up`, {
      kind: 'lab',
      name,
    });
  }

  /**
   * Takes a lab down with all that runs in it, and whatever is left of one of that name; and labs whose makers died, such
   * as a demo's that was killed. Gives whether there was something of that name. Throws `wrong_state` while it is being made.
   */
  static async down(name = defaultLabName): Promise<boolean> {
    requireName('name', name);
    requireRoot();
    const record = await readRecord(name);
    if (record && !record.isReady && !(await isLeftBehind(record)))
      throw new AppError(
        'wrong_state',
        `Lab: '${name}' is being made by process ${record.maker.pid}; wait for it or end it`,
        { state: 'starting', allowed: [] },
      );
    const wasThere = await takeDown(name);
    await sweep();
    return wasThere;
  }

  /** From now on it outlives this process, until somebody takes it down. */
  async stay(): Promise<void> {
    await saveRecord({ ...this.#record, stays: true });
  }

  async #make(signal?: AbortSignal): Promise<void> {
    const { layout } = this;
    await executeAll(planSites(layout), signal);
    for (const device of layout.devices) await executeAll(planDevice(device), signal);
    for (const wire of wiresOf(layout)) {
      await mkdir(path.join(this.#place.directory, wire.name), { recursive: true });
      await executeAll(planWire(wire, this.#place), signal);
    }
    await executeAll(planRoutes(layout), signal);
    for (const device of layout.devices)
      await executeAll([...planCellular(device), ...planArrival(device)], signal);
  }

  get #place(): WirePlace {
    return {
      emulator: this.emulator,
      core: this.layout.core,
      directory: path.join(this.directory, 'wires'),
    };
  }

  site(name: string): Site {
    return find('cloudlet', this.layout.sites, name);
  }

  device(name: string): LabDevice {
    return find('device', this.layout.devices, name);
  }

  /** The command that does the same in the network of this device or cloudlet. */
  commandIn(name: string, command: Command): Command {
    return inNamespace(
      find('place', [...this.layout.devices, ...this.layout.sites], name).namespace,
      command,
    );
  }

  /**
   * Changes a link while it carries packets, and gives its settings. Named by its two places: two cloudlets, or a
   * device and `radio` or `cellular`. What is left open stays. Throws `invalid_request`.
   */
  async link(a: string, b: string, wish: Partial<WireSettings>): Promise<WireSettings> {
    const wire = this.#wire(a, b);
    const settings = parseWire('link', wish, await this.#settings(wire));
    const { commands, tell: told } = changeWire(wire, await this.#ends(wire), settings, this.#place);
    await saveWireSettings(this.#place.directory, wire.name, settings);
    await executeAll(commands);
    if (told) await tell(told.socket, told.lines);
    return settings;
  }

  /** The device walks into another LAN, or the same again. Throws `invalid_request` for a place that is not there. */
  async move(name: string, { to, gapMs = 0, assign = true, signal }: Walk): Promise<DevicePlaceStatus> {
    if (!(gapMs >= 0 && gapMs <= 3_600_000)) throw refusal('gapMs', gapMs, '0 to 3600000 ms');
    const device = this.device(name);
    const target = this.site(to);
    const { site } = await this.#whereIs(device);
    await executeAll(planLeave(device, site));
    await sleep(gapMs, undefined, signal ? { signal } : {});
    const radio = await this.#settings(device.radio);
    await executeAll(planEnter(device, { from: site, to: target, radio, emulator: this.emulator }));
    if (assign) await executeAll(planAddress(device, target));
    return this.#deviceStatus(device);
  }

  async status(): Promise<LabStatus> {
    const { name, emulator, layout } = this;
    const links = [];
    for (const wire of wiresOf(layout))
      links.push({ places: [...wire.places] as [string, string], ...(await this.#settings(wire)) });
    const devices = [];
    for (const device of layout.devices) devices.push(await this.#deviceStatus(device));
    const cloudlets = layout.sites.map(({ name, lan, gateway, url }) => ({ name, lan, gateway, url }));
    return { name, emulator, cloudlets, links, devices };
  }

  async #deviceStatus(device: LabDevice): Promise<DevicePlaceStatus> {
    const { site, isAttached } = await this.#whereIs(device);
    return {
      name: device.name,
      ...(isAttached ? { at: site.name, address: device.addressAt(site) } : {}),
      ...(device.cellular ? { cellularAddress: device.cellular.address } : {}),
    };
  }

  /** In whose namespace the far end of its radio link is, and whether it is plugged in there. */
  async #whereIs(device: LabDevice): Promise<{ site: Site; isAttached: boolean }> {
    for (const site of this.layout.sites) {
      const links = parseLinks(await execute(inNamespace(site.namespace, listLinksCommand)));
      const found = links.find(({ name }) => name === accessPoint(device.name));
      if (found) return { site, isAttached: found.master === lanBridge };
    }
    throw new AppError('wrong_state', `Lab: the radio link of ${device.name} is gone; take the lab down`, {
      state: 'broken',
      allowed: ['down'],
    });
  }

  #wire(a: string, b: string): Wire {
    const wires = wiresOf(this.layout);
    const found = wires.find(({ places }) => places.includes(a) && places.includes(b) && a !== b);
    if (found) return found;
    throw refusal('link', `${a} ${b}`, `one of ${wires.map(({ places }) => places.join(' ')).join(', ')}`);
  }

  async #settings(wire: Wire): Promise<WireSettings> {
    return (await readWireSettings(this.#place.directory, wire.name)) ?? wire.settings;
  }

  /** The far end of a radio link walks with its device. */
  async #ends(wire: Wire): Promise<readonly [WireEnd, WireEnd]> {
    const device = this.layout.devices.find(({ radio }) => radio.name === wire.name);
    if (!device) return wire.ends;
    const { site } = await this.#whereIs(device);
    return [wire.ends[0], { ...wire.ends[1], namespace: site.namespace }];
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await takeDown(this.name);
  }
}

function find<T extends { name: string }>(kind: string, all: readonly T[], name: string): T {
  const found = all.find((each) => each.name === name);
  if (found) return found;
  throw refusal(kind, name, `one of ${all.map((each) => each.name).join(', ') || '(there is none)'}`);
}

function requireRoot(): void {
  if (process.getuid?.() === 0) return;
  throw new AppError('unsupported', 'Lab: network namespaces need root', { missing: 'root' });
}

async function bestEmulator(lab: string): Promise<Emulator> {
  const namespace = namespaceOf(lab, 'core');
  await execute(['ip', 'netns', 'add', namespace]);
  try {
    await execute(inNamespace(namespace, netemProbe));
    return 'netem';
  } catch {
    return 'vde';
  } finally {
    await execute(['ip', 'netns', 'delete', namespace]);
  }
}
