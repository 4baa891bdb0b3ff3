/**
 * Both agents between two real QEMUs whose VM never runs, so that all of it takes seconds: what the destination QEMU
 * says to a post-copy that its source knows nothing of, and to one that goes on after both agents were lost.
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { createConnection, createServer } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import type { Duplex } from 'node:stream';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { DestinationAgent } from '../../src/migration/condensed/destination-agent.ts';
import { GuestMemory } from '../../src/migration/condensed/guest-memory.ts';
import type { AgentMode } from '../../src/migration/condensed/handshake.ts';
import { SourceAgent } from '../../src/migration/condensed/source-agent.ts';
import { linkPair } from '../../src/migration/condensed/stand-ins.ts';
import { noStatistics } from '../../src/migration/condensed/statistics.ts';
import { type MigrationStatus, QmpConnection } from '../../src/qmp/index.ts';

const patienceMs = 120_000;
const contentPages = 512;

class TwoQemus implements AsyncDisposable {
  readonly #made = new AsyncDisposableStack();
  source!: { qmp: QmpConnection; memory: GuestMemory };
  destination!: { qmp: QmpConnection; memory: GuestMemory };
  incoming = '';
  outgoing = '';
  /** What was missing at the destination when its VM could have run. */
  missing: Buffer | undefined;
  readonly statistics = noStatistics();

  static async start(): Promise<TwoQemus> {
    const two = new TwoQemus();
    const directory = await mkdtemp(path.join(tmpdir(), 'viper-agents-'));
    two.#made.defer(() => rm(directory, { recursive: true, force: true }));
    two.incoming = path.join(directory, 'incoming');
    two.outgoing = path.join(directory, 'outgoing');
    await writeFile(path.join(directory, 'firmware'), Buffer.alloc(65_536, 'firmware'));
    await writeFile(path.join(directory, 'content'), randomBytes(contentPages * 4096));
    two.source = await two.#launch(directory, 'source');
    two.destination = await two.#launch(directory, 'destination');
    return two;
  }

  async #launch(directory: string, name: string): Promise<{ qmp: QmpConnection; memory: GuestMemory }> {
    const socket = path.join(directory, `${name}.qmp`);
    const argv = [
      ...['-no-user-config', '-nodefaults', '-display', 'none', '-S', '-m', '8'],
      ...['-machine', 'pc-q35-7.2,usb=off,vmport=off,smm=off,sata=off', '-accel', 'tcg,tb-size=16'],
      ...['-bios', path.join(directory, 'firmware'), '-qmp', `unix:${socket},server=on,wait=off`],
      ...['-device', `loader,file=${path.join(directory, 'content')},addr=0x100000,force-raw=on`],
      ...(name === 'destination' ? ['-incoming', 'defer'] : []),
    ];
    const qemu = spawn('qemu-system-x86_64', argv, { stdio: 'ignore' });
    this.#made.defer(async () => {
      const ended = once(qemu, 'exit');
      if (qemu.kill('SIGKILL')) await ended;
    });
    for (const deadline = Date.now() + patienceMs; ; ) {
      try {
        const qmp = await QmpConnection.connect(socket);
        const memory = this.#made.use(
          await GuestMemory.open(qemu.pid!, qmp, { mayWrite: name === 'destination' }),
        );
        return { qmp, memory };
      } catch (error) {
        if (Date.now() > deadline) throw error;
        await sleep(50);
      }
    }
  }

  async migrate(
    mode: AgentMode,
    link: Duplex,
    options: { drainAtOnce: boolean; limitBps?: number; drainFrom?: number },
  ) {
    const { qmp } = this.source;
    const { limitBps, drainAtOnce, drainFrom } = options;
    const done = Promise.withResolvers<void>();
    const server = createServer({ allowHalfOpen: true, pauseOnConnect: true }, (qemu) => {
      server.close();
      const agent = this.#sourceAgent(link, { qemu, mode, drainAtOnce, limitBps: () => limitBps });
      agent.run().then(done.resolve, done.reject);
      const looking = setInterval(() => {
        if (this.statistics.pages.literal < (drainFrom ?? Number.POSITIVE_INFINITY)) return;
        agent.drain();
        clearInterval(looking);
      }, 5);
      this.#made.defer(() => clearInterval(looking));
    });
    server.listen(this.outgoing);
    await once(server, 'listening');
    await qmp.execute('migrate', { uri: `unix:${this.outgoing}` });
    return done.promise;
  }

  resume(link: Duplex): Promise<void> {
    return this.#sourceAgent(link, { qemu: undefined, mode: 'resume', limitBps: () => undefined }).run();
  }

  #sourceAgent(
    link: Duplex,
    options: Pick<ConstructorParameters<typeof SourceAgent>[0], 'qemu' | 'mode' | 'drainAtOnce' | 'limitBps'>,
  ): SourceAgent {
    const { statistics } = this;
    const { memory } = this.source;
    return new SourceAgent({ ...options, link, memory, openIndex: async () => undefined, statistics });
  }

  async listen(isPostcopy: boolean): Promise<void> {
    const { qmp } = this.destination;
    const on = isPostcopy ? (['postcopy-ram', 'return-path'] as const) : [];
    const capabilities = on.map((capability) => ({ capability, state: true }));
    if (isPostcopy) await qmp.execute('migrate-set-capabilities', { capabilities });
    await qmp.execute('migrate-incoming', { uri: `unix:${this.incoming}` });
  }

  receive(link: Duplex, { isFirst = true } = {}): Promise<void> {
    const qemu = createConnection({ path: this.incoming, allowHalfOpen: true });
    const { memory } = this.destination;
    const keep = async (bits: Buffer): Promise<void> => {
      this.missing = bits;
    };
    return new DestinationAgent({
      qemu,
      link,
      memory,
      placing: isFirst ? { memory, keep } : undefined,
      missingBefore: isFirst ? undefined : this.missing,
      sets: [],
      openReader: async () => undefined,
    }).run();
  }

  async until(side: 'source' | 'destination', wanted: MigrationStatus): Promise<void> {
    for (const deadline = Date.now() + patienceMs; ; await sleep(10)) {
      const { status } = await this[side].qmp.execute('query-migrate');
      if (status === wanted) return;
      assert.ok(status !== 'failed' && Date.now() < deadline, `${side}: ${status}, wanted ${wanted}`);
    }
  }

  /** Every page is the same on both sides. */
  compare(): void {
    const [ours, theirs] = [this.source.memory, this.destination.memory];
    const table = ours.table();
    for (const memory of [ours, theirs]) memory.use(table);
    const [one, other] = [Buffer.alloc(4096), Buffer.alloc(4096)];
    for (let page = 0; page < table.pages; page++) {
      ours.read(page, 1, one);
      theirs.read(page, 1, other);
      assert.ok(one.equals(other), `page ${page}`);
    }
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.#made.disposeAsync();
  }
}

