/** Addresses that a cloudlet gives to its VMs: real guests have them, a clone has its own, and nobody has another's. */
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { type LabCloudlet, LabFleet } from '../../src/lab/fleet.ts';
import { Lab } from '../../src/lab/lab.ts';
import { MiB } from '../../src/model/units.ts';
import { booted, done, importTiny, refused, sh, until } from './lab-vm.ts';
import { labName, ping, skip } from './lab-world.ts';

const options = { skip, timeout: 600_000 };
const addresses = { subnet: '10.1.0.0/24', gateway: '10.1.0.1', from: '10.1.0.100', to: '10.1.0.101' };
const hardware = {
  memoryBytes: 128 * MiB,
  diskBytes: 64 * MiB,
  nets: [{ network: 'lan' }, { network: 'lan' }],
};

let lab: Lab;
let fleet: LabFleet;
let c1: LabCloudlet;

if (!skip) {
  before(async () => {
    lab = await Lab.up({ name: labName('a'), cloudlets: ['c1'], devices: [{ name: 'phone', at: 'c1' }] });
    fleet = await LabFleet.create(lab);
    const lan = { name: 'lan', kind: 'bridge', bridge: 'lan0', addresses };
    c1 = await fleet.add('c1', { networks: [lan] });
    await importTiny(c1.viper);
  }, options);
  after(async () => {
    await fleet?.[Symbol.asyncDispose]();
    await lab?.[Symbol.asyncDispose]();
  });
}

const create = (name: string) =>
  c1.viper.createVm({ body: { name, image: 'tiny', instanceType: 'tiny', hardware } });

async function addressOf(vm: string): Promise<string> {
  const { attachment } = await c1.viper.getVm({ params: { vm } });
  return attachment!.place.address;
}

async function isReached(address: string): Promise<boolean> {
  return (await ping(lab, 'phone', address.split('/')[0]!, '-c', '5', '-i', '0.5')).received > 0;
}

/** Those of the guest's interfaces, as it says. */
async function addressesIn(vm: string): Promise<string[][]> {
  const { interfaces = [] } = await booted(c1.viper, vm);
  return interfaces
    .filter(({ name }) => name !== 'lo')
    .map((each) =>
      each.addresses
        .filter(({ address }) => !address.includes(':'))
        .map(({ address, prefixLength }) => `${address}/${prefixLength}`),
    );
}

/** It answers a moment before its interfaces are up. */
const untilItHas = (vm: string, address: string) =>
  until(
    `${address} on the first interface of ${vm}, none on the second`,
    () => addressesIn(vm),
    (found) => JSON.stringify(found) === JSON.stringify([[address], []]),
  );

test('a VM boots with the address that it was given, and its clone takes another', options, async () => {
  await done(c1.viper, create('one'));
  assert.equal(await addressOf('one'), '10.1.0.100/24');
  await untilItHas('one', '10.1.0.100/24');
  assert.ok(await isReached('10.1.0.100'));
  await done(c1.viper, c1.viper.cloneVm({ params: { vm: 'one' }, body: { name: 'two' } }));
  assert.equal(await addressOf('two'), '10.1.0.101/24');
  await untilItHas('two', '10.1.0.101/24');
  assert.ok(await isReached('10.1.0.101'));
  assert.ok(await isReached('10.1.0.100'));
});

test('a guest that takes an address of its own choice is not heard under it', options, async () => {
  const heard = 'ping -c 3 -W 2 -I 10.1.0.150 10.1.0.1 | grep -c "bytes from" || true';
  const add = '/usr/sbin/ip address add 10.1.0.150/24 dev eth0';
  assert.equal(await sh(c1.viper, 'one', `${add}; ${heard}`), '0');
  assert.ok(await isReached('10.1.0.100'));
});

test(
  'a network that is full is an error that names it, and an address is free when its VM is gone',
  options,
  async () => {
    const error = await refused(create('three'), 'no_free_address');
    assert.match(error.message, /network lan \(10\.1\.0\.0\/24\): wanted 10\.1\.0\.100 to 10\.1\.0\.101/);
    await done(c1.viper, c1.viper.deleteVm({ params: { vm: 'one' }, query: { force: true } }));
    await done(c1.viper, create('three'));
    assert.equal(await addressOf('three'), '10.1.0.100/24');
  },
);
