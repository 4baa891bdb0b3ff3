/**
 * Makes the first-boot disk of a guest: an ISO 9660 image that cloud-init's NoCloud source finds by its label
 * `cidata`. The same facts always give the same bytes, so two hosts make the same disk.
 */
import { chmod, mkdir, mkdtemp, open, rename, rm, writeFile } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';
import { MiB } from '../model/units.ts';
import { run } from './run.ts';
import { type SeedFacts, seedFiles } from './seed-files.ts';
import { explainNoSpace } from './space.ts';

export interface CreateSeedOptions extends SeedFacts {
  file: string;
  signal: AbortSignal;
}

/** All dates on the disk: they must not differ between two makings. */
const epochSeconds = Date.UTC(2000, 0, 1) / 1000;

/**
 * Writes the ISO to `file`, in place of one that is there. Throws `invalid_request` for facts that cannot be written
 * safely, `unsupported` without xorriso, `insufficient_space`, `cancelled`.
 */
export async function createSeed(options: CreateSeedOptions): Promise<void> {
  const contents = Object.entries(seedFiles(options));
  const file = resolve(options.file);
  await using staging = await makeStaging(file);
  try {
    const tree = join(staging.path, 'tree');
    const iso = join(staging.path, 'seed.iso');
    await mkdir(tree);
    for (const [name, text] of contents) await writeFile(join(tree, name), text);
    const dates = ['--set_all_file_dates', `=${epochSeconds}`];
    const layout = ['-V', 'cidata', '-J', '-r', ...dates, '-o', iso, tree];
    await run('xorriso', ['-no_rc', '-as', 'mkisofs', '-quiet', ...layout], {
      signal: options.signal,
      env: { SOURCE_DATE_EPOCH: String(epochSeconds) },
    });
    await chmod(iso, 0o640);
    await using handle = await open(iso, 'r');
    await handle.sync();
    await rename(iso, file);
  } catch (error) {
    throw await explainNoSpace(error, 'Create seed', dirname(file), MiB);
  }
}

/** A directory beside `file`, so that the finished disk moves in place by one rename. */
async function makeStaging(file: string): Promise<AsyncDisposable & { path: string }> {
  const path = await mkdtemp(`${file}.making-`);
  return { path, [Symbol.asyncDispose]: () => rm(path, { recursive: true, force: true }) };
}
