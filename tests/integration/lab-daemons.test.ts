/** Two real daemons in a lab: over its WAN they join, and a VM on one's LAN is reached and moves to the other. */
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { LabFleet } from '../../src/lab/fleet.ts';
import { Lab } from '../../src/lab/lab.ts';
import { newMac } from '../../src/model/ids.ts';
import { MiB } from '../../src/model/units.ts';
import { booted, done, importTiny, patienceMs, until } from './lab-vm.ts';
import { labName, leftOf, ping, processesOf, skip } from './lab-world.ts';

const options = { skip, timeout: 600_000 };
let lab: Lab;
let fleet: LabFleet;

if (!skip) {
  before(async () => {
    lab = await Lab.up({
      name: labName('d'),
      cloudlets: ['c1', 'c2'],
      devices: [{ name: 'phone', at: 'c2' }],
    });
    fleet = await LabFleet.create(lab);
    await fleet.add('c1');
    await fleet.add('c2');
  }, options);
  after(async () => {
    await fleet?.[Symbol.asyncDispose]();
    await lab?.[Symbol.asyncDispose]();
  });
}

test(
  'a VM on a LAN is reached from another one, moves over the WAN, and nothing is left',
  options,
  async () => {
    const [c1, c2] = fleet.cloudlets as [LabFleet['cloudlets'][0], LabFleet['cloudlets'][0]];
    await importTiny(c1.viper);
    const mac = newMac();
    const body = {
      name: 'web',
      image: 'tiny',
      instanceType: 'tiny',
      hardware: { memoryBytes: 128 * MiB, diskBytes: 64 * MiB, nets: [{ network: 'lan', mac }] },
      seed: { addresses: [{ mac, address: '10.1.0.10/24', gateway: '10.1.0.1' }] },
    };
    await done(c1.viper, c1.viper.createVm({ body }));
    await booted(c1.viper, 'web');
    // On a busy machine a guest that has just booted may need its time.
    const fromPhone = await until(
      'an answer of the guest',
      () => ping(lab, 'phone', '10.1.0.10', '-c', '5', '-i', '0.2'),
      ({ received }) => received > 0,
    );
    assert.ok(fromPhone.minMs >= 18, JSON.stringify(fromPhone));
    const phone = lab.device('phone').addressAt(lab.site('c2'));
    await until(
      'an answer to the guest',
      () => c1.viper.execInGuest({ params: { vm: 'web' }, body: { argv: ['ping', '-c', '2', phone] } }),
      ({ exitCode }) => exitCode === 0,
    );

    const operation = await c1.viper.migrateVm({
      params: { vm: 'web' },
      body: { to: 'c2', mode: 'precopy' },
    });
    await c1.viper.wait(operation, { timeoutMs: patienceMs });
    assert.equal((await c2.viper.getVm({ params: { vm: 'web' } })).state, 'running');
    assert.equal((await booted(c2.viper, 'web')).hostname, 'web');
    assert.deepEqual((await c1.viper.listVms()).items, []);
  },
);

test('a cut of the WAN is one for the daemons too, and the host still reaches both', options, async () => {
  const [c1, c2] = fleet.cloudlets as [LabFleet['cloudlets'][0], LabFleet['cloudlets'][0]];
  await lab.link('c1', 'c2', { isCut: true });
  const plan = c2.viper.planMigration({ params: { vm: 'web' }, body: { to: 'c1' } });
  await assert.rejects(plan, { code: /peer_unreachable|timeout/ });
  await c1.viper.getHealth();
  await lab.link('c1', 'c2', { isCut: false });
  await until('the way back', () =>
    c2.viper.planMigration({ params: { vm: 'web' }, body: { to: 'c1' } }).then(() => true),
  );
});

test('a lab is taken down with the daemons and guests that run in it', options, async () => {
  assert.ok((await processesOf(lab.name)).some((line) => line.includes('qemu-system')));
  assert.equal(await Lab.down(lab.name), true);
  assert.deepEqual([await leftOf(lab.name), await processesOf(lab.name)], [[], []]);
});
