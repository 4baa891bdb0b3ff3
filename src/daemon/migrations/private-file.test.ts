import assert from 'node:assert/strict';
import { mkdtemp, readdir, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { PrivateFile } from './private-file.ts';

test('a manifest is what was written last, for nobody else to read, and gone when it is removed', async (context) => {
  const directory = await mkdtemp(path.join(tmpdir(), 'viper-manifest-'));
  context.after(() => rm(directory, { recursive: true }));
  const manifest = new PrivateFile(directory, 'manifest');
  assert.equal(await manifest.read(), undefined);
  await manifest.write(Buffer.from('first'));
  // What a daemon that died has left.
  await writeFile(path.join(directory, 'manifest.new'), 'half', { mode: 0o644 });
  await manifest.write(Buffer.from('second'));
  assert.equal((await manifest.read())?.toString(), 'second');
  assert.equal((await stat(path.join(directory, 'manifest'))).mode & 0o777, 0o600);
  assert.deepEqual(await readdir(directory), ['manifest']);
  await manifest.remove();
  await manifest.remove();
  assert.equal(await manifest.read(), undefined);
});
