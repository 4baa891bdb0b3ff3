import assert from 'node:assert/strict';
import { test } from 'node:test';
import { newId } from '../../model/ids.ts';
import { GiB } from '../../model/units.ts';
import { describeRelays, relaysForDisk } from './relays.ts';

const offers = (...freeBytes: number[]) =>
  freeBytes.map((bytes, index) => ({ id: newId(), name: `r${index + 1}`, freeBytes: bytes }));
const names = (...args: Parameters<typeof relaysForDisk>) => relaysForDisk(...args)?.map(({ name }) => name);

test('a disk goes to relays that have room for all of its copies, most room first', () => {
  const wanted = { diskBytes: GiB, replicas: 2 };
  assert.deepEqual(names(offers(2 * GiB, 0, 3 * GiB), wanted), ['r3', 'r1']);
  // In pieces, too.
  assert.deepEqual(names(offers(GiB, GiB, GiB), wanted), ['r1', 'r2', 'r3']);
});

test('it does not where they lend too little, or only one lends much', () => {
  const wanted = { diskBytes: GiB, replicas: 2 };
  assert.equal(names(offers(100 * GiB), wanted), undefined);
  assert.equal(names(offers(100 * GiB, GiB / 2), wanted), undefined);
  assert.equal(names(offers(GiB, GiB), wanted), undefined, 'no room for what is written meanwhile');
  assert.equal(names([], { diskBytes: 0, replicas: 1 }), undefined);
});

test('who holds what is said for people', () => {
  const relays = offers(GiB, GiB);
  assert.equal(describeRelays({ relays, replicas: 1 }), 'relays: r1, r2, each part on 1');
  const custodian = { id: newId(), name: 'east' };
  assert.equal(
    describeRelays({ relays, replicas: 2, diskRelays: relays, custodian }),
    'relays: r1, r2, each part on 2; its disk goes there, too; custodian: east',
  );
});
