/**
 * Golden snapshots on their way to a peer, so that VMs start there without booting, and that a VM which goes there need
 * not take along what the snapshot has of its memory.
 *
 * One session: the sender says what comes (u32 length, JSON), the taker answers `send`, `has` or `image` (it lacks the
 * base image, which goes first in a session of its own); then memory and disk follow as they are, and the taker ends its
 * side when their digest is the one that was announced. Both cloudlets call the snapshot by the same id.
 */
import { createReadStream } from 'node:fs';
import { mkdir, open, rm } from 'node:fs/promises';
import { pipeline } from 'node:stream/promises';
import * as schemas from '../contract/schemas.ts';
import type { Session } from '../link/index.ts';
import { AppError, asAppError } from '../model/errors.ts';
import type { Uuid } from '../model/ids.ts';
import type { Operation } from '../model/operation.ts';
import type { SnapshotRecord } from '../model/vm.ts';
import { rebaseDisk } from '../vm/disks.ts';
import { imageFile } from '../vm/images.ts';
import { requireSpace } from '../vm/space.ts';
import type { Config } from './config.ts';
import type { EventLog } from './events.ts';
import { compileFor } from './http/validation.ts';
import type { ImageService } from './images.ts';
import { imageHello, sendImage } from './migrations/image-transfer.ts';
import type { PeerSide } from './migrations/peer-side.ts';
import type { Operations } from './operations.ts';
import type { Paths } from './paths.ts';
import { digestOfFiles, type SnapshotService } from './snapshots.ts';
import type { Store } from './store/index.ts';
import { type Captured, capturedIn, type Runner } from './vms/runner.ts';

export interface SnapshotTransferOptions {
  store: Store;
  events: EventLog;
  operations: Operations;
  images: ImageService;
  snapshots: SnapshotService;
  runner: Runner;
  paths: Paths;
  config: Config;
  peers: PeerSide;
}

type Answer = 'send' | 'has' | 'image';

const chunkBytes = 1024 * 1024;
const mostAnnouncementBytes = 256 * 1024;

export class SnapshotTransfer {
  readonly #options: SnapshotTransferOptions;

  constructor(options: SnapshotTransferOptions) {
    this.#options = options;
  }

  /** Sends a copy to a peer; one that has it already is no error. */
  push(reference: string, to: string): Operation {
    const { snapshots, images, peers, operations } = this.#options;
    const { id, name, spec } = snapshots.get(reference);
    const peer = peers.find(to);
    const kept = new DisposableStack();
    kept.use(snapshots.hold(id, `copy to ${peer.name}`));
    kept.use(images.hold(spec.disk.image, { kind: 'snapshot', name }));
    try {
      return operations.run('snapshot.push', { snapshotId: id, name }, async ({ signal, progress }) => {
        using _ = kept;
        const record = await snapshots.withDigest(id);
        const sizeBytes = record.memoryFileBytes + record.diskFileBytes;
        const onBytes = (done: number) =>
          progress({ phase: 'snapshot', done, total: sizeBytes, unit: 'bytes' });
        let answer = await this.#send(peer.id, record, { signal, onBytes });
        if (answer === 'image') {
          const image = images.get(spec.disk.image);
          const session = await peers.open(peer.id, 'image', imageHello(id, image), signal);
          await sendImage(session, imageFile(this.#options.paths.images, image.digest, image.format), {
            signal,
            onBytes: (done) => progress({ phase: 'image', done, total: image.fileBytes, unit: 'bytes' }),
          });
          answer = await this.#send(peer.id, record, { signal, onBytes });
        }
        peers.limits.forget(id);
        if (answer === 'image') throw imageRefused(name, peer.name);
        return { snapshotId: id, cloudletId: peer.id, cloudlet: peer.name };
      });
    } catch (error) {
      kept.dispose();
      throw error;
    }
  }

