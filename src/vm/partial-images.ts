/**
 * What has come of images whose transfer was cut, by their digest: a transfer that comes again goes on from there.
 * Only for senders that name the digest before the first byte, for nothing else tells whether the rest fits.
 *
 *   ROOT/partial/sha256-HEX/disk    the first bytes of the image
 *
 * One transfer at a time may have one of them, which the caller sees to. Bounded in number and in age.
 */
import { mkdir, readdir, rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import type { ImageDigest } from '../model/ids.ts';

const maxPartials = 8;
const maxAgeMs = 24 * 3_600_000;

export interface Partial extends AsyncDisposable {
  path: string;
  /** It stays for a next time. */
  keep: () => void;
}

const directoryOf = (root: string): string => join(root, 'partial');

export async function takePartial(root: string, digest: ImageDigest): Promise<Partial> {
  const name = digest.replace(':', '-');
  await prunePartials(root, { except: name });
  const path = join(directoryOf(root), name);
  await mkdir(path, { recursive: true, mode: 0o750 });
  let isKept = false;
  return {
    path,
    keep: () => {
      isKept = true;
    },
    async [Symbol.asyncDispose]() {
      if (!isKept) await rm(path, { recursive: true, force: true });
    },
  };
}

/** Removes those that are old, and the oldest of too many. */
export async function prunePartials(root: string, { except }: { except?: string } = {}): Promise<void> {
  const names = await readdir(directoryOf(root)).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return [];
    throw error;
  });
  const others = names.filter((name) => name !== except);
  const dated = await Promise.all(
    others.map(async (name) => {
      const found = await stat(join(directoryOf(root), name, 'disk')).catch(() => undefined);
      return { name, writtenAtMs: found?.mtimeMs ?? 0 };
    }),
  );
  const newestFirst = dated.toSorted((a, b) => b.writtenAtMs - a.writtenAtMs);
  const surplus = newestFirst.filter(
    ({ writtenAtMs }, index) => index >= maxPartials - 1 || Date.now() - writtenAtMs > maxAgeMs,
  );
  for (const { name } of surplus) await rm(join(directoryOf(root), name), { recursive: true, force: true });
}
