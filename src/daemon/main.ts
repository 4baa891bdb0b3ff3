/**
 * The daemon program: `init` and `join` make a cloudlet, `serve` runs it until it is told to stop. The CLI starts
 * it; a service manager may do so directly. Guests live on when it ends, however it ends.
 */
import { writeFile } from 'node:fs/promises';
import { isIPv6 } from 'node:net';
import path from 'node:path';
import { parseArgs } from 'node:util';
import pino from 'pino';
import { type CloudletIdentity, createCloudlet, joinFleet, PeerDirectory } from '../fleet/index.ts';
import { AppError, asAppError } from '../model/errors.ts';
import type { Peer } from '../model/fleet.ts';
import { namePattern, type Uuid } from '../model/ids.ts';
import { Cloudlet } from './cloudlet.ts';
import { defaultListen } from './config.ts';
import { Credentials } from './credentials.ts';
import { serve } from './http/server.ts';
import { LogOutput } from './log-output.ts';
import { Store } from './store/index.ts';

const usage = `Usage:
  init  --state DIR --name NAME [--listen HOST:PORT] [--url URL] [--json]
  join  URL --token TOKEN --state DIR --name NAME [--listen HOST:PORT] [--url URL] [--json]
  serve --state DIR [--listen HOST:PORT]
  admin-token --state DIR      a new admin token, while no daemon runs
VIPER_STATE and VIPER_JOIN_TOKEN stand in for --state and --token, VIPER_LOG is the log level.`;

interface Arguments {
  command: string;
  founderUrl: string | undefined;
  state: string;
  name: string | undefined;
  listen: string | undefined;
  url: string | undefined;
  token: string | undefined;
  json: boolean;
}

function bad(option: string, value: string | undefined, wanted: string): AppError {
  return new AppError(
    'invalid_request',
    `${option} is ${value === undefined ? 'missing' : `'${value}'`}, wanted ${wanted}`,
  );
}

function parse(argv: string[]): Arguments {
  const { values, positionals } = parseArgs({
    args: argv,
    allowPositionals: true,
    options: {
      state: { type: 'string' },
      name: { type: 'string' },
      listen: { type: 'string' },
      url: { type: 'string' },
      token: { type: 'string' },
      json: { type: 'boolean', default: false },
    },
  });
  const [command = '', founderUrl] = positionals;
  const state = values.state ?? process.env.VIPER_STATE;
  if (!state) throw bad('--state', undefined, 'the state directory of the cloudlet');
  return {
    command,
    founderUrl,
    state: path.resolve(state),
    name: values.name,
    listen: values.listen,
    url: values.url,
    token: values.token ?? process.env.VIPER_JOIN_TOKEN,
    json: values.json,
  };
}

function parseListen(text: string): { host: string; port: number } {
  const match = /^(?:\[([0-9a-fA-F:]+)\]|([^:]+)):(\d{1,5})$/.exec(text);
  const port = Number(match?.[3]);
  if (!match || port > 65_535) throw bad('--listen', text, 'HOST:PORT, such as 127.0.0.1:7443 or [::]:7443');
  return { host: match[1] ?? match[2]!, port };
}

/** Where others reach a daemon that listens there; one that listens everywhere must be told its name. */
function urlFor(listen: { host: string; port: number }): string {
  if (listen.host === '0.0.0.0' || listen.host === '::') {
    throw bad(
      '--url',
      undefined,
      `the URL at which others reach this cloudlet, as it listens on ${listen.host}`,
    );
  }
  return `https://${isIPv6(listen.host) ? `[${listen.host}]` : listen.host}:${listen.port}`;
}

interface Wanted {
  directory: string;
  name: string;
  url: string;
}

function wantedCloudlet({
  state,
  name,
  listen = defaultListen,
  url,
}: Arguments): Wanted & { listen: string } {
  if (!name || !new RegExp(namePattern).test(name))
    throw bad('--name', name, 'a-z, 0-9 and hyphens, at most 63');
  return { directory: state, name, url: url ?? urlFor(parseListen(listen)), listen };
}

