/**
 * A walk: a guest in a lab serves an echo and a stream to a device, the device walks from LAN to LAN, and its VM follows
 * by itself. Demo and bench say where to, and get what each handoff came to.
 */
import { openAsBlob } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { MiB } from '../model/units.ts';
import type { Continuity } from '../model/vm.ts';
import type { Decision, Migration, MigrationProgress, ViperEvent } from '../sdk/node.ts';
import { type LabCloudlet, LabFleet } from './fleet.ts';
import { guestImage } from './guests.ts';
import type { Lab } from './lab.ts';
import type { EchoSample } from './probes/echo.ts';
import type { StreamSample } from './probes/stream.ts';
import { longestSilence } from './silence.ts';
import { type StreamEnd, WalkPrograms } from './walk-programs.ts';

export interface WalkOptions {
  /** With one device, which starts at the first cloudlet; plain TCP wants its cellular link. */
  lab: Lab;
  /** Of each daemon. */
  config: object;
  /** `mptcp`: the connections are MPTCP's. Else they are plain TCP, of the device's cellular address. */
  continuity: Exclude<Continuity, 'none'>;
  streamBps: number;
  signal: AbortSignal;
  /** What happens, in a sentence. */
  tell: (text: string) => void;
  onEcho?: (sample: EchoSample) => void;
  onStream?: (sample: StreamSample) => void;
  onDecision?: (decision: Decision) => void;
  /** Undefined when the VM has come to its end. */
  onProgress?: (progress: MigrationProgress | undefined) => void;
}

/** What one step of the walk came to. Times of day are in ms since the epoch. */
export interface Handoff {
  from: string;
  to: string;
  /** From the sign of the device's walk to the decision. */
  decisionMs: number;
  /** From the device's arrival in the LAN to the begin of the migration. */
  attachedToStartedMs: number;
  /** From the request to: source released, destination complete. */
  totalMs: number;
  /** From the device's arrival in the LAN until the VM ran there. */
  arrivalToRunningMs: number;
  downtimeMs: number;
  /** The longest silence of the echo while the VM changed over. */
  gapMs: number;
  /** The same of pings to the VM's next address, every 10 ms. */
  pingGapMs: number;
  /** The longest silence of the echo while the device was between its LANs. */
  roamGapMs: number;
  rttBeforeMs: number;
  rttViaWanMs: number;
  rttAfterMs: number;
  /** What went over the WAN, of what the VM's memory and disk hold. */
  sentBytes: number;
  contentBytes: number;
  leftMs: number;
  arrivedMs: number;
  startedMs: number;
  resumedMs: number;
  settledMs: number;
}

export const walkVm = 'web';
const [echoPort, streamPort] = [7001, 7002];
const patienceMs = 300_000;
const lookEveryMs = 100;
const gapOfRoamMs = 300;
/** Of the silence that a changeover makes, some may come a moment after it. */
const echoesMs = 500;

export class Walk implements AsyncDisposable {
  readonly fleet: LabFleet;
  readonly programs: WalkPrograms;
  readonly #options: WalkOptions;
  readonly #device: string;
  readonly #events: Map<string, ViperEvent[]>;
  readonly #over: AbortController;
  readonly #stack: AsyncDisposableStack;

  private constructor(
    options: WalkOptions,
    made: {
      fleet: LabFleet;
      programs: WalkPrograms;
      events: Map<string, ViperEvent[]>;
      over: AbortController;
      stack: AsyncDisposableStack;
    },
  ) {
    this.#options = options;
    this.fleet = made.fleet;
    this.programs = made.programs;
    this.#events = made.events;
    this.#over = made.over;
    this.#stack = made.stack;
    this.#device = options.lab.layout.devices[0]!.name;
  }

