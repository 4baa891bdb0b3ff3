/** The destination's end of a disk session whose blocks go to relays: it hears where they are, and writes that down. */
import type { Duplex } from 'node:stream';
import { encodeNumbers, parseNumbers } from '../condensed/disk-frames.ts';
import { framesOf } from '../condensed/frame-stream.ts';
import { agentError, encodeJson, frame, protocolVersion } from '../condensed/frames.ts';
import { type DiskManifest, newDiskManifest } from './disk-manifest.ts';
import { parseDivision, parseSlab } from './division.ts';

export interface TakeOptions {
  sizeBytes: number;
  /** All of it is known, or known again; resolves when that is on the disk. What it learns later it is given again. */
  keep: (manifest: DiskManifest) => Promise<void>;
}

/** Resolves when the source has ended its side. Whatever breaks it, the link is destroyed. */
export async function takeDiskManifest(link: Duplex, { sizeBytes, keep }: TakeOptions): Promise<void> {
  try {
    link.write(encodeJson(frame.diskOffer, { version: protocolVersion, sizeBytes, sets: [] }));
    let manifest: DiskManifest | undefined;
    for await (const { type, body } of framesOf(link)) {
      if (type === frame.division && !manifest) manifest = newDiskManifest(parseDivision(body), sizeBytes);
      else if (!manifest) throw agentError(`a frame of type ${type} before its division`);
      else if (type === frame.slab)
        manifest.add(parseSlab(body, manifest.layout.table.pages, manifest.division));
      else if (type === frame.diskFlush) {
        const [number] = parseNumbers(body);
        await keep(manifest);
        link.write(encodeNumbers(frame.diskFlushed, [number]));
      } else throw agentError(`a frame of type ${type} out of place`);
    }
    link.end();
  } catch (error) {
    link.destroy();
    throw error;
  }
}
