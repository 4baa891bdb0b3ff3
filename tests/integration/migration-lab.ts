/**
 * Two cloudlets in one process, as far as a migration needs them: two directories, messages by function call,
 * sessions as pairs of sockets.
 */
import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import { mkdir, mkdtemp, readdir, rm } from 'node:fs/promises';
import { createConnection, createServer, type Server } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Duplex } from 'node:stream';
import { setTimeout as sleep } from 'node:timers/promises';
import { guestImage } from '../../src/lab/guests.ts';
import { DestinationMigration } from '../../src/migration/destination.ts';
import type { DestinationState } from '../../src/migration/destination-machine.ts';
import { closeDisk } from '../../src/migration/memory-in.ts';
import type { Problem, SessionPurpose, ToDestination, ToSource } from '../../src/migration/protocol.ts';
import { SourceMigration } from '../../src/migration/source.ts';
import { plannedSource, type SourceState } from '../../src/migration/source-machine.ts';
import type { SilentQemu } from '../../src/migration/streams-in.ts';
import { newId, type Uuid } from '../../src/model/ids.ts';
import type {
  MigrationOptions,
  MigrationPhase,
  MigrationProgress,
  VmToMove,
} from '../../src/model/migration.ts';
import { MiB } from '../../src/model/units.ts';
import type { VmSpec } from '../../src/model/vm.ts';
import { createDisk, diskUsage } from '../../src/vm/disks.ts';
import { Machine } from '../../src/vm/machine.ts';
import { machinePaths } from '../../src/vm/paths.ts';
import { findQemu, killProcess, waitUntilGone } from '../../src/vm/process.ts';
import { SpareMonitor } from '../../src/vm/spare-monitor.ts';
import type { LabRelay } from './lab-relay.ts';

const image = guestImage('tiny');

export const spec: VmSpec = {
  machine: 'pc-q35-7.2',
  accelerator: 'tcg',
  cpu: { model: 'qemu64', count: 1 },
  memoryBytes: 192 * MiB,
  disk: { image: `sha256:${'0'.repeat(64)}`, sizeBytes: 64 * MiB },
  nets: [],
  seed: { hostname: 'one', sshKeys: [], addresses: [] },
};

export const options: MigrationOptions = {
  mode: 'precopy',
  storage: 'copied',
  limits: { downtimeMs: 300, autoConverge: false },
  channels: 0,
};

/** One side: where its VMs lie. */
export interface Site {
  name: string;
  directory: string;
}

export class Lab implements AsyncDisposable {
  readonly id = newId();
  readonly #made: AsyncDisposableStack;
  readonly a: Site;
  readonly b: Site;
  /** Seen by both. */
  readonly shared: string;

  private constructor(root: string, made: AsyncDisposableStack) {
    this.#made = made;
    this.a = { name: 'a', directory: join(root, 'a') };
    this.shared = root;
    this.b = { name: 'b', directory: join(root, 'b') };
  }

  static async make(): Promise<Lab> {
    const made = new AsyncDisposableStack();
    const root = await mkdtemp(join(tmpdir(), 'viper-migration-'));
    made.defer(() => rm(root, { recursive: true, force: true }));
    const lab = new Lab(root, made);
    return lab;
  }

