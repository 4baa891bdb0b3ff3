/**
 * The base image of a VM goes first where the destination lacks it; the destination checks its digest.
 *
 *   destination: u64 (big-endian), the bytes that it has of an earlier transfer      source: the bytes from there on
 *   destination: the end of its side, when the image is in its store
 *
 * Within one pair of daemons the link resumes; this is for a daemon that was started again.
 */
import { once } from 'node:events';
import { createReadStream } from 'node:fs';
import { pipeline } from 'node:stream/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Session } from '../../link/index.ts';
import { AppError, asAppError } from '../../model/errors.ts';
import type { VmToMove } from '../../model/migration.ts';
import type { ImageService } from '../images.ts';

const startBytes = 8;
/** How long no byte may get through. */
const patienceMs = 60_000;
const retryMs = 1000;

interface Sending {
  signal: AbortSignal;
  onBytes: (sentBytes: number) => void;
}

/** As `sendImage`, through one session after another while daemons at the destination come and go. */
export async function sendImagePatiently(
  open: () => Promise<Session>,
  file: string,
  { signal, onBytes }: Sending,
): Promise<void> {
  let lastAt = performance.now();
  const noted = (sentBytes: number) => {
    lastAt = performance.now();
    onBytes(sentBytes);
  };
  for (;;) {
    try {
      return await sendImage(await open(), file, { signal, onBytes: noted });
    } catch (error) {
      // A daemon that was started again knows nothing of the session, and has kept the bytes.
      const isLost = ['peer_unreachable', 'interrupted'].includes(asAppError(error).code);
      if (!isLost || performance.now() - lastAt > patienceMs) throw error;
      await sleep(retryMs, undefined, { signal });
    }
  }
}

/** Resolves when the image is in the store of the other side. */
export async function sendImage(session: Session, file: string, { signal, onBytes }: Sending): Promise<void> {
  // It ends its side when the image is in its store.
  const answered = once(session, 'end', { signal });
  answered.catch(() => {});
  const start = await readStart(session, signal);
  session.resume();
  let sentBytes = start;
  onBytes(sentBytes);
  const counted = async function* (source: AsyncIterable<Buffer>) {
    for await (const chunk of source) {
      sentBytes += chunk.length;
      onBytes(sentBytes);
      yield chunk;
    }
  };
  await pipeline(createReadStream(file, { start, highWaterMark: 1024 * 1024 }), counted, session, { signal });
  await answered;
}

async function readStart(session: Session, signal: AbortSignal): Promise<number> {
  for (;;) {
    const start: Buffer | null = session.read(startBytes);
    if (start?.length === startBytes) return Number(start.readBigUInt64BE());
    if (session.readableEnded) throw new AppError('peer_unreachable', 'The session of the image ended');
    await once(session, 'readable', { signal });
  }
}

/** What the destination has to know before the first byte. */
export const imageHello = (migrationId: string, { digest, format, fileBytes }: VmToMove['image']) => ({
  migrationId,
  digest,
  format,
  fileBytes,
});

/** Takes an image that a peer sends; throws what the sender is told, too. */
export async function takeImage(session: Session, images: Pick<ImageService, 'import'>): Promise<void> {
  // Why it ends decides whether its bytes are kept: one that was cancelled is not wanted any more.
  let why = new AppError('peer_unreachable', 'The session of the image ended');
  session.on('error', (error) => {
    why = asAppError(error);
  });
  const ended = new AbortController();
  session.once('close', () => ended.abort(why));
  try {
    const { digest, format, fileBytes } = session.hello as Record<string, unknown>;
    await images.import(
      session.iterator({ destroyOnReturn: false }) as AsyncIterable<Uint8Array>,
      {
        digest: String(digest),
        format: format === 'raw' ? 'raw' : 'qcow2',
        ...(Number.isSafeInteger(fileBytes) ? { sizeBytes: fileBytes as number } : {}),
        onStart: (bytes) => {
          const start = Buffer.alloc(startBytes);
          start.writeBigUInt64BE(BigInt(bytes));
          session.write(start);
        },
      },
      ended.signal,
    );
    session.end();
  } catch (error) {
    session.destroy(asAppError(error));
    throw error;
  }
}
