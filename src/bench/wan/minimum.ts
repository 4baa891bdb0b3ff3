/**
 * The least that a handoff of the guest has to send, out of a dump of its memory: pages that are not zero, that the
 * destination does not hold, each content once, in zstd -1. What it refers to is counted as nothing.
 */
import { createReadStream } from 'node:fs';
import { promisify } from 'node:util';
import { constants, zstdCompress } from 'node:zlib';
import { MiB } from '../../model/units.ts';
import { contentSource, digestBlocks, digestBytes, isZeroBlock } from '../../pages/index.ts';
import { pageBytes, StreamParser } from '../../stream/index.ts';
import { openDiskContent } from '../../vm/disk-content.ts';
import type { WarmGuest } from './guest.ts';

const compress = promisify(zstdCompress);
const params = { [constants.ZSTD_c_compressionLevel]: 1 };

export interface Minimum {
  nonZeroPages: number;
  /** By what the destination holds: pages that remain, and their bytes compressed. */
  unique: Record<'image' | 'golden', Amount>;
}

interface Amount {
  pages: number;
  bytes: number;
}

export async function computeMinimum(guest: WarmGuest): Promise<Minimum> {
  const image = await imageDigests(guest.imageFile);
  const golden = new Set<string>();
  await eachPage(guest.golden.memory, (page) => void golden.add(keyOf(page)));
  let nonZeroPages = 0;
  const seen = new Set<string>();
  const remaining = { image: [] as Buffer[], golden: [] as Buffer[] };
  await eachPage(guest.warm.memory, (page) => {
    nonZeroPages += 1;
    const key = keyOf(page);
    if (seen.has(key)) return;
    seen.add(key);
    if (image.has(key)) return;
    remaining.image.push(Buffer.from(page));
    if (!golden.has(key)) remaining.golden.push(Buffer.from(page));
  });
  return {
    nonZeroPages,
    unique: { image: await sizeOf(remaining.image), golden: await sizeOf(remaining.golden) },
  };
}

/** Unique blocks of these contents together that the image has not, and their bytes compressed. */
export async function uniqueBeside(
  imageFile: string,
  contents: readonly AsyncIterable<Buffer>[],
): Promise<Amount> {
  const seen = await imageDigests(imageFile);
  const inBatch = MiB / pageBytes;
  const total = { pages: 0, bytes: 0 };
  let batch: Buffer[] = [];
  const pack = async () => {
    const { pages, bytes } = await sizeOf(batch);
    total.pages += pages;
    total.bytes += bytes;
    batch = [];
  };
  for (const content of contents)
    for await (const piece of content) {
      const digests = digestBlocks(piece).toString('latin1');
      for (let index = 0; index < piece.length / pageBytes; index += 1) {
        const key = digests.slice(index * digestBytes, (index + 1) * digestBytes);
        const page = piece.subarray(index * pageBytes, (index + 1) * pageBytes);
        if (seen.has(key) || isZeroBlock(page, 0)) continue;
        seen.add(key);
        batch.push(Buffer.from(page));
        if (batch.length === inBatch) await pack();
      }
    }
  await pack();
  return total;
}

const keyOf = (page: Buffer): string => digestBlocks(page).toString('latin1');

async function imageDigests(file: string): Promise<Set<string>> {
  await using content = await openDiskContent(file, 'qcow2');
  const found = new Set<string>();
  for await (const { bytes } of contentSource(content).pieces(new AbortController().signal)) {
    const digests = digestBlocks(bytes).toString('latin1');
    for (let at = 0; at < digests.length; at += digestBytes) found.add(digests.slice(at, at + digestBytes));
  }
  return found;
}

/** Every page that is not zero, of a file of captured memory. */
async function eachPage(file: string, take: (page: Buffer) => void): Promise<void> {
  const parser = new StreamParser({
    page: (_page, buffer, at) => take(buffer.subarray(at, at + pageBytes)),
  });
  for await (const bytes of createReadStream(file, { highWaterMark: MiB })) parser.push(bytes);
}

async function sizeOf(pages: readonly Buffer[]): Promise<Amount> {
  const inBatch = MiB / pageBytes;
  let bytes = 0;
  for (let at = 0; at < pages.length; at += inBatch)
    bytes += (await compress(Buffer.concat(pages.slice(at, at + inBatch)), { params })).length;
  return { pages: pages.length, bytes };
}
