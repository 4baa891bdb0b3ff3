/** FORMAT.md says what the code does. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { bodyLengths, frameTypes, refuseReasons } from './frames.ts';
import { defaultLimits } from './limits.ts';
import { linkPurposes } from './purposes.ts';

const text = readFileSync(path.join(import.meta.dirname, 'FORMAT.md'), 'utf8');

/** The cells of the table whose first header is this. */
function rowsOf(firstHeader: string): string[][] {
  const lines = text.split('\n');
  const start = lines.findIndex((line) => line.startsWith(`| ${firstHeader} |`)) + 2;
  const end = lines.findIndex((line, index) => index >= start && !line.startsWith('|'));
  return lines.slice(start, end).map((line) =>
    line
      .split('|')
      .map((cell) => cell.trim())
      .slice(1, -1),
  );
}

test('the table of frames is that of the code', () => {
  assert.deepEqual(
    rowsOf('type').map(([type, name, least, most]) => [type, name, least, most]),
    frameTypes.map((name, index) => [
      String(index + 1),
      name.toUpperCase(),
      ...bodyLengths[name].map(String),
    ]),
  );
});

test('the table of reasons is that of the code', () => {
  assert.deepEqual(
    rowsOf('reason').map(([number, name]) => [number, name]),
    refuseReasons.map((name, index) => [String(index + 1), name]),
  );
});

test('the table of limits is that of the code', () => {
  assert.deepEqual(
    Object.fromEntries(rowsOf('limit').map(([name, value]) => [name, Number(value)])),
    defaultLimits,
  );
});

test('every purpose is named', () => {
  for (const purpose of linkPurposes) assert.ok(text.includes(`\`${purpose}\``), purpose);
});