  defer(undo: () => Promise<unknown>): void {
    this.#made.defer(async () => {
      await undo();
    });
  }

  async launch(
    site: Site,
    incoming: boolean | 'postcopy',
    diskFile = join(site.directory, 'disk.qcow2'),
  ): Promise<Machine> {
    await mkdir(site.directory, { recursive: true });
    if (!diskFile.includes('://') && !existsSync(diskFile))
      await createDisk({
        file: diskFile,
        imageFile: image,
        imageFormat: 'qcow2',
        sizeBytes: spec.disk.sizeBytes,
        signal: AbortSignal.timeout(30_000),
      });
    const machine = await Machine.launch({
      id: this.id,
      name: `test-${site.name}`,
      spec,
      accelerator: 'tcg',
      directory: site.directory,
      diskFile,
      incoming: incoming !== false,
      spareMonitor: incoming === 'postcopy',
    });
    this.#made.defer(async () => {
      machine.detach();
      await killProcess(machine.process);
      await waitUntilGone(machine.process);
    });
    return machine;
  }

  async boot(site: Site, diskFile?: string): Promise<Machine> {
    const machine = await this.launch(site, false, diskFile);
    await machine.resume();
    await machine.agent.waitUntilReady({ timeoutMs: 120_000 });
    return machine;
  }

  async vmToMove(site: Site, epoch: number): Promise<VmToMove> {
    const { allocatedBytes } = await diskUsage(join(site.directory, 'disk.qcow2')).catch(() => ({
      allocatedBytes: 0,
    }));
    return {
      id: this.id,
      name: 'one',
      spec,
      epoch,
      runningWith: 'tcg',
      running: true,
      image: { digest: spec.disk.image, format: 'qcow2', fileBytes: 0, virtualBytes: 0 },
      diskBytes: allocatedBytes,
    };
  }

  /** Both halves of a migration, joined with each other. */
  async migration(from: Site, to: Site, machine: Machine, wanted: MigrationSetup = {}): Promise<Pair> {
    const pair = new Pair(this, {
      from,
      to,
      machine,
      vm: await this.vmToMove(from, wanted.epoch ?? 1),
      wanted,
    });
    this.#made.defer(() => pair.stop());
    return pair;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#made.disposeAsync();
    assert.equal(await findQemu(this.id), null);
  }
}

export interface MigrationSetup extends Partial<MigrationOptions> {
  epoch?: number;
  /** Relayed: those that lend memory. */
  lenders?: LabRelay[];
  diskFile?: string;
  check?: () => Promise<Problem[]>;
}

interface PairFacts {
  from: Site;
  to: Site;
  machine: Machine;
  vm: VmToMove;
  wanted: MigrationSetup;
}

/** A migration's two halves with their journals. Either can be killed at any journalled state and started again. */
export class Pair {
  source: SourceMigration;
  destination: DestinationMigration;
  sourceMachine: Machine;
  readonly sourceJournal: SourceState[] = [];
  readonly destinationJournal: DestinationState[] = [];
  readonly progress: MigrationProgress[] = [];
  readonly told: string[] = [];
  /** Of the destination's. */
  manifest: Buffer | undefined;
  readonly failures: Error[] = [];
  /** So many sessions of the disk carry the first words of its server and nothing more. */
  silentDisks = 0;
  /** Runs before a message is delivered. */
  beforeDelivery: (message: ToDestination | ToSource) => Promise<void> = async () => {};
  readonly crashed: Promise<void>;
  /** The destination has asked for a new session. */
  readonly untilRecovered: Promise<void>;
  readonly #recovered = Promise.withResolvers<void>();
  readonly #crashed = Promise.withResolvers<void>();
  #crashAt: { side: 'source' | 'destination'; name: string } | undefined;
  readonly #streams = new Set<Duplex>();
  readonly #lab: Lab;
  readonly #facts: PairFacts;

  constructor(lab: Lab, facts: PairFacts) {
    this.#lab = lab;
    this.#facts = facts;
    this.crashed = this.#crashed.promise;
    this.untilRecovered = this.#recovered.promise;
    this.sourceMachine = facts.machine;
    this.source = this.#makeSource(plannedSource(facts.wanted.epoch ?? 1));
    this.destination = this.#makeDestination({ name: 'absent' }, null);
  }

  /** The daemon of that side dies when this state is in its journal, before anything of it is done. */
  crashAt(side: 'source' | 'destination', name: string): void {
    this.#crashAt = { side, name };
  }

  /** The daemon of that side starts again, finds its QEMU and goes on from its journal. */
  async restart(side: 'source' | 'destination'): Promise<void> {
    const id = this.#lab.id;
    if (side === 'source') {
      await this.source.stop();
      this.sourceMachine.detach();
      const { directory } = this.#facts.from;
      const machine = await Machine.adopt({ id, directory, process: this.sourceMachine.process });
      if (machine) this.sourceMachine = machine;
      this.source = this.#makeSource(this.sourceJournal.at(-1)!, machine);
      await this.source.restart();
    } else {
      const before = this.destination.machine;
      await this.destination.stop();
      before?.detach();
      const { directory } = this.#facts.to;
      const machine = before ? await Machine.adopt({ id, directory, process: before.process }) : null;
      this.destination = this.#makeDestination(this.destinationJournal.at(-1)!, machine);
      await this.destination.restart();
    }
  }

