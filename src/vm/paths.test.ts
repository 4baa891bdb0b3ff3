import assert from 'node:assert/strict';
import { test } from 'node:test';
import { checkSocketPaths, machinePaths, socketPaths } from './paths.ts';

test('a socket path may have 107 bytes and not one more', () => {
  const longestName = Math.max(...socketPaths(machinePaths('/')).map((path) => path.length));
  const directory = `/${'d'.repeat(107 - longestName - 1)}`;
  checkSocketPaths(machinePaths(directory));
  assert.throws(() => checkSocketPaths(machinePaths(`${directory}d`)), { code: 'unsupported' });
  assert.throws(() => checkSocketPaths(machinePaths(directory.replace('dd', 'éd'))), { code: 'unsupported' });
});
