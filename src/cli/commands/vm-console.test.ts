import assert from 'node:assert/strict';
import { test } from 'node:test';
import { afterOverlap } from './vm-console.ts';

test('what came live and is in the log already is shown once', () => {
  assert.equal(afterOverlap('boot\nlogin: ', ''), '');
  assert.equal(afterOverlap('', 'login: '), 'login: ');
  assert.equal(afterOverlap('boot\nlogin: ', 'login: root\n'), 'root\n');
  assert.equal(afterOverlap('boot\nlogin: ', 'boot\nlogin: '), '');
  assert.equal(afterOverlap('boot\n', 'login: '), 'login: ');
});
