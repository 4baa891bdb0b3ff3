import assert from 'node:assert/strict';
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { test } from 'node:test';
import { fastFlags, HeapPolicy, smallFlag, smallFlags } from './heap-policy.ts';

const launcher = path.resolve(import.meta.dirname, '../../../bin/viper');

function flagsSet(startedWith: string[], wishes: boolean[]): string[] {
  const flags: string[] = [];
  const policy = new HeapPolicy({ startedWith, setFlags: (each) => flags.push(each) });
  for (const isFast of wishes) policy.favourSpeed(isFast);
  return flags;
}

test('a daemon that was started to be small is so but while VMs move', () => {
  assert.deepEqual(flagsSet([smallFlag], [false, true, true, false, false]), [fastFlags, smallFlags]);
});

test('one that was started in another way stays as it is', () => {
  assert.deepEqual(flagsSet(['--max-semi-space-size=1'], [true, false]), []);
});

test('the launcher starts daemons with the flag that is looked for', async () => {
  assert.ok((await readFile(launcher, 'utf8')).includes(` ${smallFlag} `));
});
