import assert from 'node:assert/strict';
import { mock, test } from 'node:test';
import { newId } from '../../model/ids.ts';
import { EventLog } from '../events.ts';
import { testImage, testStore, testVm } from '../store/fixtures.ts';
import { type Managed, VmRegistry } from './registry.ts';

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

test('a VM that stands still while the rest of it arrives is not resumed, and says why', () => {
  using fixture = testStore();
  const { store } = fixture;
  store.images.insert(testImage());
  const registry = new VmRegistry(store, new EventLog(store));
  const managed: Managed = registry.add(testVm('web', { state: 'running' }));
  const operationId = newId();
  Object.assign(managed, { operationId, hasArrived: true });
  assert.throws(() => registry.require(managed, 'resume'), /an operation is at work on it/);
  managed.stalled = { at: '2026-01-01T00:00:00.000Z', reason: 'its disk gives errors' };
  assert.throws(() => registry.require(managed, 'resume'), {
    code: 'busy',
    message: /its disk gives errors.*goes on by itself/,
    details: { operationId, state: 'running', allowed: [] },
  });
});
