/**
 * Golden snapshots on their way to a peer, so that VMs start there without booting, and that a VM which goes there need
 * not take along what the snapshot has of its memory.
 *
 * One session: the sender says what comes (u32 length, JSON), the taker answers `send`, `has` or `image` (it lacks the
 * base image, which goes first in a session of its own); then memory and disk follow as they are, and the taker ends its
 * side when their digests are those that were announced. Both cloudlets call the snapshot by the same id.
 */
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { mkdir, open, rm, stat } from 'node:fs/promises';
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
import { digestOfFile, type SnapshotService } from './snapshots.ts';
import type { Store } from './store/index.ts';
import { capturedIn, type Runner } from './vms/runner.ts';

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

/** The first word of the sender. The disk's file is another one at each cloudlet: it names the image as it is called there. */
interface Announcement {
  snapshot: SnapshotRecord & { digest: string };
  disk: { bytes: number; digest: string };
}

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
        kept.defer(() => peers.limits.forget(id));
        const snapshot = await snapshots.withDigest(id);
        const { disk: file } = capturedIn(this.#options.paths.snapshot(id));
        const disk = { bytes: (await stat(file)).size, digest: await digestOfFile(file) };
        const sizeBytes = snapshot.memoryFileBytes + disk.bytes;
        const announced = { snapshot, disk };
        const onBytes = (done: number) =>
          progress({ phase: 'snapshot', done, total: sizeBytes, unit: 'bytes' });
        let answer = await this.#send(peer.id, announced, { signal, onBytes });
        if (answer === 'image') {
          const image = images.get(spec.disk.image);
          const session = await peers.open(peer.id, 'image', imageHello(id, image), signal);
          await sendImage(session, imageFile(this.#options.paths.images, image.digest, image.format), {
            signal,
            onBytes: (done) => progress({ phase: 'image', done, total: image.fileBytes, unit: 'bytes' }),
          });
          answer = await this.#send(peer.id, announced, { signal, onBytes });
        }
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
    announced: Announcement,
    { signal, onBytes }: { signal: AbortSignal; onBytes: (sentBytes: number) => void },
  ): Promise<Answer> {
    const { peers, paths } = this.#options;
    const session = await peers.open(peerId, 'snapshot', { migrationId: announced.snapshot.id }, signal);
    try {
      session.write(framed(announced));
      const reader = new Reader(session);
      const answer = parseAnswer(await reader.json(mostAnnouncementBytes));
      if (answer !== 'send') {
        session.end();
        await reader.end();
        return answer;
      }
      const { memory, disk } = capturedIn(paths.snapshot(announced.snapshot.id));
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
      const announced = parseAnnouncement(await reader.json(mostAnnouncementBytes));
      const answer = this.#answerTo(announced.snapshot);
      session.write(framed({ answer }));
      if (answer === 'send') await this.#takeFiles(announced, reader);
      else await reader.end();
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

  async #takeFiles({ snapshot, disk }: Announcement, reader: Reader): Promise<void> {
    const { store, events, images, snapshots, runner, paths, config } = this.#options;
    const { id, name, spec, memoryFileBytes } = snapshot;
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
    await requireSpace('Take snapshot', directory, memoryFileBytes + disk.bytes, config.reserveBytes);
    await write(files.memory, { bytes: memoryFileBytes, digest: snapshot.digest }, reader);
    await write(files.disk, disk, reader);
    await reader.end();
    await rebaseDisk({
      file: files.disk,
      imageFile: imageFile(paths.images, image.digest, image.format),
      imageFormat: image.format,
      signal: AbortSignal.timeout(60_000),
    });
    const record = { ...snapshot, diskFileBytes: (await stat(files.disk)).size };
    store.transact(() => {
      store.snapshots.insert(record);
      events.append({ kind: 'snapshot.created', data: { snapshotId: id, name } });
    });
    partial.move();
    snapshots.added(record);
  }
}

/** Takes so many bytes into a new file. Throws `image_corrupt` when they are not those of the digest. */
async function write(file: string, { bytes, digest }: Announcement['disk'], reader: Reader): Promise<void> {
  const hash = createHash('sha256');
  await using handle = await open(file, 'wx', 0o600);
  for (let left = bytes; left > 0; ) {
    const some = await reader.some(left);
    hash.update(some);
    for (let at = 0; at < some.length; ) at += (await handle.write(some, at)).bytesWritten;
    left -= some.length;
  }
  if (`sha256:${hash.digest('hex')}` !== digest)
    throw new AppError('image_corrupt', `Take snapshot: ${file} is not what was announced, ${digest}`, {
      file,
    });
  await handle.sync();
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

const isAnnouncement = compileFor('body', schemas.SnapshotAnnouncement);

/** Whether this host can run it is judged later, as of a VM that comes. */
function parseAnnouncement(value: unknown): Announcement {
  if (!isAnnouncement(value)) throw badAnnouncement('what is no snapshot');
  return value as Announcement;
}

const badAnnouncement = (found: string): AppError =>
  new AppError('invalid_request', `Take snapshot: the peer announced ${found}`, { problems: [] });

const imageRefused = (name: string, peer: string): AppError =>
  new AppError('not_found', `Copy snapshot '${name}': ${peer} does not keep its image`, {
    kind: 'image',
    name,
  });
