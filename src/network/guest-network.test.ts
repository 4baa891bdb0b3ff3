import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { test } from 'node:test';
import { guestRequest, parseJoined, parseStatus, requireDone } from './guest-network.ts';

const place = {
  mac: '02:00:00:00:00:01',
  address: '10.4.0.10/24',
  subnet: '10.4.0.0/24',
  gateway: '10.4.0.1',
};
const said = (stdout: string, exitCode = 0, stderr = '') => ({ stdout, exitCode, stderr });

test('each step is one call of one script, whose values are arguments', () => {
  const { argv, input, timeoutMs } = guestRequest({ name: 'join', next: place, last: place, waitMs: 9500 });
  const word = '02:00:00:00:00:01,10.4.0.10/24,10.4.0.0/24,10.4.0.1';
  assert.deepEqual(argv, ['/bin/sh', '-s', '--', 'join', word, word, '10']);
  assert.match(input, /^#!\/bin\/sh\n/);
  assert.ok(timeoutMs > 9500);
});

test('the script is one that a POSIX shell takes, and refuses what it does not know', () => {
  const { input } = guestRequest({ name: 'status' });
  execFileSync('/bin/sh', ['-n'], { input });
  for (const words of [
    ['dance'],
    ['prepare', 'x'],
    ['forget', '10.0.0.1; reboot'],
    ['prepare', 'a', 'b', '1'],
  ]) {
    const run = () =>
      execFileSync('/bin/sh', ['-s', '--', ...words], { input, stdio: ['pipe', 'pipe', 'pipe'] });
    assert.throws(run, (error: { status: number }) => [64, 69].includes(error.status), words.join(' '));
  }
});

test('what the guest answers is taken as what it is, and nonsense is an error', () => {
  assert.deepEqual(parseJoined(said('{"connections":2,"joined":1,"dropped":false}')), {
    connections: 2,
    joined: 1,
    dropped: false,
  });
  assert.deepEqual(parseStatus(said('{"interfaces":[],"endpoints":[],"subflows":[]}')).subflows, []);
  for (const bad of ['', 'null', '[]', '{"connections":-1,"joined":0,"dropped":true}', '{"connections":1}'])
    assert.throws(() => parseJoined(said(bad)), { code: 'qemu_failed', message: /makes no sense/ }, bad);
  const many = JSON.stringify({ interfaces: [], endpoints: [], subflows: Array(1001).fill({}) });
  assert.throws(() => parseStatus(said(many)), { code: 'qemu_failed' });
});

test('a step that failed tells what the guest said', () => {
  assert.throws(() => requireDone('prepare', said('', 66, 'no interface has the address\n')), {
    code: 'qemu_failed',
    message: 'The guest failed to prepare its network (exit 66): no interface has the address',
  });
});
