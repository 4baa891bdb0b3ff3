import assert from 'node:assert/strict';
import { test } from 'node:test';
import { formatAge, shortDigest } from './output.ts';
import { parseBitRate, parseCount, parseDuration, parseSeconds, parseSize } from './values.ts';

test('sizes are powers of 1024, with or without iB', () => {
  const sizes: [string, number][] = [
    ['1048576', 1048576],
    ['0', 0],
    ['12B', 12],
    ['64K', 65536],
    ['512M', 512 * 1024 ** 2],
    ['512MiB', 512 * 1024 ** 2],
    ['4G', 4 * 1024 ** 3],
    ['1.5GiB', 1.5 * 1024 ** 3],
    ['2T', 2 * 1024 ** 4],
  ];
  for (const [text, bytes] of sizes) assert.equal(parseSize(text), bytes, text);
});

test('a size that could mean two things, or nothing, is refused', () => {
  for (const text of ['', 'M', '512MB', '512m', '-1G', '1 G', '1e3', '0.3', '0x10', '9999999T', '∞']) {
    assert.throws(() => parseSize(text), /Wanted a size such as 512M/, text);
  }
});

test('a rate is bits per second, in powers of 1000', () => {
  const rates: [string, number][] = [
    ['2000000', 2e6],
    ['100M', 100e6],
    ['1.5G', 1.5e9],
    ['64K', 64e3],
  ];
  for (const [text, bps] of rates) assert.equal(parseBitRate(text), bps, text);
  for (const text of ['', 'M', '100MB', '100m', '-1', '100Mbit'])
    assert.throws(() => parseBitRate(text), /Wanted bits per second/, text);
});

test('a time has its unit', () => {
  const times: [string, number][] = [
    ['500ms', 500],
    ['30s', 30_000],
    ['1.5m', 90_000],
    ['2h', 7_200_000],
    ['30d', 2_592_000_000],
  ];
  for (const [text, ms] of times) assert.equal(parseDuration(text), ms, text);
  for (const text of ['', '30', 's', '-1s', '1 s', '1w', '1h30m', '1S']) {
    assert.throws(() => parseDuration(text), /Wanted a time with its unit/, text);
  }
});

test('what the API counts in seconds is whole seconds', () => {
  assert.equal(parseSeconds('30d'), 2_592_000);
  for (const text of ['500ms', '0s', '1.5s'])
    assert.throws(() => parseSeconds(text), /Wanted whole seconds/, text);
});

test('a count is a whole number', () => {
  assert.equal(parseCount('12'), 12);
  for (const text of ['', '-1', '1.5', 'two', '1e3'])
    assert.throws(() => parseCount(text), /whole number/, text);
});

test('ages and digests are short', () => {
  const now = Date.parse('2026-01-10T00:00:00Z');
  const ages: [string, string][] = [
    ['2026-01-09T23:59:48Z', '12s'],
    ['2026-01-09T23:55:00Z', '5m'],
    ['2026-01-09T20:00:00Z', '4h'],
    ['2026-01-01T00:00:00Z', '9d'],
    ['2026-01-10T00:00:05Z', '0s'],
    ['never', '?'],
  ];
  for (const [iso, age] of ages) assert.equal(formatAge(iso, now), age, iso);
  assert.equal(shortDigest(`sha256:${'0123456789abcdef'.repeat(4)}`), 'sha256:0123456789ab');
});
