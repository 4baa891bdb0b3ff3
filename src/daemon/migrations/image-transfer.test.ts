/** An image between two daemons, over a real session of the link into a real store. */
import assert from 'node:assert/strict';
import { createHash, randomBytes } from 'node:crypto';
import { mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { type TestContext, test } from 'node:test';
import { type FakeDaemons, fakeDaemons } from '../../link/fake-daemons.ts';
import { AppError } from '../../model/errors.ts';
import { importImage } from '../../vm/images.ts';
import type { ImageService } from '../images.ts';
import { sendImage, takeImage } from './image-transfer.ts';

const bytes = Buffer.concat([randomBytes(510), Buffer.from([0x55, 0xaa]), randomBytes(512 * 8000)]);
const digestOf = (of: Buffer) => `sha256:${createHash('sha256').update(of).digest('hex')}` as const;

interface Store {
  root: string;
  file: string;
  /** How many bytes the destination says that it has, transfer by transfer. */
  starts: number[];
  images: Pick<ImageService, 'import'>;
}

async function makeStore(context: TestContext, content = bytes): Promise<Store> {
  const root = await mkdtemp(path.join(tmpdir(), 'viper-image-'));
  context.after(() => rm(root, { recursive: true, force: true }));
  const file = path.join(root, 'source');
  await writeFile(file, content);
  const starts: number[] = [];
  const takeIn: ImageService['import'] = async (source, { digest, onStart, ...request }, signal) => {
    const announce = (start: number) => {
      starts.push(start);
      onStart?.(start);
    };
    const known = { source, signal, expectedDigest: digest!, reserveBytes: 0, onStart: announce };
    return { ...(await importImage(root, { ...known, ...request })), aliases: [], createdAt: '' };
  };
  return { root, file, starts, images: { import: takeIn } };
}

/** One transfer, which `onBytes` may break off. */
async function transfer(
  daemons: FakeDaemons,
  { file, images }: Store,
  { abort, onBytes = () => {} }: { abort: AbortController; onBytes?: (sent: number) => void },
) {
  const hello = { digest: digestOf(bytes), format: 'raw', fileBytes: bytes.length };
  const { client, server } = await daemons.pair({ hello, signal: abort.signal });
  const taken = takeImage(server, images).then(
    () => undefined,
    (error: AppError) => error.code,
  );
  const sent = sendImage(client, file, { signal: abort.signal, onBytes }).then(
    () => undefined,
    (error: AppError) => error.code,
  );
  return { sent: await sent, taken: await taken };
}

test('an image arrives, whole and by its digest', async (context) => {
  await using daemons = await fakeDaemons();
  const store = await makeStore(context);
  const { sent, taken } = await transfer(daemons, store, { abort: new AbortController() });
  assert.deepEqual([sent, taken, store.starts], [undefined, undefined, [0]]);
  const file = path.join(store.root, digestOf(bytes).replace(':', '-'), 'disk.raw');
  assert.ok((await readFile(file)).equals(bytes));
});

test('one whose daemon stops goes on where it was; one that is cancelled leaves nothing', async (context) => {
  await using daemons = await fakeDaemons();
  const store = await makeStore(context);
  const partial = path.join(store.root, 'partial', digestOf(bytes).replace(':', '-'), 'disk');
  for (const code of ['interrupted', 'cancelled'] as const) {
    const abort = new AbortController();
    const onBytes = (sent: number) => {
      if (sent > bytes.length / 2) abort.abort(new AppError(code, 'no further'));
    };
    const { taken } = await transfer(daemons, store, { abort, onBytes });
    assert.equal(taken, code);
    if (code === 'interrupted') assert.ok((await stat(partial)).size < bytes.length);
  }
  assert.deepEqual(store.starts.length, 2);
  assert.deepEqual(await readdir(path.join(store.root, 'partial')), []);
});

test('an image whose bytes are not those of its digest is refused at both ends, and nothing of it stays', async (context) => {
  await using daemons = await fakeDaemons();
  const wrong = Buffer.from(bytes);
  wrong[bytes.length - 1]! ^= 1;
  const store = await makeStore(context, wrong);
  const { sent, taken } = await transfer(daemons, store, { abort: new AbortController() });
  assert.deepEqual([sent, taken], ['digest_mismatch', 'digest_mismatch']);
  assert.deepEqual((await readdir(store.root)).sort(), ['partial', 'source']);
  assert.deepEqual(await readdir(path.join(store.root, 'partial')), []);
});
