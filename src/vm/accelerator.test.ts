import assert from 'node:assert/strict';
import { test } from 'node:test';
import { AppError } from '../model/errors.ts';
import { chooseAccelerator } from './accelerator.ts';

const works = { kvmOpens: true, cpuVirtualises: true };

test('KVM is taken only where both the device opens and the CPU can', () => {
  assert.equal(chooseAccelerator('auto', works), 'kvm');
  assert.equal(chooseAccelerator('auto', { ...works, cpuVirtualises: false }), 'tcg');
  assert.equal(chooseAccelerator('auto', { ...works, kvmOpens: false }), 'tcg');
});

test('TCG works everywhere', () => {
  assert.equal(chooseAccelerator('tcg', { kvmOpens: false, cpuVirtualises: false }), 'tcg');
  assert.equal(chooseAccelerator('tcg', works), 'tcg');
});

test('KVM by name is refused, with the reason, where it does not work', () => {
  assert.equal(chooseAccelerator('kvm', works), 'kvm');
  for (const [facts, reason] of [
    [{ kvmOpens: false, cpuVirtualises: true }, /does not open/],
    [{ kvmOpens: true, cpuVirtualises: false }, /neither vmx nor svm/],
  ] as const) {
    assert.throws(
      () => chooseAccelerator('kvm', facts),
      (error) => error instanceof AppError && error.code === 'unsupported' && reason.test(error.message),
    );
  }
});
