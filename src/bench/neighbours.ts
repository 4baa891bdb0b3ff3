/**
 * What it costs a cloudlet to keep its neighbour database fresh: one round of probes to so many neighbours, and the
 * answers to as many that measure it, with the database on disk. The neighbours are in a process of their own.
 */
import { type ChildProcess, fork } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import pino from 'pino';
import { followConfig } from '../daemon/follow/config.ts';
import { Echo } from '../daemon/follow/echo.ts';
import { Neighbours } from '../daemon/follow/neighbours.ts';
import { Store } from '../daemon/store/index.ts';
import type { Peer } from '../model/fleet.ts';
import { newId, type Uuid } from '../model/ids.ts';

export interface RefreshCost {
  neighbours: number;
  /** CPU time of one refresh, asking and answering. */
  cpuMs: number;
  /** Share of one core at one refresh a minute. */
  coreShare: number;
  /** Neighbours that were reached. */
  reached: number;
}

const probesEach = 4;

/** The mean of some rounds, after a first one for what is done once. */
export async function measureRefresh(count = 100, rounds = 5): Promise<RefreshCost> {
  const directory = await mkdtemp(path.join(tmpdir(), 'viper-bench-'));
  const ownId = newId();
  const neighbours = fork(import.meta.filename, ['neighbours', ownId, String(count)], {
    serialization: 'json',
  });
  await using cleanup = new AsyncDisposableStack();
  cleanup.defer(() => rm(directory, { recursive: true, force: true }));
  cleanup.defer(() => void neighbours.kill('SIGKILL'));
  const [hosts] = (await once(neighbours, 'message')) as [{ id: Uuid; port: number; key: string }[]];
  using store = new Store(directory);
  const known = new Map(hosts.map((host) => [host.id, host]));
  const echo = cleanup.use(new Echo({ ownId, isPeer: (id) => known.has(id) }));
  await echo.listen({ host: '127.0.0.1', port: 0 });
  const database = new Neighbours({
    fleet: fakeFleet(known) as never,
    store,
    echo,
    config: followConfig(),
    log: pino({ level: 'silent' }),
    greeting: () => ({ lans: ['10.0.0.0/24'] }),
  });
  const round = async () => {
    const answered = askedBy(neighbours, {
      port: echo.port!,
      keys: hosts.map(({ id }) => keyText(echo, id)),
    });
    await database.measureAll();
    await answered;
  };
  await round();
  const before = process.cpuUsage();
  for (let i = 0; i < rounds; i += 1) await round();
  const { user, system } = process.cpuUsage(before);
  const cpuMs = (user + system) / 1000 / rounds;
  const reached = database.all().filter(({ neighbour }) => neighbour.rtt.samples > probesEach).length;
  return { neighbours: count, cpuMs, coreShare: cpuMs / 60_000, reached };
}

const keyText = (echo: Echo, id: Uuid): string => echo.keyFor(id).toString('base64url');

function fakeFleet(known: Map<Uuid, { id: Uuid; port: number; key: string }>) {
  const peers = [...known.keys()].map(
    (id, index): Peer => ({
      id,
      name: `n${index}`,
      url: 'https://127.0.0.1:1',
      certificateFingerprint: '0'.repeat(64),
      joinedAt: new Date(0).toISOString(),
    }),
  );
  return {
    peers: () => [...peers],
    directory: { get: (id: Uuid) => known.get(id) },
    // Keys are exchanged once in ten minutes, over HTTPS; that is the cost of the fleet's directory, not of this.
    client: {
      fetch: async ({ id }: Peer) => {
        const { port, key } = known.get(id)!;
        return { lans: ['10.1.0.0/24'], echo: { port, key } };
      },
    },
  };
}

/** Lets all neighbours measure the way to here, each with its key. */
async function askedBy(neighbours: ChildProcess, target: { port: number; keys: string[] }): Promise<void> {
  const done = once(neighbours, 'message');
  neighbours.send(target);
  await done;
}

/** The other process: so many cloudlets that answer, and ask when they are told to. */
async function beNeighbours(askerId: Uuid, count: number): Promise<void> {
  const echoes = Array.from({ length: count }, () => {
    const id = newId();
    return { id, echo: new Echo({ ownId: id, isPeer: (peer) => peer === askerId }) };
  });
  for (const { echo } of echoes) await echo.listen({ host: '127.0.0.1', port: 0 });
  process.on('message', async ({ port, keys }: { port: number; keys: string[] }) => {
    const pace = { count: probesEach, gapMs: 40, timeoutMs: 1000 };
    const ask = ({ echo }: { echo: Echo }, index: number) =>
      echo.probe({ address: '127.0.0.1', port, key: Buffer.from(keys[index]!, 'base64url') }, pace);
    await Promise.all(echoes.map(ask));
    process.send!('done');
  });
  process.send!(echoes.map(({ id, echo }) => ({ id, port: echo.port, key: keyText(echo, askerId) })));
}

if (process.argv[2] === 'neighbours' && process.send)
  await beNeighbours(process.argv[3]!, Number(process.argv[4]));
else if (import.meta.main) console.log(JSON.stringify(await measureRefresh(Number(process.argv[2] ?? 100))));
