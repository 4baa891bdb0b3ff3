import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { AppError } from '../model/errors.ts';
import { type LabWish, parseLab, parseWire } from './spec.ts';

test('nothing asked for is the setting of the thesis', () => {
  const { name, cloudlets, wan, radio } = parseLab();
  assert.deepEqual([name, cloudlets], ['lab', ['c1', 'c2', 'c3']]);
  assert.deepEqual(wan, { rttMs: 20, rateBps: 350e6, lossPercent: 0, isCut: false });
  assert.equal(radio.rateBps, 100e6);
});

test('what is asked for of a link goes over what it was', () => {
  const before = { rttMs: 20, rateBps: 350e6, lossPercent: 2, isCut: true };
  assert.deepEqual(parseWire('link', { rttMs: 100 }, before), { ...before, rttMs: 100 });
});

test('a refusal names the field, its value and what was wanted', () => {
  const refusals: [LabWish, RegExp][] = [
    [{ name: 'a-b' }, /name is 'a-b', wanted a letter and up to 7/],
    [{ cloudlets: [] }, /cloudlets is 0, wanted 1 to 16/],
    [{ cloudlets: Array.from({ length: 17 }, (_, index) => `c${index}`) }, /cloudlets is 17/],
    [{ cloudlets: ['c1', 'c1'] }, /cloudlets is 'c1', wanted a name that is not in use/],
    [{ cloudlets: ['core'] }, /cloudlets is 'core', wanted a name that is not in use/],
    [{ devices: [{ name: 'radio' }] }, /devices.name is 'radio'/],
    [{ devices: [{ name: 'x;reboot' }] }, /devices.name is 'x;reboot'/],
    [{ devices: [{ name: 'phone', at: 'c9' }] }, /devices.at is 'c9', wanted one of c1, c2, c3/],
    [{ wan: { rttMs: -1 } }, /wan.rttMs is -1, wanted 0 to 10000 ms/],
    [{ wan: { rttMs: Number.NaN } }, /wan.rttMs is NaN/],
    [{ wan: { lossPercent: 101 } }, /wan.lossPercent is 101/],
    [{ radio: { rateBps: 60 } }, /radio.rateBps is 60, wanted 0 \(no limit\) or 200 kbit/],
  ];
  for (const [wish, message] of refusals)
    assert.throws(
      () => parseLab(wish),
      (error: AppError) => error.code === 'invalid_request' && message.test(error.message),
      String(message),
    );
});
