/** The two cloudlets of the bench as places for QEMUs of our own, and one LAN that reaches both without the WAN. */
import { chmod, writeFile } from 'node:fs/promises';
import path from 'node:path';
import type { Lab } from '../../lab/lab.ts';
import { execute, executeAll } from '../../lab/runner.ts';

/** The clients' LAN at each cloudlet, see `layout.ts` of the lab. */
const lan = 'lan0';
const trunk = 'trunk0';

export const joinableLab = { cloudlets: ['c1', 'c2'], gatewayMac: 'own' as const };

/**
 * Makes the LANs of both cloudlets one, over a cable without delay: a client then sees of a migration what it does to
 * the VM, and nothing of the WAN that it goes over.
 */
export async function joinLans(lab: Lab): Promise<void> {
  const [here, there] = [lab.site('c1').namespace, lab.site('c2').namespace];
  await execute([
    ...(['ip', 'link', 'add', 'name', trunk, 'netns', here] as const),
    ...(['type', 'veth', 'peer', 'name', trunk, 'netns', there] as const),
  ]);
  for (const name of ['c1', 'c2'])
    await execute(lab.commandIn(name, ['ip', 'link', 'set', 'dev', trunk, 'master', lan, 'up']));
}

/** A tap in the LAN of this cloudlet, for a QEMU of ours; a VM of its daemon gets its own. */
export async function addTap(lab: Lab, at: string, name: string): Promise<AsyncDisposable> {
  const ip = (...args: string[]) => lab.commandIn(at, ['ip', ...args]);
  await executeAll([
    ip('tuntap', 'add', 'dev', name, 'mode', 'tap'),
    ip('link', 'set', 'dev', name, 'master', lan, 'up'),
  ]);
  return {
    [Symbol.asyncDispose]: async () =>
      void (await execute(ip('link', 'delete', 'dev', name)).catch(() => {})),
  };
}

/** A program that is QEMU with the network of this cloudlet. */
export async function qemuIn(lab: Lab, at: string): Promise<string> {
  const file = path.join(lab.directory, `qemu-${at}`);
  const command = lab.commandIn(at, ['qemu-system-x86_64']).join(' ');
  await writeFile(file, `#!/bin/sh\nexec ${command} "$@"\n`);
  await chmod(file, 0o700);
  return file;
}

/** Bytes that have left over the WAN, both ways: whatever protocol they belong to. */
export async function wanBytes(lab: Lab): Promise<number> {
  let total = 0;
  for (const [at, peer] of [
    ['c1', 'c2'],
    ['c2', 'c1'],
  ] as const) {
    const command = lab.commandIn(at, ['ip', '-j', '-s', 'link', 'show', 'dev', `wan-${peer}`]);
    const [link] = JSON.parse(await execute(command));
    total += link.stats64.tx.bytes;
  }
  return total;
}
