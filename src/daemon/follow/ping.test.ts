import assert from 'node:assert/strict';
import { test } from 'node:test';
import { isHostAddress, parsePingLine, pingBriefly } from './ping.ts';

test('lines of ping are answers, losses or nothing', () => {
  assert.equal(parsePingLine('64 bytes from 10.4.0.2: icmp_seq=1 ttl=64 time=0.045 ms'), 0.045);
  assert.equal(parsePingLine('64 bytes from 2001:db8::1: icmp_seq=9 ttl=64 time=12 ms'), 12);
  assert.equal(parsePingLine('no answer yet for icmp_seq=4'), 'lost');
  assert.equal(parsePingLine('From 10.4.0.1 icmp_seq=1 Destination Host Unreachable'), 'lost');
  for (const other of ['PING 10.4.0.2 (10.4.0.2) 56(84) bytes of data.', '', 'time=3 ms'])
    assert.equal(parsePingLine(other), undefined);
});

test('only one host is pinged, and nothing that ping would take for an option', () => {
  for (const good of ['10.4.0.2', '127.0.0.1', '2001:db8::1', 'fe80::1'])
    assert.ok(isHostAddress(good), good);
  for (const bad of [
    '',
    '-f',
    '0.0.0.0',
    '224.0.0.1',
    '255.255.255.255',
    'ff02::1',
    '::',
    'fe80::1%eth0',
    'host',
  ])
    assert.ok(!isHostAddress(bad), bad);
});

test('a host that answers has a round trip, an address that is none has not', async () => {
  const rtt = await pingBriefly('127.0.0.1', AbortSignal.timeout(20_000));
  assert.ok(rtt !== undefined && rtt >= 0);
  assert.equal(await pingBriefly('-f', AbortSignal.timeout(20_000)), undefined);
});

test('who has no time left gets no round trip', async () => {
  assert.equal(await pingBriefly('127.0.0.1', AbortSignal.abort()), undefined);
});
