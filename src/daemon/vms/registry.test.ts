import assert from 'node:assert/strict';
import { mock, test } from 'node:test';
import { EventLog } from '../events.ts';
import { testImage, testStore, testVm } from '../store/fixtures.ts';
import { VmRegistry } from './registry.ts';

test('what changes nothing is not written, and is written at last when a write has failed', () => {
  using fixture = testStore();
  const { store } = fixture;
  store.images.insert(testImage());
  const registry = new VmRegistry(store, new EventLog(store));
  const managed = registry.add(testVm('web', { state: 'running' }));
  const update = mock.method(store.vms, 'update');
  registry.update(managed, { state: 'running', process: undefined });
  assert.equal(update.mock.callCount(), 0);
  update.mock.mockImplementationOnce(() => {
    throw new Error('no space left');
  });
  assert.throws(() => registry.update(managed, { state: 'paused' }), /no space left/);
  registry.update(managed, { state: 'paused' });
  assert.equal(store.vms.get(managed.record.id)!.state, 'paused');
});