  /** Resolves when the VM serves, and its device hears it. */
  static async begin(options: WalkOptions): Promise<Walk> {
    const { lab, config, continuity, signal, tell } = options;
    await using stack = new AsyncDisposableStack();
    const fleet = stack.use(await LabFleet.create(lab));
    for (const { name } of lab.layout.sites) await fleet.add(name, config);
    const { rttMs, rateBps } = lab.layout.links[0]!.wire.settings;
    tell(`${fleet.cloudlets.length} cloudlets in one fleet, ${rttMs} ms and ${rateBps / 1e6} Mbit/s apart`);
    const events = new Map<string, ViperEvent[]>();
    const over = new AbortController();
    stack.defer(() => over.abort());
    for (const cloudlet of fleet.cloudlets) {
      const list: ViperEvent[] = [];
      events.set(cloudlet.name, list);
      collect(cloudlet, list, over.signal).catch(() => {});
    }
    await makeServer(fleet.cloudlets, options);
    const [first] = fleet.cloudlets as [LabCloudlet];
    const address = await addressOf(first, signal);
    tell(`${walkVm} runs at ${first.name} with the address ${address}`);
    const [device] = lab.layout.devices;
    const here = device!.addressAt(lab.site(first.name));
    const made = await first.viper.createDevice({
      body: { name: device!.name, vm: walkVm, macs: [device!.mac], addresses: [here] },
      signal,
    });
    const programs = stack.use(
      new WalkPrograms({
        lab,
        device: device!.name,
        companion: { url: first.url, caFile: first.caFile, token: made.secret },
        echo: `${address}:${echoPort}`,
        stream: `${address}:${streamPort}`,
        over:
          continuity === 'mptcp'
            ? { protocol: 'mptcp' }
            : { protocol: 'tcp', from: device!.cellular!.address },
        ...(options.onEcho ? { onEcho: options.onEcho } : {}),
        ...(options.onStream ? { onStream: options.onStream } : {}),
      }),
    );
    await programs.flows(signal);
    await until('the first report of the device', signal, async () => programs.isReporting);
    return new Walk(options, { fleet, programs, events, over, stack: stack.move() });
  }

  /** The device walks from one cloudlet to the next, and resolves when its VM serves there. */
  async handOff(from: string, to: string): Promise<Handoff> {
    const { lab, continuity, signal, tell } = this.#options;
    const [here, there] = [this.#cloudlet(from), this.#cloudlet(to)];
    const address = await addressOf(here, signal);
    const rttBeforeMs = await this.programs.ping(address);
    const known = new Set((await decisionsOf(here, signal)).map(({ id }) => id));
    const latest = async (isIt: (decision: Decision) => boolean) =>
      (await decisionsOf(here, signal)).find((each) => !known.has(each.id) && isIt(each));
    const leftMs = Date.now();
    await lab.move(this.#device, { to, gapMs: gapOfRoamMs, signal });
    tell(`${this.#device} walked from ${from} to ${to}`);
    const viaWan = this.programs.ping(address);
    const decision = await until('a decision', signal, () => latest(({ acted }) => acted));
    tell(
      `${from} decided in ${decision.tookMs.toFixed(0)} ms: ${decision.outcome} to ${decision.target?.name}`,
    );
    this.#options.onDecision?.(decision);
    const migrationId = decision.migrationId!;
    const startedMs = Date.parse(
      (await here.viper.getOperation({ params: { operation: decision.operationId! }, signal })).createdAt,
    );
    const watching = this.#watch(here, migrationId);
    const next =
      continuity === 'mptcp'
        ? await until('the next address', signal, () => this.#addressIn(there))
        : address;
    const pings = this.programs.pingAlong(next);
    const over = await until('the handoff', signal, () => latest(({ result }) => result !== undefined));
    await watching;
    if (!over.result!.moved) throw new Error(`${walkVm} did not move to ${to}: ${over.result!.message}`);
    await until(
      'the VM there',
      signal,
      async () => (await there.viper.getVm(inVm(signal))).state === 'running',
    );
    await this.programs.flows(signal);
    const settledMs = Date.now();
    const answersToPings = await pings.end();
    const rttAfterMs = await this.programs.ping(next);
    const migration = await here.viper.getMigration({ params: { migration: migrationId }, signal });
    const arrivedMs = this.programs.arrivedAfter(leftMs) ?? leftMs;
    const { downtimeMs = 0 } = migration.result!;
    const releasedMs = await this.#eventAt(from, 'migration.switching', migrationId);
    const resumedMs = await this.#eventAt(to, 'migration.arrived', migrationId);
    const changeover = { fromMs: releasedMs - downtimeMs, toMs: resumedMs + echoesMs };
    const answers = await this.programs.answers();
    const handoff: Handoff = {
      from,
      to,
      decisionMs: decision.tookMs,
      attachedToStartedMs: startedMs - arrivedMs,
      totalMs: Date.parse(migration.finishedAt!) - startedMs,
      arrivalToRunningMs: resumedMs - arrivedMs,
      downtimeMs,
      gapMs: longestSilence(answers, changeover),
      pingGapMs: longestSilence(answersToPings, changeover),
      roamGapMs: longestSilence(answers, { fromMs: leftMs, toMs: arrivedMs }),
      rttBeforeMs,
      rttViaWanMs: await viaWan,
      rttAfterMs,
      ...bytesOf(migration),
      leftMs,
      arrivedMs,
      startedMs,
      resumedMs,
      settledMs,
    };
    return handoff;
  }

  /** Ends the connections; throws if one of them broke. */
  async end(): Promise<StreamEnd> {
    const end = await this.programs.end();
    if (end.brokenBy !== undefined) throw new Error(`the connection broke: ${end.brokenBy}`);
    return end;
  }

  /** Ends the device's programs, and leaves the rest up. */
  async leave(): Promise<void> {
    await this.programs[Symbol.asyncDispose]();
    this.#over.abort();
    await this.fleet.leave();
    this.#stack.move();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#stack[Symbol.asyncDispose]();
  }

  #cloudlet(name: string): LabCloudlet {
    return this.fleet.cloudlets.find((each) => each.name === name)!;
  }

  /** The address of the VM in the LAN of that cloudlet, as soon as it has one there. */
  async #addressIn(there: LabCloudlet): Promise<string | undefined> {
    const address = await addressOf(there, this.#options.signal);
    const network = there.site!.gateway.replace(/\d+$/, '');
    return address.startsWith(network) ? address : undefined;
  }

  async #watch({ viper }: LabCloudlet, migration: string): Promise<void> {
    const { signal, onProgress } = this.#options;
    for (;;) {
      const found = await viper.getMigration({ params: { migration }, signal }).catch(() => undefined);
      onProgress?.(found?.finishedAt ? undefined : found?.progress);
      if (found?.finishedAt) return;
      await sleep(lookEveryMs * 2, undefined, { signal });
    }
  }

  async #eventAt(cloudlet: string, kind: string, migrationId: string): Promise<number> {
    const event = await until(`the event ${kind}`, this.#options.signal, async () =>
      this.#events.get(cloudlet)!.find((each) => each.kind === kind && each.data.migrationId === migrationId),
    );
    return Date.parse(event.at);
  }
}