  async #send(
    peerId: Uuid,
    record: SnapshotRecord,
    { signal, onBytes }: { signal: AbortSignal; onBytes: (sentBytes: number) => void },
  ): Promise<Answer> {
    const { peers, paths } = this.#options;
    const session = await peers.open(peerId, 'snapshot', { migrationId: record.id }, signal);
    try {
      session.write(framed(record));
      const reader = new Reader(session);
      const answer = parseAnswer(await reader.json(mostAnnouncementBytes));
      if (answer !== 'send') {
        session.end();
        return answer;
      }
      const { memory, disk } = capturedIn(paths.snapshot(record.id));
      let sentBytes = 0;
      const files = async function* () {
        for (const file of [memory, disk])
          for await (const chunk of createReadStream(file, { highWaterMark: chunkBytes })) {
            sentBytes += chunk.length;
            onBytes(sentBytes);
            yield chunk;
          }
      };
      const ended = reader.end();
      ended.catch(() => {});
      await pipeline(files, session, { signal });
      await ended;
      return answer;
    } finally {
      if (!session.readableEnded) session.destroy();
    }
  }

  /** Takes a snapshot that a peer sends; throws what the sender is told, too. */
  async take(session: Session): Promise<void> {
    session.on('error', () => {});
    try {
      const reader = new Reader(session);
      const record = parseRecord(await reader.json(mostAnnouncementBytes));
      const answer = this.#answerTo(record);
      session.write(framed({ answer }));
      if (answer === 'send') await this.#takeFiles(record, reader);
      session.end();
    } catch (error) {
      session.destroy(asAppError(error));
      throw error;
    }
  }

  #answerTo({ id, name, spec }: SnapshotRecord): Answer {
    const { store, snapshots } = this.#options;
    if (store.snapshots.get(id)) return 'has';
    snapshots.requireFreeName(name);
    return store.images.get(spec.disk.image) ? 'send' : 'image';
  }

  async #takeFiles(record: SnapshotRecord, reader: Reader): Promise<void> {
    const { store, events, images, snapshots, runner, paths, config } = this.#options;
    const { id, name, spec, memoryFileBytes, diskFileBytes, digest } = record;
    await runner.check(spec);
    const image = images.get(spec.disk.image);
    const directory = paths.snapshot(id);
    const files = capturedIn(directory);
    await using undo = new AsyncDisposableStack();
    undo.use(snapshots.making(name));
    undo.use(images.hold(image.digest, { kind: 'snapshot', name }));
    await mkdir(directory, { recursive: true, mode: 0o700 });
    await using partial = new AsyncDisposableStack();
    partial.defer(() => rm(directory, { recursive: true, force: true }));
    await requireSpace('Take snapshot', directory, memoryFileBytes + diskFileBytes, config.reserveBytes);
    if ((await this.#write(files, record, reader)) !== digest)
      throw new AppError('image_corrupt', `Take snapshot '${name}': its bytes are not those of ${digest}`);
    await reader.end();
    await rebaseDisk({
      file: files.disk,
      imageFile: imageFile(paths.images, image.digest, image.format),
      imageFormat: image.format,
      signal: AbortSignal.timeout(60_000),
    });
    store.transact(() => {
      store.snapshots.insert(record);
      events.append({ kind: 'snapshot.created', data: { snapshotId: id, name } });
    });
    partial.move();
    snapshots.added(record);
  }

  async #write(
    files: Captured,
    { memoryFileBytes, diskFileBytes }: SnapshotRecord,
    reader: Reader,
  ): Promise<string> {
    return digestOfFiles(async (hash, which) => {
      const [file, size] = which === 'memory' ? [files.memory, memoryFileBytes] : [files.disk, diskFileBytes];
      await using handle = await open(file, 'wx', 0o600);
      for (let left = size; left > 0; ) {
        const bytes = await reader.some(left);
        hash.update(bytes);
        for (let at = 0; at < bytes.length; ) at += (await handle.write(bytes, at)).bytesWritten;
        left -= bytes.length;
      }
      await handle.sync();
    });
  }
}

/** Reads what one side of the session says: JSON, bytes of files, its end. */
class Reader {
  readonly #chunks: AsyncIterator<Uint8Array>;
  #held: Buffer = Buffer.alloc(0);

  constructor(session: Session) {
    this.#chunks = session
      .iterator({ destroyOnReturn: false })
      [Symbol.asyncIterator]() as AsyncIterator<Uint8Array>;
  }

  /** At least one byte, and at most so many. */
  async some(mostBytes: number): Promise<Buffer> {
    if (this.#held.length === 0) {
      const next = await this.#chunks.next();
      if (next.done) throw new AppError('peer_unreachable', 'The snapshot ended in the middle');
      this.#held = Buffer.from(next.value.buffer, next.value.byteOffset, next.value.byteLength);
    }
    const bytes = this.#held.subarray(0, mostBytes);
    this.#held = this.#held.subarray(bytes.length);
    return bytes;
  }

  async json(mostBytes: number): Promise<unknown> {
    const length = (await this.#exactly(4)).readUInt32BE();
    if (length > mostBytes) throw badAnnouncement(`${length} bytes`);
    try {
      return JSON.parse((await this.#exactly(length)).toString('utf8'));
    } catch (error) {
      if (error instanceof AppError) throw error;
      throw badAnnouncement('no JSON');
    }
  }

  async end(): Promise<void> {
    if (this.#held.length > 0 || !(await this.#chunks.next()).done) throw badAnnouncement('bytes too many');
  }

  async #exactly(length: number): Promise<Buffer> {
    const pieces: Buffer[] = [];
    for (let left = length; left > 0; left -= pieces.at(-1)!.length) pieces.push(await this.some(left));
    return Buffer.concat(pieces);
  }
}

function framed(value: unknown): Buffer {
  const text = Buffer.from(JSON.stringify(value));
  const length = Buffer.alloc(4);
  length.writeUInt32BE(text.length);
  return Buffer.concat([length, text]);
}

function parseAnswer(value: unknown): Answer {
  const { answer } = (value ?? {}) as { answer?: unknown };
  if (answer === 'send' || answer === 'has' || answer === 'image') return answer;
  throw badAnnouncement('no answer');
}

const isRecord = compileFor('body', schemas.SnapshotRecord);

/** Whether this host can run it is judged later, as of a VM that comes. */
function parseRecord(value: unknown): SnapshotRecord {
  if (!isRecord(value) || (value as SnapshotRecord).digest === undefined)
    throw badAnnouncement('what is no snapshot');
  return value as SnapshotRecord;
}

const badAnnouncement = (found: string): AppError =>
  new AppError('invalid_request', `Take snapshot: the peer announced ${found}`, { problems: [] });

const imageRefused = (name: string, peer: string): AppError =>
  new AppError('not_found', `Copy snapshot '${name}': ${peer} does not keep its image`, {
    kind: 'image',
    name,
  });
