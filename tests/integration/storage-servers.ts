/**
 * Storage servers for tests: NFS-Ganesha and GlusterFS, both in user space, in a network namespace of their own with
 * an address on a link to ours. They serve a directory below the one that they are given, and see a /run of their own,
 * so that several tests and the machine's own servers do not meet. Needs root.
 */
import { type ChildProcess, execFile, execFileSync, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { access, mkdir, readFile, writeFile } from 'node:fs/promises';
import { createConnection } from 'node:net';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';

const execute = promisify(execFile);
const startTimeoutMs = 60_000;

export class StorageHost implements AsyncDisposable {
  readonly address: string;
  readonly #namespace: string;
  readonly #made: AsyncDisposableStack;

  private constructor(namespace: string, address: string, made: AsyncDisposableStack) {
    this.#namespace = namespace;
    this.address = address;
    this.#made = made;
  }

  static async make(): Promise<StorageHost> {
    const id = randomBytes(3).toString('hex');
    const [namespace, ours, theirs] = [`viper-st-${id}`, `vst${id}h`, `vst${id}s`];
    // One of the 16384 networks of two addresses in 10.213.0.0/16.
    const number = randomBytes(2).readUInt16BE() & 0xfffc;
    const [near, far] = [number + 1, number + 2].map((one) => `10.213.${one >> 8}.${one & 0xff}`);
    await using made = new AsyncDisposableStack();
    await execute('ip', ['netns', 'add', namespace]);
    made.defer(async () => void (await execute('ip', ['netns', 'del', namespace])));
    await execute('ip', ['link', 'add', ours, 'type', 'veth', 'peer', 'name', theirs, 'netns', namespace]);
    await execute('ip', ['addr', 'add', `${near}/30`, 'dev', ours]);
    await execute('ip', ['link', 'set', ours, 'up']);
    await execute('ip', ['-n', namespace, 'addr', 'add', `${far}/30`, 'dev', theirs]);
    for (const device of [theirs, 'lo']) await execute('ip', ['-n', namespace, 'link', 'set', device, 'up']);
    // Also when the test is killed by a signal that it can hear.
    process.once('exit', () => sweep(namespace));
    return new StorageHost(namespace, far!, made.move());
  }

  /** An NFS server; the answer is the URL of an export whose files are in `directory`/export. */
  async serveNfs(directory: string): Promise<string> {
    await mkdir(path.join(directory, 'export'), { recursive: true });
    const file = path.join(directory, 'ganesha.conf');
    await writeFile(file, ganeshaConfig(directory));
    // QEMU has no word for ports, so the portmapper has to tell them.
    await this.#run(directory, ['rpcbind', '-f', '-w'], 111);
    const files = ['-f', file, '-L', path.join(directory, 'ganesha.log'), '-p', path.join(directory, 'pid')];
    await this.#run(directory, ['ganesha.nfsd', '-F', ...files], 2049);
    return `nfs://${this.address}/export`;
  }

  /** A Gluster server; the answer is the URL of a volume whose files are in `directory`/brick. */
  async serveGluster(directory: string): Promise<string> {
    const work = path.join(directory, 'glusterd');
    await mkdir(work, { recursive: true });
    const file = path.join(directory, 'glusterd.vol');
    const config = await readFile('/etc/glusterfs/glusterd.vol', 'utf8');
    await writeFile(file, config.replace(/option working-directory .*/, `option working-directory ${work}`));
    const files = ['-f', file, '-l', path.join(directory, 'glusterd.log'), '-p', path.join(directory, 'pid')];
    await this.#run(directory, ['glusterd', '-N', ...files], 24007);
    const brick = `${this.address}:${path.join(directory, 'brick')}`;
    const gluster = (...argv: string[]) =>
      execute('ip', this.#inside(directory, ['gluster', '--mode=script', ...argv]), {
        timeout: startTimeoutMs,
      });
    await gluster('volume', 'create', 'disks', brick, 'force');
    await gluster('volume', 'start', 'disks');
    // Its brick is a daemon of its own.
    this.#made.defer(async () => void (await gluster('volume', 'stop', 'disks', 'force')));
    return `gluster://${this.address}/disks`;
  }

  /** Arguments for `ip` that run a program there. */
  #inside(directory: string, argv: string[]): string[] {
    const withOwnRun = 'mount --bind "$1" /run && shift && exec "$@"';
    const run = ['unshare', '--mount', 'sh', '-c', withOwnRun, 'sh', path.join(directory, 'run')];
    return ['netns', 'exec', this.#namespace, ...run, ...argv];
  }

  /** Runs it in the namespace until the end; resolves when it listens. */
  async #run(directory: string, argv: string[], port: number): Promise<void> {
    for (const each of ['run', 'run/ganesha', 'run/gluster'])
      await mkdir(path.join(directory, each), { recursive: true });
    const child = spawn('ip', this.#inside(directory, argv), { stdio: 'ignore' });
    this.#made.defer(() => end(child));
    for (const deadline = Date.now() + startTimeoutMs; !(await listens(this.address, port)); ) {
      if (child.exitCode !== null || Date.now() > deadline)
        throw new Error(`${argv[0]} does not listen on port ${port}`);
      await sleep(50);
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#made.disposeAsync();
  }
}

/** Why there can be no such server here; undefined if there can. */
export async function whyNot(program: string, blockDriver: string): Promise<string | undefined> {
  if (process.getuid?.() !== 0) return 'a network namespace takes root';
  const directories = ['/usr/sbin', '/usr/bin', '/sbin', '/bin'];
  const found = await Promise.allSettled(directories.map((each) => access(path.join(each, program))));
  if (!found.some(({ status }) => status === 'fulfilled')) return `${program} is not installed`;
  const node = `json:${JSON.stringify({ driver: blockDriver })}`;
  const { stderr } = await execute('qemu-img', ['info', node]).catch((error: { stderr: string }) => error);
  return stderr.includes('Unknown driver') ? `QEMU has no driver ${blockDriver} here` : undefined;
}

/** What can be done while the process ends: nothing that waits. */
function sweep(namespace: string): void {
  try {
    const pids = execFileSync('ip', ['netns', 'pids', namespace], { encoding: 'utf8', stdio: 'pipe' });
    for (const pid of pids.split('\n').filter(Boolean)) process.kill(Number(pid), 'SIGKILL');
    execFileSync('ip', ['netns', 'del', namespace], { stdio: 'pipe' });
  } catch {
    // It has been taken down as it should.
  }
}

async function end(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const ended = once(child, 'exit');
  child.kill('SIGTERM');
  const forced = setTimeout(() => child.kill('SIGKILL'), 5000);
  await ended;
  clearTimeout(forced);
}

async function listens(host: string, port: number): Promise<boolean> {
  const socket = createConnection({ host, port });
  try {
    await once(socket, 'connect');
    return true;
  } catch {
    return false;
  } finally {
    socket.destroy();
  }
}

const ganeshaConfig = (directory: string): string => `
NFS_CORE_PARAM { Enable_NLM = false; Enable_RQUOTA = false; Protocols = 3; mount_path_pseudo = true; }
NFSv4 { Graceless = true; RecoveryBackend = fs; RecoveryRoot = "${directory}"; }
NFS_KRB5 { Active_krb5 = false; }
EXPORT {
  Export_Id = 1; Path = "${directory}/export"; Pseudo = /export; Access_Type = RW; Squash = No_Root_Squash;
  SecType = sys; Protocols = 3; Transports = TCP; FSAL { Name = VFS; }
}
`;