const inVm = (signal: AbortSignal) => ({ params: { vm: walkVm }, signal });

async function addressOf({ viper }: LabCloudlet, signal: AbortSignal): Promise<string> {
  const { attachment } = await viper.getVm(inVm(signal));
  return attachment!.place.address.split('/')[0]!;
}

const decisionsOf = async ({ viper }: LabCloudlet, signal: AbortSignal): Promise<Decision[]> =>
  (await viper.listDecisions({ query: { limit: 200 }, signal })).items;

async function collect({ viper }: LabCloudlet, into: ViperEvent[], signal: AbortSignal): Promise<void> {
  for await (const event of viper.events({ after: 0, signal }))
    if (event.kind.startsWith('migration.')) into.push(event);
}

/** Of a VM that went as it is, everything that was sent had to be. */
function bytesOf({ result }: Migration): Pick<Handoff, 'sentBytes' | 'contentBytes'> {
  const { memoryBytes, diskBytes, imageBytes = 0, condensed } = result!;
  const sentBytes = memoryBytes + diskBytes + imageBytes;
  return { sentBytes, contentBytes: condensed ? condensed.guestBytes + imageBytes : sentBytes };
}

/** The VM is at the first cloudlet, with its servers; all cloudlets have its image. */
async function makeServer(cloudlets: LabCloudlet[], options: WalkOptions): Promise<void> {
  const { continuity, streamBps, signal } = options;
  const [{ viper }] = cloudlets as [LabCloudlet];
  for (const each of cloudlets)
    await each.viper.importImage({
      body: await openAsBlob(guestImage('debian')),
      query: { alias: 'debian' },
    });
  const hardware = { memoryBytes: 256 * MiB, nets: [{ network: 'lan' }, { network: 'lan' }] };
  const body = { name: walkVm, image: 'debian', instanceType: 'small', hardware, continuity };
  await viper.wait(await viper.createVm({ body, signal }), { signal });
  await until('the guest', signal, async () => (await viper.getGuest(inVm(signal))).hostname);
  const exec = (script: string, input?: string) =>
    viper.execInGuest({
      ...inVm(signal),
      body: { argv: ['/bin/sh', '-c', script], ...(input === undefined ? {} : { input }) },
    });
  await exec('cat >/root/servers.py', await readFile(new URL('probes/servers.py', import.meta.url), 'utf8'));
  const by = continuity === 'mptcp' ? 'mptcpize run ' : '';
  const start = `${by}python3 /root/servers.py ${echoPort} ${streamPort} ${streamBps}`;
  await exec(`setsid ${start} </dev/null >/run/servers.log 2>&1 & sleep 0.1`);
  await until(
    'the servers',
    signal,
    async () => (await exec('grep listening /run/servers.log')).exitCode === 0,
  );
}

/** What it asks for, once it is there. Throws after some minutes. */
async function until<T>(
  what: string,
  signal: AbortSignal,
  ask: () => Promise<T | undefined | false>,
): Promise<T> {
  const deadline = performance.now() + patienceMs;
  for (;;) {
    signal.throwIfAborted();
    const found = await ask().catch(() => undefined);
    if (found !== undefined && found !== false) return found;
    if (performance.now() > deadline) throw new Error(`waited in vain for ${what}`);
    await sleep(lookEveryMs, undefined, { signal });
  }
}