  /** The daemon of the destination starts again and finds a QEMU that waits for a page, and so for a new stream. */
  async restartBesideSilentQemu(): Promise<void> {
    const before = this.destination.machine!;
    const { process } = before;
    const { directory } = this.#facts.to;
    await this.destination.stop();
    // The last that the daemon before did: the VM should run, and lacks nearly all of its memory.
    const soon = { timeoutMs: 1000 };
    await Promise.all([closeDisk(before.qmp, soon), before.resume(soon)]).catch(() => {});
    before.detach();
    const adopt = (timeoutMs: number) =>
      Machine.adopt({ id: this.#lab.id, directory, process }, { timeoutMs });
    const found = await adopt(3000).catch((error) => assert.equal(error.code, 'timeout'));
    if (found) {
      // A guest that happens to want nothing for now: its QEMU is found like any other.
      this.destination = this.#makeDestination(this.destinationJournal.at(-1)!, found);
      return this.destination.restart();
    }
    const paths = machinePaths(directory);
    using spare = SpareMonitor.open(paths)!;
    const silent = { paths, recover: (socketPath: string) => spare.recover(socketPath) };
    this.destination = this.#makeDestination(this.destinationJournal.at(-1)!, null, silent);
    const machine = await adopt(60_000);
    await this.destination.answers(machine);
  }

  /** Every session between the two ends for good; messages still pass. */
  cutSessions(): void {
    for (const stream of this.#streams) stream.destroy();
  }

  async untilPhase(phase: MigrationPhase): Promise<void> {
    while (!this.progress.some((one) => one.phase === phase)) await sleep(5);
  }

  async untilDestination(name: DestinationState['name']): Promise<void> {
    await this.destination.waitFor((state) => state.name === name);
  }

  async stop(): Promise<void> {
    await this.source.stop();
    await this.destination.stop();
    for (const stream of this.#streams) stream.destroy();
  }

  #makeSource(state: SourceState, machine: Machine | null = this.sourceMachine): SourceMigration {
    const { vm, from } = this.#facts;
    return new SourceMigration({
      id: this.#lab.id,
      vm,
      options: this.#options,
      state,
      machine,
      retryMs: 100,
      surroundings: {
        journal: { append: (next) => void this.sourceJournal.push(next) },
        send: (message) => this.#deliver(message, (one: ToDestination) => this.destination.receive(one)),
        openSession: (purpose, ticket) => this.#session(purpose, ticket.secret),
        openRelay: (relay, group) => this.#openRelay(relay, group),
        discard: () => rm(from.directory, { recursive: true, force: true }),
        onState: (next) => this.#perhapsCrash('source', next.name),
        onProgress: (progress) => this.progress.push(progress),
        tellOperator: (message) => this.told.push(message),
        onFailure: (error) => this.failures.push(error),
      },
    });
  }

  #makeDestination(
    state: DestinationState,
    machine: Machine | null,
    silent?: SilentQemu,
  ): DestinationMigration {
    const { vm, to, wanted } = this.#facts;
    const { mode } = this.#options;
    return new DestinationMigration({
      vm,
      options: this.#options,
      state,
      machine,
      silent,
      retryMs: 100,
      surroundings: {
        journal: { append: (next) => void this.destinationJournal.push(next) },
        send: (message) => this.#deliver(message, (one: ToSource) => this.source.receive(one)),
        check: wanted.check ?? (async () => []),
        make: () => this.#lab.launch(to, mode === 'precopy' ? true : 'postcopy', wanted.diskFile),
        merging: {
          openRelay: (relay, group) => this.#openRelay(relay, group, true),
          readManifest: async () => this.manifest,
          writeManifest: async (bytes) => {
            this.manifest = bytes;
          },
          removeManifest: async () => {
            this.manifest = undefined;
          },
          tellOperator: (message) => this.told.push(message),
        },
        discard: () => rm(to.directory, { recursive: true, force: true }),
        onState: (next) => this.#perhapsCrash('destination', next.name),
        onFailure: (error) => this.failures.push(error),
      },
    });
  }

  get #options(): MigrationOptions {
    const { epoch: _epoch, diskFile: _diskFile, check: _check, lenders, ...overrides } = this.#facts.wanted;
    const relays = lenders?.map(({ id, name }) => ({ id, name }));
    return { ...options, ...overrides, ...(relays && { relayed: { relays, replicas: 2 } }) };
  }

  async #openRelay(id: Uuid, group: string, isSlow = false): Promise<Duplex> {
    const [near, far] = await streamPair();
    const relay = this.#facts.wanted.lenders!.find((one) => one.id === id)!;
    relay.serve(far, group, isSlow);
    return near;
  }

