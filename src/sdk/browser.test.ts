import assert from 'node:assert/strict';
import { readFile } from 'node:fs/promises';
import { test } from 'node:test';

/** Imports and re-exports that are there at run time; those of types are stripped. */
const runtimeImport = /^(?:import|export)\s+(?!type\s)(?:[^'"]*?\sfrom\s+)?['"]([^'"]+)['"]/gm;

/** All modules that a file reaches at run time, with the path that leads there. */
async function reach(file: URL, via: string[] = [], seen = new Map<string, string[]>()) {
  const source = await readFile(file, 'utf8');
  assert.doesNotMatch(source, /\bimport\(/, `${file.pathname} has an import that this test cannot follow`);
  for (const [, specifier = ''] of source.matchAll(runtimeImport)) {
    const target = specifier.startsWith('.') ? new URL(specifier, file).href : specifier;
    if (seen.has(target)) continue;
    const path = [...via, file.pathname.split('/src/')[1] ?? ''];
    seen.set(target, path);
    if (specifier.startsWith('.')) await reach(new URL(target), path, seen);
  }
  return seen;
}

test('the client reaches no package and no module of Node at run time, so that it runs in a browser', async () => {
  const modules = await reach(new URL('./client.ts', import.meta.url));
  const foreign = [...modules].filter(([target]) => !target.startsWith('file:'));
  assert.deepEqual(foreign, []);
  const rooms = new Set([...modules.keys()].map((target) => target.split('/src/')[1]?.split('/')[0]));
  assert.deepEqual([...rooms].sort(), ['contract', 'model', 'sdk']);
  assert.ok([...modules.keys()].some((target) => target.endsWith('/contract/endpoints.ts')));
});

test('the client uses no global that only Node has', async () => {
  const modules = await reach(new URL('./client.ts', import.meta.url));
  for (const target of ['file:', ...modules.keys()].filter((each) => each.includes('/src/'))) {
    const source = await readFile(new URL(target), 'utf8');
    assert.doesNotMatch(source, /\b(?:Buffer|process|setImmediate|require)\s*[.(]/, target);
  }
});
