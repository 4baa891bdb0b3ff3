import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { newId } from '../../model/ids.ts';
import type { CloudletNetwork } from '../../network/index.ts';
import { Store } from '../store/index.ts';
import { Leases } from './leases.ts';

const networks: CloudletNetwork[] = [
  { name: 'user', kind: 'user' },
  { name: 'bare', kind: 'bridge', bridge: 'br1' },
  {
    name: 'lan',
    kind: 'bridge',
    bridge: 'br0',
    addresses: { subnet: '10.4.0.0/24', gateway: '10.4.0.1', from: '10.4.0.10', to: '10.4.0.11' },
  },
];
const network = 'lan';
let directory: string;
let store: Store;
let leases: Leases;

before(async () => {
  directory = await mkdtemp(path.join(tmpdir(), 'viper-leases-'));
  store = new Store(directory);
  leases = new Leases({ store, networks });
});
after(async () => {
  store.close();
  await rm(directory, { recursive: true });
});

const inMs = (ms: number): string => new Date(Date.now() + ms).toISOString();

test('two VMs get two addresses, and one that asks again the same', () => {
  const [one, two, three] = [newId(), newId(), newId()];
  const place = leases.reserve({ network, vmId: one });
  assert.deepEqual(place, { address: '10.4.0.10/24', subnet: '10.4.0.0/24', gateway: '10.4.0.1' });
  assert.equal(leases.reserve({ network, vmId: two }).address, '10.4.0.11/24');
  assert.deepEqual(leases.reserve({ network, vmId: one }), place);
  assert.throws(() => leases.reserve({ network, vmId: three }), { code: 'no_free_address', message: /lan/ });
  leases.release(network, two, place);
  assert.throws(() => leases.reserve({ network, vmId: three }), { code: 'no_free_address' }, 'not its own');
  leases.releaseAll(one);
  assert.deepEqual(leases.reserve({ network, vmId: three }), place);
  leases.releaseAll(two);
  leases.releaseAll(three);
});

test('a reservation whose time is over is free again, one that is kept is not', () => {
  const [late, kept, next] = [newId(), newId(), newId()];
  leases.reserve({ network, vmId: late, expiresAt: inMs(-1) });
  const place = leases.reserve({ network, vmId: kept, expiresAt: inMs(60_000) });
  assert.equal(place.address, '10.4.0.10/24');
  leases.keep(network, kept, place);
  assert.equal(leases.reserve({ network, vmId: next, expiresAt: inMs(-1) }).address, '10.4.0.11/24');
  // What is given out outlives the daemon.
  const again = new Leases({ store, networks });
  assert.deepEqual(again.reserve({ network, vmId: kept }), place);
  leases.releaseAll(kept);
  leases.releaseAll(next);
});

test('a network in which the cloudlet gives no addresses is an error that names it', () => {
  assert.deepEqual(
    ['user', 'bare', 'lan'].map((name) => leases.gives(name)),
    [false, false, true],
  );
  for (const each of ['user', 'bare'])
    assert.throws(() => leases.reserve({ network: each, vmId: newId() }), {
      code: 'unsupported',
      message: new RegExp(each),
    });
});
