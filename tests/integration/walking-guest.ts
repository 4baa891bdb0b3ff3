/**
 * Two cloudlets of a lab, a Debian guest with the servers of the probes that begins at the first, and a phone that walks:
 * what tests of connections share, since the guest takes its time to boot.
 */
import assert from 'node:assert/strict';
import type { ChildProcess } from 'node:child_process';
import { openAsBlob, readFileSync } from 'node:fs';
import path from 'node:path';
import { type LabCloudlet, LabFleet } from '../../src/lab/fleet.ts';
import { guestImage } from '../../src/lab/guests.ts';
import { Lab } from '../../src/lab/lab.ts';
import { MiB } from '../../src/model/units.ts';
import { type Command, MptcpDevice, monitorLines, mptcpMonitorCommand } from '../../src/network/index.ts';
import { run } from '../../src/vm/run.ts';
import { booted, done, sh, until } from './lab-vm.ts';
import { type Line, labName, lineOf, probe, probeMptcp } from './lab-world.ts';

const servers = readFileSync(path.resolve(import.meta.dirname, '../../src/lab/probes/servers.py'));
const { signal } = new AbortController();
const [echoPort, streamPort] = [7001, 7002];
/** Slow enough for a guest without KVM on a busy machine. */
const streamBps = 2_000_000;
/** What is made for single VMs; taps are called `vip` as well. */
const single = /^(vipx[0-9a-f]{6}|vip[bm][0-9a-f]{8}n\d+)(?=[@ ])/;

export interface Program {
  child: ChildProcess;
  lines: AsyncIterator<Line>;
}

export class WalkingGuest implements AsyncDisposable {
  readonly lab: Lab;
  readonly c1: LabCloudlet;
  readonly c2: LabCloudlet;
  readonly phone: MptcpDevice;
  readonly #stack: AsyncDisposableStack;

  private constructor(
    stack: AsyncDisposableStack,
    made: { lab: Lab; c1: LabCloudlet; c2: LabCloudlet; phone: MptcpDevice },
  ) {
    this.#stack = stack;
    this.lab = made.lab;
    this.c1 = made.c1;
    this.c2 = made.c2;
    this.phone = made.phone;
  }

  /** `letter`: of the lab's name; others of this process have another. */
  static async make(letter: string): Promise<WalkingGuest> {
    await using stack = new AsyncDisposableStack();
    const lab = stack.use(
      await Lab.up({
        name: labName(letter),
        cloudlets: ['c1', 'c2'],
        devices: [{ name: 'phone', at: 'c1' }],
      }),
    );
    const fleet = stack.use(await LabFleet.create(lab));
    const c1 = await fleet.add('c1');
    const c2 = await fleet.add('c2');
    for (const { viper } of [c1, c2])
      await viper.importImage({ body: await openAsBlob(guestImage('debian')), query: { alias: 'debian' } });
    const hardware = { memoryBytes: 256 * MiB, nets: [{ network: 'lan' }, { network: 'lan' }] };
    const body = { name: 'web', image: 'debian', instanceType: 'small', hardware };
    await done(c1.viper, c1.viper.createVm({ body }));
    await booted(c1.viper, 'web');
    const argv = ['/bin/sh', '-c', 'cat >/root/servers.py'];
    await c1.viper.execInGuest({ params: { vm: 'web' }, body: { argv, input: servers.toString() } });
    // MPTCP for whoever asks for it.
    const start = `mptcpize run python3 /root/servers.py ${echoPort} ${streamPort} ${streamBps}`;
    await sh(c1.viper, 'web', `setsid ${start} </dev/null >/run/servers.log 2>&1 & sleep 0.1`);
    await until('the servers', () => sh(c1.viper, 'web', 'grep listening /run/servers.log'));
    const phone = stack.use(
      new MptcpDevice({
        run: (program, args, each) => runAt(lab, 'phone', [program, ...args], each.signal),
        monitor: (each) => monitorLines(lab.commandIn('phone', mptcpMonitorCommand), each),
      }),
    );
    await phone.start(radioAt(lab, 'c1'), signal);
    return new WalkingGuest(stack.move(), { lab, c1, c2, phone });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#stack[Symbol.asyncDispose]();
  }

  /** One connection of the phone to the VM, until it is ended. */
  async stream(protocol: 'mptcp' | 'tcp'): Promise<Program> {
    const argv = ['stream', '--to', `${await this.addressAt(await this.holder())}:${streamPort}`];
    const by = protocol === 'tcp' ? probe : probeMptcp;
    const one = by(this.lab, 'phone', ...argv);
    await flows(one);
    return one;
  }

  /** The cloudlet that has the VM, as its own record says. */
  async holder(): Promise<LabCloudlet> {
    for (const each of [this.c1, this.c2])
      if ((await each.viper.listVms()).items.some(({ state }) => state === 'running')) return each;
    throw new Error('the VM runs nowhere');
  }

  async addressAt({ viper }: LabCloudlet): Promise<string> {
    const { attachment } = await viper.getVm({ params: { vm: 'web' } });
    return attachment!.place.address.split('/')[0]!;
  }

  /** Into the LAN of that cloudlet, where its connections join. */
  async walk(to: LabCloudlet): Promise<void> {
    await this.lab.move('phone', { to: to.name });
    const { joined } = await this.phone.arrived(radioAt(this.lab, to.name), signal);
    // `none`: it is there already.
    assert.notEqual(joined, 'no');
  }

  inPhone(...command: Command): Promise<{ stdout: string }> {
    return runAt(this.lab, 'phone', command, signal);
  }

  /** What Viper has made for single VMs on the host of a cloudlet, beside taps. */
  async madeAt(site: string): Promise<string[]> {
    const { stdout } = await runAt(this.lab, site, ['ip', '-br', 'link'], signal);
    return stdout.split('\n').flatMap((line) => single.exec(line)?.[0] ?? []);
  }
}

function runAt(lab: Lab, place: string, command: Command, each: AbortSignal) {
  const [program, ...args] = lab.commandIn(place, command);
  return run(program, args, { signal: each });
}

export const radioAt = (lab: Lab, site: string) => ({
  device: 'wlan0',
  address: lab.device('phone').addressAt(lab.site(site)),
});

/** More bytes than before have come. */
export async function flows({ lines }: Program): Promise<number> {
  const first = Number((await lineOf(lines, 'sample')).totalBytes);
  for (;;) {
    const total = Number((await lineOf(lines, 'sample')).totalBytes);
    if (total > first) return total;
  }
}

export async function end({ child, lines }: Program): Promise<Line> {
  child.kill('SIGTERM');
  return lineOf(lines, 'summary');
}
