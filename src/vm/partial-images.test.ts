/** An image whose transfer is cut comes in pieces, and is whole or not there. */
import assert from 'node:assert/strict';
import { createHash, randomBytes } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdir, mkdtemp, readdir, readFile, rm, utimes, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { AppError } from '../model/errors.ts';
import { cleanLeftovers, importImage } from './images.ts';
import { takePartial } from './partial-images.ts';

const partBytes = 300_000;
// It begins as a boot sector does, ends in zeros, and is cut within a block.
const bytes = Buffer.concat([
  randomBytes(510),
  Buffer.from([0x55, 0xaa]),
  randomBytes(600_064),
  Buffer.alloc(5120),
]);
const digest = `sha256:${createHash('sha256').update(bytes).digest('hex')}` as const;

async function makeRoot(context: { after: (undo: () => Promise<void>) => void }): Promise<string> {
  const root = await mkdtemp(path.join(tmpdir(), 'viper-partial-'));
  context.after(() => rm(root, { recursive: true, force: true }));
  return root;
}

/** Brings what comes after the bytes that are there, at most as many as `most`, and breaks off then. */
async function bring(
  root: string,
  { from = bytes, most = Number.POSITIVE_INFINITY, code = 'peer_unreachable' } = {},
) {
  const starts: number[] = [];
  const source = async function* () {
    const rest = from.subarray(starts[0]);
    yield rest.subarray(0, most);
    if (most < rest.length) throw new AppError(code as 'cancelled', 'cut');
  };
  const done = await importImage(root, {
    source: source(),
    signal: new AbortController().signal,
    expectedDigest: digest,
    format: 'raw',
    sizeBytes: bytes.length,
    reserveBytes: 0,
    onStart: (start) => starts.push(start),
  }).catch((error: AppError) => error);
  return { start: starts[0], done };
}

test('a transfer that was cut goes on where it was, also after another start, and its digest is that of all', async (context) => {
  const root = await makeRoot(context);
  const first = await bring(root, { most: partBytes });
  assert.deepEqual([first.start, (first.done as AppError).code], [0, 'peer_unreachable']);
  await cleanLeftovers(root);
  const second = await bring(root, { most: 1000 });
  assert.equal(second.start, partBytes);
  const third = await bring(root);
  assert.equal(third.start, partBytes + 1000);
  if (third.done instanceof Error) throw third.done;
  const file = path.join(root, digest.replace(':', '-'), 'disk.raw');
  assert.ok((await readFile(file)).equals(bytes));
  assert.deepEqual(await readdir(path.join(root, 'partial')), []);
});

test('bytes that are wrong, and a transfer that nobody wants any more, leave nothing', async (context) => {
  const root = await makeRoot(context);
  await bring(root, { most: partBytes });
  const wrong = Buffer.from(bytes);
  wrong[partBytes + 7]! ^= 1;
  const refused = await bring(root, { from: wrong });
  assert.deepEqual([refused.start, (refused.done as AppError).code], [partBytes, 'digest_mismatch']);
  assert.deepEqual(await readdir(path.join(root, 'partial')), []);
  await bring(root, { most: partBytes, code: 'cancelled' });
  assert.deepEqual(await readdir(path.join(root, 'partial')), []);
  assert.equal((await bring(root, { most: partBytes })).start, 0);
});

test('those that are old go at the start of a daemon, and the oldest where there are too many', async (context) => {
  const root = await makeRoot(context);
  const make = async (name: string, ageMs: number) => {
    const directory = path.join(root, 'partial', name);
    await mkdir(directory, { recursive: true });
    await writeFile(path.join(directory, 'disk'), 'x');
    const at = new Date(Date.now() - ageMs);
    await utimes(path.join(directory, 'disk'), at, at);
    return directory;
  };
  const old = await make('old', 25 * 3_600_000);
  const young = await make('young', 1000);
  await cleanLeftovers(root);
  assert.deepEqual([existsSync(old), existsSync(young)], [false, true]);
  for (let index = 0; index < 10; index += 1) await make(`more-${index}`, 10_000 + index);
  const taken = await takePartial(root, digest);
  taken.keep();
  assert.equal((await readdir(path.join(root, 'partial'))).length, 8);
  assert.ok(existsSync(young) && existsSync(taken.path));
});
