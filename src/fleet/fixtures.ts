/** Cloudlets, their state and their servers, for the tests of the fleet. */
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import type { IncomingMessage, ServerResponse } from 'node:http';
import { createServer, type ServerOptions } from 'node:https';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Duplex } from 'node:stream';
import type { TLSSocket } from 'node:tls';
import { asAppError, httpStatus } from '../model/errors.ts';
import type { JoinTokenRecord, Peer } from '../model/fleet.ts';
import { newId } from '../model/ids.ts';
import { admitMember, type JoinRequest } from './admission.ts';
import { createSigningRequest } from './certificates.ts';
import { createCloudlet } from './founding.ts';
import { asPeer, type CloudletIdentity } from './identity.ts';
import { createJoinToken } from './join-token.ts';
import { joinFleet } from './joining.ts';
import { PeerDirectory } from './peers.ts';
import type { FleetState } from './state.ts';

export const startMs = Date.parse('2026-01-01T00:00:00.000Z');

export interface TestDirectory extends AsyncDisposable {
  path: string;
}

export async function testDirectory(): Promise<TestDirectory> {
  const path = await mkdtemp(join(tmpdir(), 'viper-fleet-'));
  return { path, [Symbol.asyncDispose]: () => rm(path, { recursive: true, force: true }) };
}

/** Keeps everything in memory; a transaction that throws is rolled back. */
export class MemoryState implements FleetState {
  #tokens = new Map<string, JoinTokenRecord>();
  #peers = new Map<string, { peer: Peer; removed: boolean }>();
  #hooks: (() => void)[] | undefined;

  readonly joinTokens: FleetState['joinTokens'] = {
    getByHash: (secretHash) => this.#tokens.get(secretHash),
    insert: (token) => void this.#tokens.set(token.secretHash, token),
    use: (id, usedBy, usedAt) => {
      const token = Array.from(this.#tokens.values()).find((each) => each.id === id);
      if (!token || token.usedAt !== undefined) return false;
      this.#tokens.set(token.secretHash, { ...token, usedBy, usedAt });
      return true;
    },
    deleteExpired: () => {},
  };

  readonly peers: FleetState['peers'] = {
    all: () => Array.from(this.#peers.values()),
    put: (peer) => void this.#peers.set(peer.id, { peer, removed: false }),
    remove: (id) => {
      const entry = this.#peers.get(id);
      if (entry) this.#peers.set(id, { ...entry, removed: true });
      return entry !== undefined;
    },
  };

  transact<T>(work: () => T): T {
    if (this.#hooks) return work();
    const before = [new Map(this.#tokens), new Map(this.#peers)] as const;
    this.#hooks = [];
    try {
      const result = work();
      for (const run of this.#hooks) run();
      return result;
    } catch (error) {
      [this.#tokens, this.#peers] = before;
      throw error;
    } finally {
      this.#hooks = undefined;
    }
  }

  afterCommit(run: () => void): void {
    if (this.#hooks) this.#hooks.push(run);
    else run();
  }
}

export interface TestCloudlet extends AsyncDisposable {
  identity: CloudletIdentity;
  state: MemoryState;
  peers: PeerDirectory;
}

/** A cloudlet that has founded a fleet of its own. */
export async function testFounder(name = 'founder', now?: () => number): Promise<TestCloudlet> {
  const directory = await testDirectory();
  const url = 'https://127.0.0.1:7443';
  const identity = await createCloudlet({ directory: directory.path, name, url, ...(now && { now }) });
  return testCloudlet(identity, directory);
}

/** A cloudlet that has joined the founder's fleet, over a server that lives just as long as that takes. */
export async function testMember(founder: TestCloudlet, name: string): Promise<TestCloudlet> {
  const directory = await testDirectory();
  await using server = await serveFounder(founder);
  const { identity, peers } = await joinFleet({
    directory: directory.path,
    name,
    url: 'https://127.0.0.1:7444',
    founderUrl: server.url,
    token: createJoinToken(founder.state, founder.identity).token,
  });
  const cloudlet = testCloudlet(identity, directory);
  cloudlet.peers.merge(peers, Date.now());
  return cloudlet;
}

function testCloudlet(identity: CloudletIdentity, directory: AsyncDisposable): TestCloudlet {
  const state = new MemoryState();
  const peers = new PeerDirectory(state, identity.id);
  return { identity, state, peers, [Symbol.asyncDispose]: () => directory[Symbol.asyncDispose]() };
}

/** What a member is asked to send. */
export async function joinRequest(
  token: string,
  key: string,
  overrides: Partial<JoinRequest> = {},
): Promise<JoinRequest> {
  const csr = await createSigningRequest('member', key);
  return { token, id: newId(), name: 'member', url: 'https://member.example:7443', csr, ...overrides };
}

export type Answer = (request: {
  method: string;
  path: string;
  body: unknown;
  socket: TLSSocket;
}) => unknown | Promise<unknown>;

export interface TestServer extends AsyncDisposable {
  url: string;
  /** Bytes that came after a TLS handshake. */
  receivedBytes(): number;
}

/** A TLS 1.3 server that answers in JSON what `answer` gives or throws. */
export async function testServer(tls: ServerOptions, answer: Answer): Promise<TestServer> {
  let receivedBytes = 0;
  const sockets = new Set<Duplex>();
  const options = { ...tls, minVersion: 'TLSv1.3' as const, requestCert: true, rejectUnauthorized: false };
  const server = createServer(options, (request, response) => void respond(request, response, answer));
  server.on('connection', (socket) => sockets.add(socket));
  server.on('secureConnection', (socket: TLSSocket) => {
    socket.on('data', (bytes: Buffer) => {
      receivedBytes += bytes.length;
    });
    socket.on('error', () => {});
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return {
    url: `https://127.0.0.1:${(server.address() as AddressInfo).port}`,
    receivedBytes: () => receivedBytes,
    async [Symbol.asyncDispose]() {
      if (!server.listening) return;
      const closed = once(server, 'close');
      server.close();
      for (const socket of sockets) socket.destroy();
      await closed;
    },
  };
}

/** The founder's route that admits members. */
export const serveFounder = (founder: TestCloudlet): Promise<TestServer> =>
  testServer(founder.identity.tls, ({ body }) => admitMember(founder, body as JoinRequest));

export const peerAt = (cloudlet: TestCloudlet, url: string): Peer => ({ ...asPeer(cloudlet.identity), url });

async function respond(request: IncomingMessage, response: ServerResponse, answer: Answer): Promise<void> {
  const chunks: Buffer[] = await request.toArray();
  const text = Buffer.concat(chunks).toString();
  try {
    const { method = '', url: path = '' } = request;
    const body = text === '' ? undefined : JSON.parse(text);
    const reply = await answer({ method, path, body, socket: request.socket as TLSSocket });
    response.writeHead(200, { 'content-type': 'application/json' }).end(JSON.stringify(reply));
  } catch (thrown) {
    const { code, message, details } = asAppError(thrown);
    response.writeHead(httpStatus(code)).end(JSON.stringify({ error: { code, message, details } }));
  }
}
