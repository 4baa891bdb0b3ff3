/** Server-sent events over one reply: replay, then live, with keep-alives and a reader that may be slow. */
import { once } from 'node:events';
import type { FastifyReply, FastifyRequest } from 'fastify';
import { AppError } from '../../model/errors.ts';
import type { EventRecord } from '../../model/operation.ts';
import type { Cloudlet } from '../cloudlet.ts';

const keepAliveMs = 15_000;
const maxStreams = 256;
const open = new WeakMap<Cloudlet, number>();

/**
 * Runs until the client or the daemon goes away. `afterId` undefined: only what happens from now on. `isWanted` leaves
 * out what is none of the caller's business.
 */
export async function streamEvents(
  cloudlet: Cloudlet,
  afterId: number | undefined,
  request: FastifyRequest,
  reply: FastifyReply,
  isWanted: (event: EventRecord) => boolean = () => true,
): Promise<void> {
  const count = open.get(cloudlet) ?? 0;
  if (count >= maxStreams)
    throw new AppError('too_many', `${count} event streams are open already`, { limit: maxStreams });
  open.set(cloudlet, count + 1);
  const ended = new AbortController();
  request.raw.once('close', () => ended.abort());
  reply.raw.once('close', () => ended.abort());
  reply.hijack();
  const { raw } = reply;
  // Hijacking skips Fastify's own writing of headers: those that hooks have set (CORS) must go along.
  raw.writeHead(200, {
    ...(reply.getHeaders() as Record<string, string>),
    'content-type': 'text/event-stream; charset=utf-8',
    'cache-control': 'no-store',
  });
  raw.write(': viper\n\n');
  const keepAlive = setInterval(() => raw.write(': alive\n\n'), keepAliveMs);
  try {
    const signal = AbortSignal.any([ended.signal, cloudlet.closing]);
    for await (const event of cloudlet.events.subscribe({
      ...(afterId === undefined ? {} : { afterId }),
      signal,
    })) {
      // What ends or breaks the stream concerns everyone.
      if (event.kind !== 'gap' && event.kind !== 'end' && !isWanted(event)) continue;
      const text = `id: ${event.id}\nevent: ${event.kind}\ndata: ${JSON.stringify(event)}\n\n`;
      if (!raw.write(text)) await once(raw, 'drain', { signal });
    }
  } catch (error) {
    if (!ended.signal.aborted && !cloudlet.closing.aborted)
      request.log.warn({ err: error }, 'event stream ended');
  } finally {
    clearInterval(keepAlive);
    open.set(cloudlet, (open.get(cloudlet) ?? 1) - 1);
    raw.end();
  }
}
