/** A disk that others have filled: what cannot be written is refused as such, and the daemon and its guests go on. */
import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import { mkdir, mkdtemp, readFile, rm, statfs } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import type { LabCloudlet, LabFleet } from '../../src/lab/fleet.ts';
import { MiB } from '../../src/model/units.ts';
import { connectNode, type NodeViper } from '../../src/sdk/node.ts';
import {
  assertWhole,
  booted,
  done,
  EventRecorder,
  importEmpty,
  importTiny,
  openFleet,
  refused,
  sh,
  until,
} from './lab-vm.ts';

const isRoot = process.getuid?.() === 0;
const options = { timeout: 600_000, skip: isRoot ? false : 'only root can mount a small disk' };
let place: string;
let disk: string;
let fleet: LabFleet;
let north: LabCloudlet;
let viper: NodeViper;

before(async () => {
  if (!isRoot) return;
  place = await mkdtemp(path.join(tmpdir(), 'viper-full-'));
  disk = path.join(place, 'disk');
  await mkdir(disk);
  execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=128m,mode=700', 'tmpfs', disk]);
  const { TMPDIR } = process.env;
  process.env.TMPDIR = disk;
  try {
    fleet = await openFleet();
  } finally {
    if (TMPDIR === undefined) delete process.env.TMPDIR;
    else process.env.TMPDIR = TMPDIR;
  }
  north = await fleet.add('north', { reserveBytes: 0 });
  ({ viper } = north);
  await importEmpty(viper);
});
after(async () => {
  await fleet?.[Symbol.asyncDispose]();
  // What was killed with the fleet may still be on its way out.
  if (disk)
    await until(
      'the disk to be free',
      () => spawnSync('sh', ['-c', '! mountpoint -q "$0" || umount "$0"', disk]).status === 0,
    );
  if (place) await rm(place, { recursive: true });
});

/** Takes the room of the disk but for so many bytes; gives it back when disposed. */
async function fill(leaveBytes = 0): Promise<AsyncDisposable> {
  const filler = path.join(disk, 'filler');
  const { bavail, bsize } = await statfs(disk);
  execFileSync('fallocate', ['-l', String(bavail * bsize - leaveBytes), filler]);
  return { [Symbol.asyncDispose]: () => rm(filler) };
}

test(
  'an image that does not fit is refused: at once if its size is told, else when the disk is full',
  options,
  async () => {
    const big = Buffer.alloc(160 * MiB, 1);
    const { details } = await refused(viper.importImage({ body: new Blob([big]) }), 'insufficient_space');
    assert.equal(details.wantedBytes, big.length);
    assert.ok(Number(details.freeBytes) < 128 * MiB);
    await refused(viper.importImage({ body: new Blob([big]).stream() }), 'insufficient_space');
    await assertWhole(north);
    assert.equal((await viper.listImages()).items.length, 1);
  },
);

test(
  'on a full disk nothing is made, everything else is answered, and it goes on when there is room',
  options,
  async () => {
    // Its first use would be written down, which must not matter.
    const { secret } = await viper.createToken({ body: { name: 'unused', scopes: ['read'] } });
    const create = () =>
      done(viper, viper.createVm({ body: { name: 'full', image: 'empty', instanceType: 'tiny' } }));
    const id = await create();
    await done(viper, viper.stopVm({ params: { vm: id }, body: { force: true } }));
    {
      await using _ = await fill();
      const ca = await readFile(north.caFile, 'utf8');
      await using reader = connectNode({ url: north.url, token: secret!, ca });
      assert.equal((await reader.listVms()).items.length, 1);
      const body = { name: 'more', image: 'empty', instanceType: 'tiny' };
      for (let attempt = 0; attempt < 5; attempt += 1)
        await refused(done(viper, viper.createVm({ body })), 'insufficient_space');
      await refused(
        done(viper, viper.cloneVm({ params: { vm: id }, body: { name: 'more' } })),
        'insufficient_space',
      );
      await refused(done(viper, viper.startVm({ params: { vm: id } })), 'insufficient_space');
      assert.equal((await viper.getVm({ params: { vm: id } })).state, 'stopped');
      await assertWhole(north);
      // Making room is possible.
      await done(viper, viper.deleteVm({ params: { vm: id } }));
    }
    await create();
    await assertWhole(north);
    await done(viper, viper.deleteVm({ params: { vm: 'full' }, query: { force: true } }));
  },
);

test(
  'a guest whose writes find no room stands still, which is told, and goes on by itself when there is some',
  options,
  async () => {
    await using recorder = new EventRecorder(viper);
    await importTiny(viper);
    const id = await done(
      viper,
      viper.createVm({ body: { name: 'writer', image: 'tiny', instanceType: 'tiny' } }),
    );
    await booted(viper, 'writer');
    const isStalled = ({ kind, vmId }: { kind: string; vmId?: string }) =>
      kind === 'vm.stalled' && vmId === id;
    const reason = 'no space left for its disk';
    {
      await using _ = await fill(4 * MiB);
      await sh(
        viper,
        'writer',
        '(dd if=/dev/urandom of=/dev/vda bs=1M seek=200 count=16 conv=fsync; echo $? > /run/written) > /dev/null 2>&1 &',
      );
      const { data } = await recorder.first('the word of it', isStalled);
      assert.deepEqual(data, { name: 'writer', reason });
      const { state, stalled } = await viper.getVm({ params: { vm: id } });
      assert.deepEqual([state, stalled?.reason], ['paused', reason]);
      // A daemon that comes after finds it so.
      await north.stop('SIGKILL');
      await north.start();
      await until(
        'what the VM suffers',
        () => viper.getVm({ params: { vm: id } }),
        (vm) => vm.stalled?.reason === reason && vm.state === 'paused',
      );
    }
    const written = await until('the end of the writes', () => sh(viper, 'writer', 'cat /run/written'));
    assert.equal(written, '0');
    await until(
      'that all is well',
      () => viper.getVm({ params: { vm: id } }),
      (vm) => vm.stalled === undefined && vm.state === 'running',
    );
  },
);
