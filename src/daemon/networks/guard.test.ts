import assert from 'node:assert/strict';
import { test } from 'node:test';
import { newId } from '../../model/ids.ts';
import type { VmRecord } from '../../model/vm.ts';
import { type CloudletNetwork, tapName } from '../../network/index.ts';
import { guardedBy } from './guard.ts';
import type { HandoffRecord } from './record.ts';

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
const macOf = (index: number): string => `02:00:00:00:00:0${index}`;
const place = { address: '10.4.0.10/24', subnet: '10.4.0.0/24', gateway: '10.4.0.1' };

function vmOn(names: string[], more: Partial<VmRecord> = {}): VmRecord {
  const nets = names.map((network, index) => ({ network, mac: macOf(index) }));
  const spec = { nets, seed: { hostname: 'web', sshKeys: [], addresses: [] } };
  return { id: newId(), spec, ...more } as unknown as VmRecord;
}

test('a VM may use what the cloudlet gave it, on the interface that serves', () => {
  const vm = vmOn(['user', 'lan', 'lan'], { attachment: { serving: 1, waiting: 2, place } });
  assert.deepEqual(guardedBy(networks, [vm], []), {
    taps: [
      { tap: tapName(vm.id, 1), mac: macOf(1), addresses: ['10.4.0.10'] },
      { tap: tapName(vm.id, 2), mac: macOf(2), addresses: [] },
    ],
    tunnelRemotes: [],
  });
});

test('where the cloudlet gives no addresses only the MAC is held', () => {
  const vm = vmOn(['bare']);
  assert.deepEqual(guardedBy(networks, [vm], []).taps, [{ tap: tapName(vm.id, 0), mac: macOf(0) }]);
});

test('an address that the caller has set is as good as one of ours', () => {
  const vm = vmOn(['lan']);
  vm.spec.seed.addresses.push({ mac: macOf(0), address: '10.4.0.77/24' });
  vm.spec.seed.addresses.push({ mac: macOf(0), address: 'fd00::7/64' });
  assert.deepEqual(guardedBy(networks, [vm], []).taps[0]?.addresses, ['10.4.0.77']);
});

test('a VM on its way has its next address, too, and the tunnel is for its other end alone', () => {
  const vm = vmOn(['lan', 'lan'], { attachment: { serving: 0, waiting: 1, place } });
  const next = { mac: macOf(1), address: '10.5.0.12/24', subnet: '10.5.0.0/24', gateway: '10.5.0.1' };
  const handoff = {
    last: { ...place, mac: macOf(0) },
    next,
    tunnel: { vni: 1, local: '192.0.2.1', remote: '192.0.2.2' },
  };
  const record = { vmId: vm.id, handoff } as unknown as HandoffRecord;
  const { taps, tunnelRemotes } = guardedBy(networks, [vm], [record]);
  assert.deepEqual(
    taps.map(({ addresses }) => addresses),
    [['10.4.0.10'], ['10.5.0.12']],
  );
  assert.deepEqual(tunnelRemotes, ['192.0.2.2']);
});
