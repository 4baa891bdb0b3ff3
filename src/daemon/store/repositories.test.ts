import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import fc from 'fast-check';
import { newId } from '../../model/ids.ts';
import { testImage, testStore, testVm } from './fixtures.ts';
import type { Page, Store } from './index.ts';

/** All pages of a list, one after the other. */
function readAll<T>(limit: number, list: (request: { limit: number; after?: string }) => Page<T>): T[] {
  const items: T[] = [];
  let page = list({ limit });
  items.push(...page.items);
  while (page.next !== null) {
    assert.equal(page.items.length, limit);
    page = list({ limit, after: page.next });
    items.push(...page.items);
  }
  return items;
}

describe('VMs', () => {
  test('are found by id', () => {
    using fixture = storeWithImage();
    const vm = testVm('web');
    fixture.store.vms.insert(vm);
    assert.deepEqual(fixture.store.vms.get(vm.id), vm);
    assert.equal(fixture.store.vms.get(testVm('db').id), undefined);
  });

  test('cannot share a name, at insert or at update', () => {
    using fixture = storeWithImage();
    const other = testVm('db');
    fixture.store.vms.insert(testVm('web'));
    fixture.store.vms.insert(other);
    assert.throws(() => fixture.store.vms.insert(testVm('web')), {
      code: 'name_taken',
      details: { kind: 'vm', name: 'web' },
    });
    assert.throws(() => fixture.store.vms.update({ ...other, name: 'web' }), { code: 'name_taken' });
    assert.equal(fixture.store.vms.get(other.id)!.name, 'db');
  });

  test('are updated whole and deleted once', () => {
    using fixture = storeWithImage();
    const vm = testVm('web');
    fixture.store.vms.insert(vm);
    fixture.store.vms.update({ ...vm, state: 'running', runningWith: 'tcg' });
    assert.equal(fixture.store.vms.get(vm.id)!.runningWith, 'tcg');
    assert.equal(fixture.store.vms.delete(vm.id), true);
    assert.equal(fixture.store.vms.delete(vm.id), false);
    assert.throws(() => fixture.store.vms.update(vm), { code: 'not_found' });
  });

  test('come in pages that show each once, oldest first, whatever the dates and the limit', () => {
    fc.assert(
      fc.property(
        fc.array(fc.integer({ min: 0, max: 3 }), { maxLength: 30 }),
        fc.integer({ min: 1, max: 7 }),
        (days, limit) => {
          using fixture = storeWithImage();
          const vms = days.map((day, index) =>
            testVm(`vm-${index}`, { createdAt: `2026-01-0${day + 1}T00:00:00.000Z` }),
          );
          fixture.store.transact(() => {
            for (const vm of vms) fixture.store.vms.insert(vm);
          });
          const keys = vms.map((vm) => `${vm.createdAt} ${vm.id}`).sort();
          const listed = readAll(limit, (request) => fixture.store.vms.list(request));
          assert.deepEqual(
            listed.map((vm) => `${vm.createdAt} ${vm.id}`),
            keys,
          );
        },
      ),
      { numRuns: 25 },
    );
  });

  test('that vanish between two pages move nothing', () => {
    using fixture = storeWithImage();
    const vms = ['a', 'b', 'c', 'd'].map((name, day) =>
      testVm(name, { createdAt: `2026-01-0${day + 1}T00:00:00.000Z` }),
    );
    for (const vm of vms) fixture.store.vms.insert(vm);
    const first = fixture.store.vms.list({ limit: 2 });
    fixture.store.vms.delete(vms[0]!.id);
    fixture.store.vms.delete(vms[1]!.id);
    const second = fixture.store.vms.list({ limit: 2, after: first.next! });
    assert.deepEqual(
      second.items.map((vm) => vm.name),
      ['c', 'd'],
    );
    assert.equal(second.next, null);
  });

  test('are not listed after something that is no cursor', () => {
    using fixture = storeWithImage();
    for (const after of ['', 'x', '%%%', Buffer.from('only-one').toString('base64url')]) {
      assert.throws(() => fixture.store.vms.list({ limit: 5, after }), { code: 'invalid_request' });
    }
  });
});

