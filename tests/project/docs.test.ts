/** Documents that say what the code says are written from it: `npm run docs` writes them, this compares. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { apiPage, errorsPage } from '../../scripts/docs.ts';
import { errorKinds } from '../../src/model/errors.ts';

const root = path.resolve(import.meta.dirname, '../..');
const read = (file: string): string => readFileSync(path.join(root, file), 'utf8');

test('docs/errors.md lists every code with its status', () => {
  assert.equal(read('docs/errors.md'), errorsPage());
  for (const [code, { status }] of Object.entries(errorKinds)) {
    assert.match(errorsPage(), new RegExp(`\`${code}\` \\| ${status} `));
  }
});

test('docs/api.md lists every endpoint of the contract', () => {
  assert.equal(read('docs/api.md'), apiPage());
});

test('docs/dependencies.md gives a reason for every dependency and names no other', () => {
  const { dependencies, devDependencies } = JSON.parse(read('package.json'));
  const named = [...read('docs/dependencies.md').matchAll(/^\| `([^`]+)` \|/gm)].map((match) => match[1]);
  assert.deepEqual(named.toSorted(), Object.keys({ ...dependencies, ...devDependencies }).toSorted());
});

test('docs/pains.md names tests that there are, for each of its ten complaints', () => {
  const rows = [...read('docs/pains.md').matchAll(/^\| (.*?) ?\| .*? ?\| `([^`]+)`: (.+) \|$/gm)];
  const complaints = rows.map(([, complaint]) => complaint!).filter((complaint) => complaint !== '');
  assert.deepEqual(
    complaints.map((complaint) => Number.parseInt(complaint, 10)),
    Array.from({ length: 10 }, (_, index) => index + 1),
  );
  // A name may be cut short, where the test says its mode before.
  for (const [, , file, name] of rows) assert.ok(read(file!).includes(name!), `${file}: ${name}`);
});
