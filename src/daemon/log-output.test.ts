import assert from 'node:assert/strict';
import { test } from 'node:test';
import { LogOutput } from './log-output.ts';

/** Takes so many bytes, and says then that there is no room. */
function disk(roomBytes: number) {
  const state = {
    text: '',
    roomBytes,
    write(bytes: Buffer): number {
      if (state.roomBytes === 0) throw Object.assign(new Error('no room'), { code: 'ENOSPC' });
      const taken = bytes.subarray(0, state.roomBytes);
      state.text += taken;
      state.roomBytes -= taken.length;
      return taken.length;
    },
  };
  return state;
}

test('lines go out as they are', () => {
  const file = disk(1000);
  const output = new LogOutput(file.write);
  output.write('{"a":1}\n');
  output.write('{"b":2}\n');
  assert.equal(file.text, '{"a":1}\n{"b":2}\n');
});

test('a full disk costs lines and holds nobody up, and what was lost is told when there is room', () => {
  const file = disk(12);
  const output = new LogOutput(file.write);
  output.write('{"a":1}\n');
  output.write('{"half":2}\n');
  output.write('{"lost":3}\n');
  assert.equal(file.text, '{"a":1}\n{"ha');
  file.roomBytes = 1000;
  output.write('{"c":4}\n');
  const lines = file.text.trimEnd().split('\n');
  assert.equal(lines.length, 4);
  assert.match(JSON.parse(lines[2]!).msg, /^2 lines of this log were lost$/);
  assert.deepEqual(JSON.parse(lines[3]!), { c: 4 });
});