describe('images', () => {
  test('are found by digest and by alias', () => {
    using fixture = testStore();
    const image = testImage('b', { aliases: ['debian', 'debian-12'] });
    fixture.store.images.insert(image);
    assert.deepEqual(fixture.store.images.find(image.digest), image);
    assert.deepEqual(fixture.store.images.find('debian'), image);
    assert.deepEqual(fixture.store.images.list({ limit: 5 }), { items: [image], next: null });
  });

  test('keep their alias against an insert and lose it to a move', () => {
    using fixture = testStore();
    fixture.store.images.insert(testImage('b', { aliases: ['debian'] }));
    const newer = testImage('c');
    assert.throws(() => fixture.store.images.insert({ ...newer, aliases: ['debian'] }), {
      code: 'name_taken',
    });
    assert.equal(fixture.store.images.get(newer.digest), undefined, 'nothing half-made');
    fixture.store.images.insert(newer);
    fixture.store.images.moveAlias(newer.digest, 'debian');
    assert.equal(fixture.store.images.find('debian')!.digest, newer.digest);
    assert.equal(fixture.store.images.deleteAlias(newer.digest, 'debian'), true);
    assert.equal(fixture.store.images.deleteAlias(newer.digest, 'debian'), false);
  });

  test('that VMs or snapshots need cannot be deleted', () => {
    using fixture = storeWithImage();
    const { store } = fixture;
    const vm = testVm('web');
    store.vms.insert(vm);
    store.snapshots.insert(snapshotOf(vm, 'golden'));
    const { digest } = testImage();
    const usedBy = [
      { kind: 'vm', name: 'web' },
      { kind: 'snapshot', name: 'golden' },
    ];
    assert.throws(() => store.images.delete(digest), { code: 'in_use', details: { usedBy } });
    store.vms.delete(vm.id);
    store.snapshots.delete(store.snapshots.getByName('golden')!.id);
    assert.equal(store.images.delete(digest), true);
    assert.equal(store.images.delete(digest), false);
  });
});

test('a snapshot cannot take the name of another', () => {
  using fixture = storeWithImage();
  const vm = testVm('web');
  fixture.store.snapshots.insert(snapshotOf(vm, 'golden'));
  assert.throws(() => fixture.store.snapshots.insert(snapshotOf(vm, 'golden')), { code: 'name_taken' });
  assert.equal(fixture.store.snapshots.list({ limit: 9 }).items.length, 1);
});

describe('credentials', () => {
  const credential = (name: string, hash: string) => ({
    id: newId(),
    name,
    kind: 'bearer' as const,
    hash,
    scopes: ['read' as const],
    createdAt: '2026-01-01T00:00:00.000Z',
  });

  test('share neither a name nor a hash; a revoked one gives its name free', () => {
    using fixture = testStore();
    const { credentials } = fixture.store;
    const first = credential('ci', 'aa');
    credentials.insert(first);
    assert.throws(() => credentials.insert(credential('ci', 'bb')), { code: 'name_taken' });
    assert.throws(() => credentials.insert(credential('other', 'aa')), { code: 'name_taken' });
    credentials.update({ ...first, revokedAt: '2026-01-02T00:00:00.000Z' });
    credentials.insert(credential('ci', 'bb'));
    assert.equal(credentials.active().length, 1);
    assert.equal(credentials.getByHash('bearer', 'aa')!.revokedAt, '2026-01-02T00:00:00.000Z');
    assert.equal(credentials.getByHash('certificate', 'aa'), undefined);
  });
});

test('operations beyond the bound are forgotten, running ones never', () => {
  using fixture = testStore();
  const { operations } = fixture.store;
  for (let day = 1; day <= 5; day += 1) {
    operations.insert({
      id: newId(),
      kind: 'vm.start',
      subject: {},
      state: day === 1 ? 'running' : 'succeeded',
      progress: null,
      createdAt: `2026-01-0${day}T00:00:00.000Z`,
    });
  }
  operations.prune(2);
  const days = operations.list({ limit: 9 }).items.map(({ createdAt }) => createdAt.slice(8, 10));
  assert.deepEqual(days, ['01', '04', '05']);
});

function storeWithImage(): { store: Store } & Disposable {
  const fixture = testStore();
  fixture.store.images.insert(testImage());
  return fixture;
}

const snapshotOf = (vm: ReturnType<typeof testVm>, name: string) => ({
  id: newId(),
  name,
  spec: vm.spec,
  createdAt: vm.createdAt,
  memoryFileBytes: 1,
  diskFileBytes: 1,
  bootMs: 1,
});