function firstAdminToken(directory: string, cloudletId: Uuid, peers: readonly Peer[]): string {
  using store = new Store(directory);
  new PeerDirectory(store, cloudletId).merge(peers, Date.now());
  return Credentials.createFirst(store).secret!;
}

/** A new admin credential, made where nobody has to be asked: with the state directory at hand, daemon off. */
function newAdminToken(directory: string): string {
  using store = new Store(directory);
  const name = `admin-${new Date().toISOString()}`;
  return new Credentials({ store }).create({ name, scopes: ['admin'] }).secret!;
}

interface Made {
  identity: CloudletIdentity;
  /** The fleet that it has joined. */
  peers: Peer[];
}

async function make(args: Arguments, create: (wanted: Wanted) => Promise<Made>): Promise<void> {
  const { listen, ...wanted } = wantedCloudlet(args);
  const { identity, peers } = await create(wanted);
  await writeFile(path.join(args.state, 'config.json'), `${JSON.stringify({ listen }, null, 2)}\n`, {
    mode: 0o600,
  });
  const token = firstAdminToken(args.state, identity.id, peers);
  const { id, name, url, caFingerprint } = identity;
  const caFile = path.join(args.state, 'identity', 'ca.crt');
  const made = { id, name, url, caFile, caFingerprint, token };
  if (args.json) return console.log(JSON.stringify(made));
  console.log(`Cloudlet ${name} (${id})
  API            ${url}   docs at ${url}/docs
  admin token    ${made.token}   (shown this once)
  fleet CA       ${caFile}
                 SHA-256 ${made.caFingerprint}
Start it with: viper daemon --state ${args.state}
Then, for example: curl --cacert ${caFile} -H "Authorization: Bearer $TOKEN" ${url}/v1/cloudlet`);
}

async function run(args: Arguments): Promise<void> {
  const log = pino({ level: process.env.VIPER_LOG ?? 'info' }, new LogOutput());
  await using cloudlet = await Cloudlet.open({ directory: args.state, log });
  const { host, port } = parseListen(args.listen ?? cloudlet.config.listen);
  await using listening = await serve(cloudlet, { host, port });
  log.info({ url: listening.url, cloudletId: cloudlet.identity.id, name: cloudlet.identity.name }, 'serving');
  const ending = Promise.withResolvers<string>();
  for (const signal of ['SIGTERM', 'SIGINT'] as const) process.once(signal, () => ending.resolve(signal));
  log.info({ signal: await ending.promise }, 'ending; guests run on');
}

async function main(): Promise<void> {
  const [command] = process.argv.slice(2);
  if (!command || ['help', '--help', '-h'].includes(command)) return console.log(usage);
  const args = parse(process.argv.slice(2));
  switch (args.command) {
    case 'init':
      return make(args, async (wanted) => ({ identity: await createCloudlet(wanted), peers: [] }));
    case 'join': {
      const { founderUrl, token } = args;
      if (!founderUrl) throw bad('URL', undefined, 'the URL of the cloudlet that founded the fleet');
      if (!token) throw bad('--token', undefined, 'a join token, made there with `viper join-token`');
      return make(args, (wanted) => joinFleet({ ...wanted, founderUrl, token }));
    }
    case 'admin-token':
      return console.log(newAdminToken(args.state));
    case 'serve':
      return run(args);
    default:
      throw bad('the command', args.command, 'init, join, serve or admin-token');
  }
}

try {
  await main();
} catch (error) {
  const known = asAppError(error);
  // A refusal is told in one line; a bug with its stack.
  console.error(known.code === 'internal' ? error : `viper: ${known.message}`);
  process.exitCode = known.code === 'invalid_request' ? 2 : 1;
}
// Left to end by itself, Node 24 may wait for good, with all of a core, for writes of TLS sockets that are gone.
process.exit();
