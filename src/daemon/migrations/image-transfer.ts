/** The base image of a VM goes first where the destination lacks it; the destination checks its digest. */
import { once } from 'node:events';
import { createReadStream } from 'node:fs';
import { pipeline } from 'node:stream/promises';
import type { Session } from '../../link/index.ts';
import { AppError, asAppError } from '../../model/errors.ts';
import type { VmToMove } from '../../model/migration.ts';
import type { ImageService } from '../images.ts';

/** Resolves when the image is in the store of the other side. */
export async function sendImage(
  session: Session,
  file: string,
  { signal, onBytes }: { signal: AbortSignal; onBytes: (sentBytes: number) => void },
): Promise<void> {
  let sentBytes = 0;
  const counted = async function* (source: AsyncIterable<Buffer>) {
    for await (const chunk of source) {
      sentBytes += chunk.length;
      onBytes(sentBytes);
      yield chunk;
    }
  };
  session.resume();
  // It ends its side when the image is in its store.
  const answered = once(session, 'end', { signal });
  answered.catch(() => {});
  await pipeline(createReadStream(file, { highWaterMark: 1024 * 1024 }), counted, session, { signal });
  await answered;
}

/** What the destination has to know before the first byte. */
export const imageHello = (migrationId: string, { digest, format, fileBytes }: VmToMove['image']) => ({
  migrationId,
  digest,
  format,
  fileBytes,
});

/** Takes an image that a peer sends; throws what the sender is told, too. */
export async function takeImage(session: Session, images: ImageService): Promise<void> {
  session.on('error', () => {});
  const ended = new AbortController();
  session.once('close', () =>
    ended.abort(new AppError('peer_unreachable', 'The session of the image ended')),
  );
  try {
    const { digest, format, fileBytes } = session.hello as Record<string, unknown>;
    await images.import(
      session.iterator({ destroyOnReturn: false }) as AsyncIterable<Uint8Array>,
      {
        digest: String(digest),
        format: format === 'raw' ? 'raw' : 'qcow2',
        ...(Number.isSafeInteger(fileBytes) ? { sizeBytes: fileBytes as number } : {}),
      },
      ended.signal,
    );
    session.end();
  } catch (error) {
    session.destroy(asAppError(error));
    throw error;
  }
}
