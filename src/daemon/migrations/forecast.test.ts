import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { MigrationOptions, VmToMove } from '../../model/migration.ts';
import { GiB, MiB } from '../../model/units.ts';
import { forecast, linkBpsOf } from './forecast.ts';
import type { MigrationRecord } from './record.ts';

const vm = {
  spec: { memoryBytes: GiB },
  diskBytes: 100 * MiB,
  image: { fileBytes: 300 * MiB },
} as VmToMove;
const options = (bandwidthBps?: number): MigrationOptions => ({
  mode: 'precopy',
  storage: 'copied',
  limits: { downtimeMs: 300, autoConverge: false, ...(bandwidthBps ? { bandwidthBps } : {}) },
  channels: 0,
});
const facts = { vm, options: options(), dirtyBps: 0, linkBps: 800e6, rttMs: 10, sendsImage: false };

test('a forecast counts disk and memory, and the image where it is missing', () => {
  assert.equal(forecast(facts).bytes, GiB + 100 * MiB);
  assert.equal(forecast({ ...facts, sendsImage: true }).bytes, GiB + 400 * MiB);
});

test('the limit counts where the link could do more, and the link where the limit is higher', () => {
  const inputOf = (bandwidthBps: number, linkBps: number | undefined) =>
    forecast({ ...facts, linkBps, options: options(bandwidthBps) }).inputs.bandwidthBps;
  assert.equal(inputOf(100e6, 800e6), 100e6);
  assert.equal(inputOf(900e6, 800e6), 800e6);
  assert.equal(inputOf(5e9, undefined), 1e9);
});

test('a guest that writes faster than the link carries does not converge', () => {
  assert.equal(forecast(facts).converges, true);
  assert.equal(forecast({ ...facts, dirtyBps: 900e6 }).converges, false);
});

test('the link is as fast as the last migration to that peer was', () => {
  const record = (role: string, id: string, rateBps?: number) =>
    ({ role, peer: { id }, ...(rateBps ? { result: { rateBps } } : {}) }) as MigrationRecord;
  const records = [
    record('source', 'b', 5),
    record('source', 'b', 7),
    record('source', 'c', 9),
    record('destination', 'b'),
  ];
  assert.equal(linkBpsOf(records, 'b'), 7);
  assert.equal(linkBpsOf(records, 'd'), undefined);
  // A condensed one says little by what it sent, but its sessions say how fast the link was.
  const condensed = {
    ...record('source', 'b', 1),
    options: { engine: 'condensed' },
    result: { rateBps: 1, link: { rateBps: 8 } },
  } as MigrationRecord;
  assert.equal(linkBpsOf([...records, condensed], 'b'), 8);
});
