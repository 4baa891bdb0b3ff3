/**
 * How much of Node's TLS a session leaves: the same bytes over a bare TLS socket and over a session, by turns in one
 * run, from one process to another on loopback; and what each cipher of TLS 1.3 costs. For people:
 *
 *   node src/link/bench.ts [bytes] [turns]
 */
import { fork } from 'node:child_process';
import { once } from 'node:events';
import { createServer as createHttpsServer } from 'node:https';
import type { AddressInfo } from 'node:net';
import type { Duplex } from 'node:stream';
import { connect, createServer as createTlsServer } from 'node:tls';
import { attachLink } from './attach-link.ts';
import type { LinkCredentials } from './connect.ts';
import { fakeFleet, identifyFake } from './fake-fleet.ts';
import { openSession } from './open-session.ts';
import { serverAlpnProtocols } from './purposes.ts';

const fastest = 'TLS_AES_128_GCM_SHA256';
const ciphers = [fastest, 'TLS_AES_256_GCM_SHA384', 'TLS_CHACHA20_POLY1305_SHA256'];
/** As QEMU's unix sockets are read. */
const chunk = Buffer.alloc(64 * 1024, 7);

interface Cost {
  bytesPerS: number;
  /** CPU time of sender and receiver per gigabyte. */
  cpuMs: number;
}

const cpuMs = (): number => {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1000;
};

/** The receiving process: swallows what comes and tells how much CPU time that took. */
async function receive(totalBytes: number): Promise<void> {
  const [credentials] = (await once(process, 'message')) as [LinkCredentials];
  const swallow = (stream: Duplex): void => {
    const startMs = cpuMs();
    let left = totalBytes;
    stream.on('error', () => {});
    stream.on('data', (bytes: Buffer) => {
      left -= bytes.length;
      if (left > 0 || left + bytes.length <= 0) return;
      process.send?.({ cpuMs: cpuMs() - startMs });
    });
    stream.on('end', () => stream.end());
  };
  const bare = createTlsServer({ ...credentials, minVersion: 'TLSv1.3' }, swallow);
  const link = createHttpsServer({
    ...credentials,
    ALPNProtocols: [...serverAlpnProtocols],
    requestCert: true,
    rejectUnauthorized: false,
  });
  attachLink(link, { identify: identifyFake, accept: () => ({ onSession: swallow }) });
  for (const server of [bare, link]) await once(server.listen(0, '127.0.0.1'), 'listening');
  process.send?.({
    barePort: (bare.address() as AddressInfo).port,
    linkPort: (link.address() as AddressInfo).port,
  });
  process.on('disconnect', () => process.exit());
}

async function send(totalBytes: number, turns: number): Promise<void> {
  const fleet = await fakeFleet();
  const tls = await fleet.issue('a');
  const receiver = fork(import.meta.filename, [String(totalBytes), 'receive']);
  receiver.send(await fleet.issue('b'));
  const [{ barePort, linkPort }] = (await once(receiver, 'message')) as [
    { barePort: number; linkPort: number },
  ];

  const measure = async (stream: Duplex): Promise<Cost> => {
    const startMs = performance.now();
    const startCpuMs = cpuMs();
    const received = once(receiver, 'message');
    for (let left = totalBytes; left > 0; left -= chunk.length) {
      if (!stream.write(chunk)) await once(stream, 'drain');
    }
    const [{ cpuMs: receiverCpuMs }] = (await received) as [{ cpuMs: number }];
    const seconds = (performance.now() - startMs) / 1000;
    const gigabytes = totalBytes / 1e9;
    return { bytesPerS: totalBytes / seconds, cpuMs: (cpuMs() - startCpuMs + receiverCpuMs) / gigabytes };
  };
  const bare = async (cipher: string): Promise<Cost> => {
    const options = { host: '127.0.0.1', port: barePort, ciphers: cipher, minVersion: 'TLSv1.3' as const };
    const socket = connect({ ...options, ...tls, checkServerIdentity: () => undefined });
    await once(socket, 'secureConnect');
    const cost = await measure(socket);
    socket.destroy();
    return cost;
  };
  const session = async (): Promise<Cost> => {
    const url = `https://127.0.0.1:${linkPort}`;
    const opened = await openSession({
      url,
      tls,
      expectCloudletId: 'b',
      identify: identifyFake,
      purpose: 'viper-memory/1',
      hello: {},
    });
    const cost = await measure(opened);
    await opened.abandon();
    return cost;
  };

  const costs = new Map<string, Cost[]>();
  const keep = (name: string, cost: Cost) => costs.set(name, [...(costs.get(name) ?? []), cost]);
  for (let turn = 0; turn < turns; turn += 1) {
    keep('session', await session());
    for (const cipher of ciphers) keep(cipher, await bare(cipher));
  }
  for (const [name, each] of costs) {
    const rate = median(each.map(({ bytesPerS }) => bytesPerS)) / 1e9;
    console.log(
      `${name.padEnd(30)} ${rate.toFixed(2)} GB/s, ${median(each.map((cost) => cost.cpuMs)).toFixed(0)} ms CPU per GB`,
    );
  }
  const ratioOf = (pick: (cost: Cost) => number): string =>
    median(costs.get('session')!.map((cost, turn) => pick(cost) / pick(costs.get(fastest)![turn]!))).toFixed(
      2,
    );
  console.log(
    `session / bare: ${ratioOf((cost) => cost.bytesPerS)} of the rate, ${ratioOf((cost) => cost.cpuMs)} of the CPU time`,
  );
  receiver.disconnect();
}

const median = (values: number[]): number => values.sort((a, b) => a - b)[values.length >> 1]!;

const totalBytes = Number(process.argv[2] ?? 1e9);
if (process.argv[3] === 'receive') await receive(totalBytes);
else await send(totalBytes, Number(process.argv[3] ?? 5));