  #perhapsCrash(side: 'source' | 'destination', name: string): void {
    if (this.#crashAt?.side !== side || this.#crashAt.name !== name) return;
    this.#crashAt = undefined;
    // Not awaited: it takes hold at once, and its end waits for the very step that calls this.
    void this[side].stop();
    this.#crashed.resolve();
  }

  /** A message has left when it is sent, so the sender does not wait for what it does. */
  async #deliver<Message extends ToDestination | ToSource>(
    message: Message,
    receive: (message: Message) => Promise<void>,
  ): Promise<void> {
    if (message.name === 'recover') this.#recovered.resolve();
    const copy = JSON.parse(JSON.stringify(message)) as Message;
    const deliver = async () => {
      await this.beforeDelivery(copy);
      await receive(copy);
    };
    setImmediate(() => deliver().catch((error) => this.failures.push(error)));
  }

  async #session(purpose: SessionPurpose, secret: string): Promise<Duplex> {
    const [near, far] = await streamPair();
    for (const stream of [near, far]) {
      this.#streams.add(stream);
      stream.once('close', () => this.#streams.delete(stream));
    }
    try {
      this.destination.accept(purpose, secret, far);
    } catch (error) {
      far.destroy();
      near.destroy();
      throw error;
    }
    return purpose === 'disk' && this.silentDisks-- > 0 ? onlyFirstWords(near) : near;
  }
}

/** What a link that is cut in the middle of a greeting looks like. */
function onlyFirstWords(near: Duplex): Duplex {
  const silent = new Duplex({ read() {}, write: (_bytes, _encoding, done) => done() });
  near.once('data', (bytes) => {
    near.pause();
    silent.push(bytes);
  });
  return silent;
}

/** Two ends of one stream with a buffer between them, as a link has. */
export async function streamPair(): Promise<[Duplex, Duplex]> {
  const far = Promise.withResolvers<Duplex>();
  const server: Server = createServer({ allowHalfOpen: true }, (socket) => {
    server.close();
    far.resolve(socket);
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as { port: number };
  const near = createConnection({ port, host: '127.0.0.1', allowHalfOpen: true });
  return [near, await far.promise];
}

/** What a VM that came by post-copy has until its QEMU ends. */
export const isOfSpareMonitor = (file: string): boolean => file === 'spare.in' || file === 'spare.out';

/** Nothing of a migration is left in a QEMU, and in its directory only what a running VM has. */
export async function assertNothingLeft(machine: Machine, site: Site): Promise<void> {
  assert.deepEqual(await machine.qmp.execute('query-block-jobs'), []);
  const nodes = await machine.qmp.execute('query-named-block-nodes', { flat: true });
  assert.deepEqual(
    nodes.filter((node) => node.drv === 'nbd'),
    [],
  );
  const capabilities = await machine.qmp.execute('query-migrate-capabilities');
  assert.deepEqual(
    capabilities.filter(({ state }) => state),
    [],
  );
  const files = (await readdir(site.directory)).filter((file) => !isOfSpareMonitor(file)).sort();
  assert.deepEqual(files, [
    'agent.sock',
    'console.log',
    'console.sock',
    'disk.qcow2',
    'qemu.log',
    'qmp.sock',
  ]);
}

export function assertForward(progress: MigrationProgress[]): void {
  for (const [index, now] of progress.entries()) {
    const before = progress[index - 1];
    if (!before) continue;
    assert.ok(
      now.fraction >= before.fraction && now.doneBytes >= before.doneBytes && now.round >= before.round,
    );
  }
}
