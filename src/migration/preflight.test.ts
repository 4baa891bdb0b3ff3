import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { VmToMove } from '../model/migration.ts';
import { GiB, MiB } from '../model/units.ts';
import { checkFit, type DestinationFacts } from './preflight.ts';

const vm: VmToMove = {
  id: '11111111-1111-4111-8111-111111111111',
  name: 'one',
  spec: {
    machine: 'pc-q35-10.0',
    accelerator: 'auto',
    cpu: { model: 'Nehalem', count: 2 },
    memoryBytes: GiB,
    disk: { image: 'sha256:aa', sizeBytes: 4 * GiB },
    nets: [{ network: 'lan', mac: '02:00:00:00:00:01' }],
    seed: { hostname: 'one', sshKeys: [], addresses: [] },
  },
  epoch: 1,
  runningWith: 'tcg',
  running: true,
  image: { digest: 'sha256:aa', format: 'qcow2', fileBytes: 300 * MiB, virtualBytes: 2 * GiB },
  diskBytes: 100 * MiB,
};

const roomy: DestinationFacts = {
  qemu: {
    version: '10.0.2',
    machines: ['pc-q35-7.2', 'pc-q35-10.0'],
    cpuModels: ['Nehalem'],
    missingCpuFeatures: {},
    canPostcopy: true,
  },
  featuresWith: 'tcg',
  accelerators: ['tcg'],
  memory: { freeBytes: 4 * GiB },
  disk: { freeBytes: 4 * GiB },
  images: ['sha256:aa'],
  storages: ['nas'],
  seesDisk: true,
  networks: ['user', 'lan'],
  vms: [{ id: 'other', name: 'two' }],
  clock: { offsetMs: 2000, uncertaintyMs: 20 },
};

const copied = { mode: 'precopy', storage: 'copied' } as const;
const source = { qemu: { version: '10.0.2' }, missingCpuFeatures: [] as string[] };
const onNas: VmToMove = { ...vm, spec: { ...vm.spec, disk: { ...vm.spec.disk, storage: 'nas' } } };
const fieldsOf = (destination: DestinationFacts, shared?: VmToMove): string[] =>
  checkFit(
    shared ?? vm,
    shared ? { ...copied, storage: 'shared' } : copied,
    source,
    destination,
  ).problems.map(({ field }) => field);

test('a VM that fits has no problems', () => {
  assert.deepEqual(checkFit(vm, copied, source, roomy), { problems: [], imageToSend: false });
});

test('everything that does not fit is told at once', () => {
  const poor: DestinationFacts = {
    qemu: {
      ...roomy.qemu,
      version: '7.2.22',
      machines: ['pc-q35-7.2'],
      cpuModels: ['qemu64'],
    },
    featuresWith: 'kvm',
    accelerators: ['kvm'],
    memory: { freeBytes: MiB },
    disk: { freeBytes: MiB },
    images: [],
    storages: [],
    seesDisk: false,
    networks: ['user'],
    vms: [{ id: vm.id, name: 'one' }],
    clock: { offsetMs: -90_000, uncertaintyMs: 100 },
  };
  const { problems } = checkFit(vm, copied, source, poor);
  assert.deepEqual(
    problems.map(({ field }) => field),
    ['machine', 'cpu.model', 'accelerator', 'memory', 'disk', 'nets.0.network', 'id', 'clock'],
  );
  assert.match(problems[0]!.message, /7\.2\.22, which is older than the source's 10\.0\.2/);
});

test('a missing image is to be sent first, and needs room', () => {
  const without = { ...roomy, images: [] };
  assert.deepEqual(checkFit(vm, copied, source, without), { problems: [], imageToSend: true });
  assert.deepEqual(fieldsOf({ ...without, disk: { freeBytes: 200 * MiB } }), ['disk']);
});

test('a shared disk needs neither room nor image', () => {
  const bare = { ...roomy, images: [], disk: { freeBytes: 0 } };
  assert.deepEqual(fieldsOf(bare, onNas), []);
});

test('a disk is shared only with who has its storage, and finds the disk there', () => {
  assert.deepEqual(fieldsOf({ ...roomy, storages: ['other'] }, onNas), ['disk.storage']);
  assert.deepEqual(fieldsOf({ ...roomy, seesDisk: false }, onNas), ['disk.storage']);
  assert.deepEqual(fieldsOf(roomy, vm), ['disk.storage']);
});

test('a name that is taken is told, unless the VM itself is there already', () => {
  assert.deepEqual(fieldsOf({ ...roomy, vms: [{ id: 'other', name: 'one' }] }), ['name']);
  assert.deepEqual(fieldsOf({ ...roomy, vms: [{ id: vm.id, name: 'one' }] }), ['id']);
});

test('a clock is only wrong if the delay of the link does not explain it', () => {
  assert.deepEqual(fieldsOf({ ...roomy, clock: { offsetMs: 40_000, uncertaintyMs: 15_000 } }), []);
  assert.deepEqual(fieldsOf({ ...roomy, clock: { offsetMs: 40_000, uncertaintyMs: 5_000 } }), ['clock']);
});

test('a feature that the VM has and the CPU there has not is told by its name', () => {
  const lacking = (there: string[], here: string[], runningWith: 'kvm' | 'tcg' = 'tcg') =>
    checkFit(
      { ...vm, runningWith },
      copied,
      { ...source, missingCpuFeatures: here },
      {
        ...roomy,
        accelerators: ['kvm', 'tcg'],
        featuresWith: 'kvm',
        qemu: { ...roomy.qemu, missingCpuFeatures: { Nehalem: there } },
      },
    ).problems.map(({ field, value }) => ({ field, value }));
  assert.deepEqual(lacking(['avx2', 'pcid'], ['pcid'], 'kvm'), [{ field: 'cpu.features', value: ['avx2'] }]);
  assert.deepEqual(lacking(['pcid'], ['pcid'], 'kvm'), []);
  // What KVM lacks there says nothing of a VM that QEMU emulates.
  assert.deepEqual(lacking(['avx2'], [], 'tcg'), []);
});

test('a mode that may come to post-copy needs a host that lets QEMU do it', () => {
  const plain = { ...roomy, qemu: { ...roomy.qemu, canPostcopy: false } };
  const modesRefused = (['precopy', 'auto', 'hybrid'] as const).filter(
    (mode) => checkFit(vm, { mode, storage: 'copied' }, source, plain).problems.length > 0,
  );
  assert.deepEqual(modesRefused, ['auto', 'hybrid']);
});

test('a disk that comes by way of relays wants room for twice its size', () => {
  const diskRelays = [{ id: vm.id, name: 'north' }];
  const relayed = { ...copied, relayed: { relays: diskRelays, replicas: 1, diskRelays } } as const;
  const tight = { ...roomy, disk: { freeBytes: 2 * vm.diskBytes - 1 } };
  assert.deepEqual(checkFit(vm, copied, source, tight).problems, []);
  assert.deepEqual(
    checkFit(vm, relayed, source, tight).problems.map(({ field, wanted }) => [field, wanted]),
    [['disk', 2 * vm.diskBytes]],
  );
  assert.deepEqual(checkFit(vm, relayed, source, roomy).problems, []);
});
