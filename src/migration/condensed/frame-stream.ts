/** Frames out of a link, one at a time: what is not asked for stays in the link, which then holds the sender back. */
import type { Readable } from 'node:stream';
import { agentError, type Frame, FrameReader } from './frames.ts';

/** Ends with the link's end; throws what breaks it. A frame's body is valid until the next one is asked for. */
export async function* framesOf(link: Readable): AsyncGenerator<Frame, void, undefined> {
  const reader = new FrameReader();
  // The other direction goes on when this one has ended.
  for await (const bytes of link.iterator({ destroyOnReturn: false })) {
    reader.push(bytes);
    for (let next = reader.next(); next; next = reader.next()) yield next;
  }
}

/** The first word of the other end, of which only this type will do; `what` it is. */
export async function firstOf(
  frames: AsyncGenerator<Frame, void, undefined>,
  type: number,
  what: string,
): Promise<Buffer> {
  const first = await frames.next();
  if (first.done || first.value.type !== type) throw agentError(`no ${what}`);
  return first.value.body;
}