const ways = [
  { title: 'pre-copy', mode: 'precopy', drainAtOnce: false },
  { title: 'post-copy', mode: 'postcopy', drainAtOnce: true },
  { title: 'hybrid that ends as pre-copy', mode: 'postcopy', drainAtOnce: false },
  { title: 'hybrid', mode: 'postcopy', drainAtOnce: false, drainFrom: 100, limitBps: 4_000_000 },
] as const;
for (const { title, mode, ...options } of ways)
  test(`QEMU takes the ${title} that the agents make of a pre-copy`, async () => {
    await using two = await TwoQemus.start();
    await two.listen(mode === 'postcopy');
    const [near, far] = linkPair();
    const received = two.receive(far);
    const sent = two.migrate(mode, near, options);
    await Promise.all([sent, received]);
    await two.until('destination', 'completed');
    two.compare();
    // Kept for pages that have come past the stream alone.
    assert.equal(two.missing !== undefined, 'drainFrom' in options || options.drainAtOnce);
    assert.ok(two.statistics.pages.literal >= contentPages);
    assert.equal(two.statistics.postcopyPages > 0, options.drainAtOnce || 'drainFrom' in options);
    // Nothing of it binds the source: it can let the VM run again.
    await two.until('source', 'completed');
    await two.source.qmp.execute('cont');
    assert.equal((await two.source.qmp.execute('query-status')).running, true);
  });

for (const { title, ...options } of [
  { title: 'post-copy', drainAtOnce: true },
  { title: 'hybrid', drainAtOnce: false, drainFrom: 100 },
])
  test(`a ${title} goes on over a new link, with agents that know nothing of the old ones`, async () => {
    await using two = await TwoQemus.start();
    await two.listen(true);
    const [near, far] = linkPair();
    const received = assert.rejects(two.receive(far));
    const sent = assert.rejects(two.migrate('postcopy', near, { ...options, limitBps: 2_000_000 }));
    await two.until('destination', 'postcopy-active');
    near.destroy();
    await Promise.all([sent, received]);
    await two.until('destination', 'postcopy-paused');
    const before = two.statistics.pages.literal;
    assert.ok(before < contentPages, `${before} pages had come`);
    await rm(two.incoming, { force: true });
    await two.destination.qmp.execute('migrate-recover', { uri: `unix:${two.incoming}` });
    const [again, there] = linkPair();
    await Promise.all([two.resume(again), two.receive(there, { isFirst: false })]);
    await two.until('destination', 'completed');
    two.compare();
  });
