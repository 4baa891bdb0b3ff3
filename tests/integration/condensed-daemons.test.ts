/** The condensed engine between real daemons: what both cloudlets hold does not travel, on the way back least of all. */
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import type { LabCloudlet, LabFleet } from '../../src/lab/fleet.ts';
import { MiB } from '../../src/model/units.ts';
import { booted, done, importTiny, openFleet, patienceMs, sh, until } from './lab-vm.ts';

const options = { timeout: 600_000 };
let fleet: LabFleet;
let north: LabCloudlet;
let south: LabCloudlet;

before(async () => {
  fleet = await openFleet();
  north = await fleet.add('north');
  south = await fleet.add('south');
  await importTiny(north.viper);
  const hardware = { memoryBytes: 128 * MiB, diskBytes: 64 * MiB };
  const body = { name: 'golden', image: 'tiny', instanceType: 'tiny', hardware };
  await done(north.viper, north.viper.createSnapshot({ body }));
}, options);
after(async () => {
  await fleet?.[Symbol.asyncDispose]();
});

async function move(from: LabCloudlet, to: LabCloudlet, mode: 'precopy' | 'hybrid') {
  const body = { to: to.name, mode, engine: 'condensed' } as const;
  const operation = await from.viper.migrateVm({ params: { vm: 'one' }, body });
  const ended = await from.viper.wait(operation, { timeoutMs: patienceMs });
  const { result } = await from.viper.getMigration({
    params: { migration: ended.result!.migrationId! },
  });
  return result!.condensed!;
}

test(
  'a VM goes without what its image holds, and comes back without what stayed behind',
  options,
  async (context) => {
    // With its image, which is not there; a second copy is none.
    for (let copy = 0; copy < 2; copy += 1)
      await done(
        north.viper,
        north.viper.pushSnapshot({ params: { snapshot: 'golden' }, body: { to: 'south' } }),
      );
    const digests: (string | undefined)[] = [];
    for (const { viper } of [north, south]) {
      const found = await until(
        'the index of the snapshot',
        () => viper.getSnapshot({ params: { snapshot: 'golden' } }),
        ({ index }) => index.state === 'ready',
      );
      digests.push(found.digest);
      await until(
        'the index of the image',
        () => viper.getImage({ params: { image: found.spec.disk.image } }),
        ({ index }) => index.state === 'ready',
      );
    }
    assert.equal(digests[0], digests[1]);
    assert.match(digests[0]!, /^sha256:/);
    // What came is whole: a VM starts from it.
    await done(south.viper, south.viper.createVm({ body: { name: 'two', snapshot: 'golden' } }));
    await booted(south.viper, 'two');
    await done(south.viper, south.viper.deleteVm({ params: { vm: 'two' }, query: { force: true } }));

    await done(north.viper, north.viper.createVm({ body: { name: 'one', snapshot: 'golden' } }));
    await booted(north.viper, 'one');
    // From the disk into the page cache, and something of its own.
    await sh(
      north.viper,
      'one',
      'cat /dev/vda >/dev/null; head -c 8388608 /dev/urandom >/dev/shm/own; md5sum /dev/shm/own >/run/own',
    );
    const there = await move(north, south, 'precopy');
    context.diagnostic(JSON.stringify(there));
    assert.equal(there.fallback, undefined);
    assert.equal(there.repairedPages, 0);
    assert.ok(there.pages.set > 100, 'pages of the image and of the snapshot');
    await sh(south.viper, 'one', 'md5sum -c /run/own');

    const back = await move(south, north, 'hybrid');
    context.diagnostic(JSON.stringify(back));
    assert.equal(back.repairedPages, 0);
    // Nothing of the random content travels again.
    assert.ok(back.wireBytes < there.wireBytes / 4, `${back.wireBytes} of ${there.wireBytes} bytes`);
    await sh(north.viper, 'one', 'md5sum -c /run/own');
  },
);
