/**
 * A small fleet on this machine: real daemons as processes of their own, each with its state in a directory
 * under one root. Demo, tests and benches run on it. When it is disposed nothing is left: no daemon, no guest,
 * no file. Its daemons are all on the host's loopback, or, on a lab, each in the network of its own cloudlet.
 */
import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { randomInt } from 'node:crypto';
import { once } from 'node:events';
import { mkdtemp, open, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import type { Command } from '../network/index.ts';
import { connectNode, type NodeViper } from '../sdk/node.ts';
import type { Lab } from './lab.ts';
import { daemonPort, lanBridge, type Site } from './layout.ts';
import { LinkProxy } from './link-proxy.ts';
import { inNamespace } from './namespaces.ts';

const program = path.resolve(import.meta.dirname, '../daemon/main.ts');
const launcher = path.resolve(import.meta.dirname, '../../bin/viper');
const startTimeoutMs = 60_000;
const stopTimeoutMs = 20_000;

/** What `viper init --json` and `viper join --json` print. */
interface Made {
  id: string;
  name: string;
  url: string;
  caFile: string;
  token: string;
}

export interface LabOptions {
  /** Of its daemon, and so of its guests. */
  env?: Record<string, string>;
  /** Other cloudlets reach it only through a `LinkProxy`; `viper` does not go through it. */
  proxied?: boolean;
  /** Where it is in a lab; its guests then have the network `lan`, which is the LAN there. */
  site?: Site;
}

export class LabCloudlet {
  readonly name: string;
  readonly id: string;
  readonly url: string;
  readonly token: string;
  readonly caFile: string;
  /** PEM of the fleet's CA. */
  readonly ca: string;
  readonly directory: string;
  readonly viper: NodeViper;
  readonly link: LinkProxy | undefined;
  readonly site: Site | undefined;
  readonly #env: Record<string, string>;
  #daemon: ChildProcess | undefined;

  private constructor(
    directory: string,
    made: Made,
    ca: string,
    { near, link, env = {}, site }: { near: string; link: LinkProxy | undefined } & LabOptions,
  ) {
    this.directory = directory;
    this.link = link;
    this.site = site;
    this.#env = env;
    this.name = made.name;
    this.id = made.id;
    this.url = made.url;
    this.token = made.token;
    this.caFile = made.caFile;
    this.ca = ca;
    this.viper = connectNode({ url: near, token: made.token, ca });
  }

  /**
   * Makes the cloudlet and starts its daemon. `joining`: a cloudlet of the fleet that it joins. `config`: what
   * its `config.json` says beside the address.
   */
  static async make(
    root: string,
    name: string,
    joining?: LabCloudlet,
    config: object = {},
    options: LabOptions = {},
  ): Promise<LabCloudlet> {
    const directory = path.join(root, name);
    const { site } = options;
    const port = site ? daemonPort : await freePort();
    const listen = `${site ? '0.0.0.0' : '127.0.0.1'}:${port}`;
    // By which `viper` reaches it, and by which all others do.
    const near = site?.url ?? `https://127.0.0.1:${port}`;
    const link = options.proxied ? await LinkProxy.listen() : undefined;
    link?.leadTo(port);
    const url = link ? `https://127.0.0.1:${link.port}` : near;
    const common = ['--state', directory, '--name', name, '--listen', listen, '--url', url, '--json'];
    const made = joining
      ? await runProgram(site, ['join', joining.url, ...common], {
          VIPER_JOIN_TOKEN: (await joining.viper.createJoinToken({ body: {} })).token,
        })
      : await runProgram(site, ['init', ...common]);
    const networks = site ? { networks: [lanOf(site)] } : {};
    await writeFile(path.join(directory, 'config.json'), JSON.stringify({ listen, ...networks, ...config }));
    const ca = await readFile(made.caFile, 'utf8');
    const cloudlet = new LabCloudlet(directory, made, ca, { ...options, near, link });
    await cloudlet.start();
    return cloudlet;
  }

  get pid(): number | undefined {
    return this.#daemon?.pid;
  }

  /** Starts the daemon and waits until it answers. */
  async start(): Promise<void> {
    const log = await open(path.join(this.directory, 'daemon.log'), 'a', 0o600);
    const [file, ...args] = commandAt(this.site, [launcher, 'daemon', '--state', this.directory]);
    const daemon = spawn(file, args, {
      stdio: ['ignore', log.fd, log.fd],
      env: { ...process.env, ...this.#env },
      // On a lab it may outlive this process, and the terminal.
      detached: this.site !== undefined,
    });
    await log.close();
    this.#daemon = daemon;
    const signal = AbortSignal.timeout(startTimeoutMs);
    for (;;) {
      if (daemon.exitCode !== null || daemon.signalCode !== null) {
        throw new Error(`the daemon of ${this.name} ended at its start:\n${await this.#logTail()}`);
      }
      try {
        await this.viper.getHealth({ signal });
        return;
      } catch {
        if (signal.aborted)
          throw new Error(`the daemon of ${this.name} does not answer:\n${await this.#logTail()}`);
        await sleep(50);
      }
    }
  }

  async #logTail(): Promise<string> {
    return (await readFile(path.join(this.directory, 'daemon.log'), 'utf8')).slice(-2000);
  }

  /** Ends the daemon; its guests run on. */
  async stop(signal: 'SIGTERM' | 'SIGKILL' = 'SIGTERM'): Promise<void> {
    const daemon = this.#daemon;
    this.#daemon = undefined;
    if (!daemon || daemon.exitCode !== null || daemon.signalCode !== null) return;
    const ended = once(daemon, 'exit');
    daemon.kill(signal);
    const forced = setTimeout(() => daemon.kill('SIGKILL'), stopTimeoutMs);
    await ended;
    clearTimeout(forced);
  }

  /** Lets go of a daemon that runs on. */
  async leave(): Promise<void> {
    this.#daemon?.unref();
    await this.viper.close();
  }
}

export class LabFleet implements AsyncDisposable {
  readonly root: string;
  readonly cloudlets: LabCloudlet[] = [];
  readonly #lab: Lab | undefined;

  private constructor(root: string, lab?: Lab) {
    this.root = root;
    this.#lab = lab;
  }

  /** On a lab: each cloudlet at the place of its name there. The lab is whoever made it to take down. */
  static async create(lab?: Lab): Promise<LabFleet> {
    if (lab) return new LabFleet(lab.directory, lab);
    // Short: the sockets of QEMU lie in it, and their paths have a bound.
    return new LabFleet(await mkdtemp(path.join(tmpdir(), 'viper-')));
  }

  /** The first cloudlet founds the fleet, each further one joins it. */
  async add(name: string, config?: object, options?: LabOptions): Promise<LabCloudlet> {
    const cloudlet = await LabCloudlet.make(this.root, name, this.cloudlets[0], config, {
      ...(this.#lab ? { site: this.#lab.site(name) } : {}),
      ...options,
    });
    this.cloudlets.push(cloudlet);
    return cloudlet;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    // A second time there is nothing to do.
    const cloudlets = this.cloudlets.splice(0);
    await Promise.all(cloudlets.map((cloudlet) => cloudlet.stop()));
    await endQemusUnder(this.root);
    for (const { viper, link } of cloudlets) {
      await viper[Symbol.asyncDispose]();
      await link?.[Symbol.asyncDispose]();
    }
    if (!this.#lab) await rm(this.root, { recursive: true, force: true });
    else for (const { directory } of cloudlets) await rm(directory, { recursive: true, force: true });
  }

  /** Lets go of daemons and guests, which run on until their lab is taken down. */
  async leave(): Promise<void> {
    for (const cloudlet of this.cloudlets) await cloudlet.leave();
  }
}

/** Every QEMU whose command line names the root is one that a daemon of this fleet started. */
async function endQemusUnder(root: string): Promise<void> {
  for (const entry of await readdir('/proc')) {
    if (!/^\d+$/.test(entry)) continue;
    const argv = await readFile(`/proc/${entry}/cmdline`, 'utf8').catch(() => '');
    if (!argv.split('\0')[0]!.includes('qemu-system') || !argv.includes(`${root}/`)) continue;
    try {
      process.kill(Number(entry), 'SIGKILL');
    } catch {
      // It ended by itself meanwhile.
    }
  }
}

/** From .100 to .199 they are for VMs that nobody gives another; devices have those above. */
const lanOf = ({ lan, gateway }: Site) => {
  const [from, to] = ['100', '199'].map((last) => gateway.replace(/\d+$/, last));
  return { name: 'lan', kind: 'bridge', bridge: lanBridge, addresses: { subnet: lan, gateway, from, to } };
};

const commandAt = (site: Site | undefined, command: Command): Command =>
  site ? inNamespace(site.namespace, command) : command;

async function runProgram(
  site: Site | undefined,
  argv: string[],
  env: Record<string, string> = {},
): Promise<Made> {
  const [file, ...args] = commandAt(site, [process.execPath, program, ...argv]);
  const { stdout } = await promisify(execFile)(file, args, {
    env: { ...process.env, ...env },
  });
  return JSON.parse(stdout);
}

const mostPortTries = 100;

/**
 * Below those that the kernel gives to connections: one of them could have the port of a daemon that is down for a
 * moment.
 */
async function freePort(): Promise<number> {
  for (let tries = 0; tries < mostPortTries; tries += 1) {
    const port = randomInt(20_000, 32_000);
    const server = createServer().listen(port, '127.0.0.1');
    try {
      await once(server, 'listening');
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'EADDRINUSE') continue;
      throw error;
    }
    server.close();
    await once(server, 'close');
    return port;
  }
  throw new Error(`no free port in ${mostPortTries} tries`);
}
