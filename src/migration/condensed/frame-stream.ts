/** Frames out of a link, one at a time: what is not asked for stays in the link, which then holds the sender back. */
import type { Readable } from 'node:stream';
import { type Frame, FrameReader } from './frames.ts';

/** Ends with the link's end; throws what breaks it. A frame's body is valid until the next one is asked for. */
export async function* framesOf(link: Readable): AsyncGenerator<Frame, void, undefined> {
  const reader = new FrameReader();
  // The other direction goes on when this one has ended.
  for await (const bytes of link.iterator({ destroyOnReturn: false })) {
    reader.push(bytes);
    for (let next = reader.next(); next; next = reader.next()) yield next;
  }
}
