import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { claimDirectory, isLeftBehind, listLabs, newRecord, readRecord, saveRecord } from './record.ts';
import { parseLab } from './spec.ts';

let directory: string;
before(async () => {
  directory = await mkdtemp(path.join(tmpdir(), 'viper-labs-'));
  process.env.VIPER_LABS = directory;
});
after(() => rm(directory, { recursive: true }));

const record = (name: string) => newRecord({ spec: parseLab({ name }), subnet: 1, emulator: 'vde' });
/** A process that has been, by its start time: nobody has this one any more. */
const dead = { pid: process.pid, startTicks: 0 };

test('a lab is known from when it is claimed, and a second one of its name is refused', async () => {
  const one = await record('one');
  await claimDirectory(one);
  assert.deepEqual(await listLabs(), ['one']);
  await assert.rejects(claimDirectory(await record('one')), {
    code: 'name_taken',
    message: /a lab 'one' already/,
  });
  await saveRecord({ ...one, isReady: true });
  assert.equal((await readRecord('one'))?.isReady, true);
  assert.equal(await readRecord('two'), undefined);
  assert.deepEqual(await listLabs(), ['one'], 'nothing half made is left of the second');
});

test('a lab is left behind when its maker is gone, unless it is whole and meant to stay', async () => {
  const mine = await record('mine');
  assert.equal(await isLeftBehind(mine), false);
  assert.equal(await isLeftBehind({ ...mine, maker: dead }), true);
  assert.equal(await isLeftBehind({ ...mine, maker: dead, isReady: true }), true);
  const staying = { ...mine, maker: dead, stays: true };
  assert.equal(await isLeftBehind(staying), true, 'its maker was killed half-way');
  assert.equal(await isLeftBehind({ ...staying, isReady: true }), false);
  assert.equal(await isLeftBehind({ ...staying, isReady: true, bootId: 'before' }), true);
  assert.equal(await isLeftBehind(undefined), true);
});
