import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { type AddressPlan, chooseAddress, isInSubnet, requireAddressPlan } from './addresses.ts';

const plan: AddressPlan = { subnet: '10.4.0.0/24', gateway: '10.4.0.1', from: '10.4.0.10', to: '10.4.0.12' };
const taken = (...addresses: string[]) => ({ taken: new Set(addresses) });

test('the lowest free address of the range is chosen, with the prefix length of the subnet', () => {
  assert.equal(chooseAddress('lan', plan, taken()), '10.4.0.10/24');
  assert.equal(chooseAddress('lan', plan, taken('10.4.0.10', '10.4.0.12')), '10.4.0.11/24');
});

test('a range without a free address is an error that names network and range', () => {
  const all = taken('10.4.0.10', '10.4.0.11', '10.4.0.12');
  assert.throws(() => chooseAddress('lan', plan, all), {
    code: 'no_free_address',
    message: /network lan \(10\.4\.0\.0\/24\): wanted 10\.4\.0\.10 to 10\.4\.0\.12, all of it is taken/,
    details: { network: 'lan', subnet: '10.4.0.0/24', range: '10.4.0.10 to 10.4.0.12' },
  });
});

test('no two VMs get one address, none gets the gateway, and all are of the range', () => {
  fc.assert(
    fc.property(fc.integer({ min: 0, max: 30 }), fc.integer({ min: 1, max: 40 }), (first, count) => {
      const wide = { ...plan, from: `10.4.0.${1 + first}`, to: `10.4.0.${1 + first + count}` };
      const given = new Set<string>();
      for (;;) {
        let address: string;
        try {
          address = chooseAddress('lan', wide, { taken: given }).split('/')[0]!;
        } catch {
          break;
        }
        assert.ok(!given.has(address) && address !== wide.gateway && isInSubnet(wide.subnet, address));
        given.add(address);
      }
      assert.equal(given.size, first === 0 ? count : count + 1);
    }),
  );
});

test('by parity a VM has the next odd address after its device, and only that', () => {
  const parity: AddressPlan = { ...plan, scheme: 'parity' };
  assert.equal(chooseAddress('lan', parity, { ...taken(), device: '10.4.0.8' }), '10.4.0.9/24');
  for (const wish of [
    { ...taken('10.4.0.9'), device: '10.4.0.8' },
    { ...taken(), device: '10.4.0.7' },
    { ...taken(), device: '10.5.0.8' },
    { ...taken(), device: '10.4.0.254' },
  ])
    assert.throws(() => chooseAddress('lan', parity, wish), { code: 'no_free_address' }, wish.device);
  // A device that nobody knows yet.
  assert.equal(chooseAddress('lan', parity, taken()), '10.4.0.10/24');
});

test('a plan whose addresses do not fit its subnet is refused with each field that does not', () => {
  assert.equal(requireAddressPlan(plan), plan);
  const bad: [Partial<AddressPlan>, string[]][] = [
    [{ subnet: '10.4.0.0' }, ['subnet']],
    [{ subnet: '10.4.0.1/24' }, ['subnet']],
    [{ subnet: '10.4.0.0/31' }, ['subnet']],
    [{ subnet: 'fd00::/64' }, ['subnet']],
    [{ gateway: '10.5.0.1', from: '10.4.0.0' }, ['gateway', 'from']],
    [{ to: '10.4.0.255' }, ['to']],
    [{ to: '10.4.0.9' }, ['to']],
    [{ from: '; reboot' }, ['from']],
  ];
  for (const [change, fields] of bad)
    assert.throws(
      () => requireAddressPlan({ ...plan, ...change }),
      (error: { code: string; details: { problems: { field: string }[] } }) => {
        assert.equal(error.code, 'invalid_request');
        assert.deepEqual(
          error.details.problems.map(({ field }) => field),
          fields,
        );
        return true;
      },
    );
});
