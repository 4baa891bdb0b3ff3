import assert from 'node:assert/strict';
import { test } from 'node:test';
import { AppError } from '../model/errors.ts';
import { MiB } from '../model/units.ts';
import type { VmSpec } from '../model/vm.ts';
import { checkSpec, Host } from './host.ts';

const facts = {
  qemu: {
    path: '/usr/bin/qemu-system-x86_64',
    version: '7.2.0',
    machines: [{ name: 'pc-q35-7.2', maxCpus: 8 }],
    cpuModels: ['Nehalem', 'max', 'host', 'qemu64'],
    missingCpuFeatures: {},
    canPostcopy: true,
  },
  acceleratorFacts: { kvmOpens: true, cpuVirtualises: false },
};

const spec: VmSpec = {
  machine: 'pc-q35-7.2',
  accelerator: 'auto',
  cpu: { model: 'Nehalem', count: 1 },
  memoryBytes: 128 * MiB,
  disk: { image: '', sizeBytes: MiB },
  nets: [],
  seed: { hostname: 'a', sshKeys: [], addresses: [] },
};

test('a spec that fits gets its accelerator', () => {
  assert.equal(checkSpec(spec, facts), 'tcg');
});

test('what this QEMU lacks, and what would differ between hosts, is refused by field and value', () => {
  const nets = Array.from({ length: 9 }, () => ({ network: 'user', mac: '02:00:00:00:00:01' }));
  const cases: [Partial<VmSpec>, string, unknown][] = [
    [{ machine: 'pc-q35-10.0' }, 'machine', 'pc-q35-10.0'],
    [{ machine: 'q35' }, 'machine', 'q35'],
    [{ machine: 'pc' }, 'machine', 'pc'],
    [{ machine: 'pc-i440fx-7.2' }, 'machine', 'pc-i440fx-7.2'],
    [{ cpu: { model: 'host', count: 1 } }, 'cpu.model', 'host'],
    [{ cpu: { model: 'max', count: 1 } }, 'cpu.model', 'max'],
    [{ cpu: { model: 'SapphireRapids', count: 1 } }, 'cpu.model', 'SapphireRapids'],
    [{ cpu: { model: 'Nehalem', count: 9 } }, 'cpu.count', 9],
    [{ nets }, 'nets', 9],
    [{ accelerator: 'kvm' }, 'accelerator', 'kvm'],
  ];
  for (const [change, field, value] of cases) {
    assert.throws(
      () => checkSpec({ ...spec, ...change }, facts),
      (error) => {
        assert.ok(error instanceof AppError);
        assert.equal(error.code, 'unsupported');
        assert.deepEqual([error.details.field, error.details.value], [field, value]);
        assert.ok(error.details.wanted);
        return true;
      },
    );
  }
});

test('a QEMU that is not installed is named', async () => {
  await assert.rejects(new Host('qemu-system-nonesuch').facts(), {
    code: 'unsupported',
    details: { missing: 'qemu-system-nonesuch' },
  });
});
