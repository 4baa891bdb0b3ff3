import assert from 'node:assert/strict';
import { test } from 'node:test';
import { freeSubnet, subnetsOf } from './subnet.ts';

test('a lab has the same net each time, and another one if that is taken', () => {
  const first = freeSubnet('lab', new Set());
  assert.equal(freeSubnet('lab', new Set()), first);
  assert.equal(freeSubnet('lab', new Set([first])), (first + 1) % 512);
});

test('when all are taken that is said', () => {
  const all = new Set(Array.from({ length: 512 }, (_, index) => index));
  assert.throws(() => freeSubnet('lab', all), { code: 'too_many', message: /512 labs are up/ });
});

test('the nets that the host is in are read from ip', () => {
  const output = JSON.stringify([
    { ifname: 'lo', addr_info: [{ local: '127.0.0.1' }, { local: '::1' }] },
    { ifname: 'viper-a', addr_info: [{ local: '198.18.7.254' }] },
    { ifname: 'viper-b', addr_info: [{ local: '198.19.255.254' }] },
    { ifname: 'eth0' },
  ]);
  assert.deepEqual(subnetsOf(output), new Set([7, 511]));
  assert.deepEqual(subnetsOf('\n'), new Set());
});
