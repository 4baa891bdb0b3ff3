import type { Readable } from 'node:stream';
import { AppError } from '../../../model/errors.ts';
import type { ImageRecord, SnapshotRecord } from '../../../model/vm.ts';
import type { Cloudlet } from '../../cloudlet.ts';
import type { Handlers } from '../server.ts';

type Names =
  | 'listImages'
  | 'importImage'
  | 'getImage'
  | 'deleteImage'
  | 'addImageAlias'
  | 'removeImageAlias'
  | 'listSnapshots'
  | 'createSnapshot'
  | 'pushSnapshot'
  | 'getSnapshot'
  | 'deleteSnapshot';

function announcedBytes(length: string | undefined): number | undefined {
  if (length === undefined) return undefined;
  const bytes = Number(length);
  if (Number.isSafeInteger(bytes) && bytes >= 0) return bytes;
  throw new AppError('invalid_request', `content-length is ${length}, wanted a number of bytes`, {
    problems: [],
  });
}

const withIndex = (cloudlet: Cloudlet, image: ImageRecord) => ({
  ...image,
  index: cloudlet.indexes.view(image.digest),
});

const withOwnIndex = (cloudlet: Cloudlet, snapshot: SnapshotRecord) => ({
  ...snapshot,
  index: cloudlet.snapshotIndexes.view(snapshot.id),
});

/** Images and golden snapshots. */
export const imageHandlers = (cloudlet: Cloudlet): Handlers<Names> => ({
  listImages: ({ query }) => {
    const page = cloudlet.images.list(query);
    return { ...page, items: page.items.map((image) => withIndex(cloudlet, image)) };
  },
  importImage: async ({ query, body, request }) => {
    // The body is the untouched request stream: this route's content type parser hands it through.
    const source = body as unknown as Readable | undefined;
    if (!source) {
      throw new AppError(
        'unsupported_media_type',
        'The image is missing: send it as application/octet-stream',
      );
    }
    const sizeBytes = announcedBytes(request.headers['content-length']);
    const ended = new AbortController();
    request.raw.once('aborted', () => ended.abort(new AppError('cancelled', 'The sender hung up')));
    const announced = { ...query, ...(sizeBytes === undefined ? {} : { sizeBytes }) };
    return withIndex(cloudlet, await cloudlet.images.import(source, announced, ended.signal));
  },
  getImage: ({ params }) => withIndex(cloudlet, cloudlet.images.get(params.image)),
  deleteImage: async ({ params }) => {
    await cloudlet.images.remove(params.image);
    return undefined;
  },
  addImageAlias: ({ params }) => withIndex(cloudlet, cloudlet.images.addAlias(params.image, params.alias)),
  removeImageAlias: ({ params }) => {
    cloudlet.images.removeAlias(params.image, params.alias);
    return undefined;
  },

  listSnapshots: ({ query }) => {
    const page = cloudlet.snapshots.list(query);
    return { ...page, items: page.items.map((snapshot) => withOwnIndex(cloudlet, snapshot)) };
  },
  pushSnapshot: ({ params, body }) => cloudlet.snapshotTransfer.push(params.snapshot, body.to),
  createSnapshot: ({ body }) => cloudlet.snapshots.create(body),
  getSnapshot: ({ params }) => withOwnIndex(cloudlet, cloudlet.snapshots.get(params.snapshot)),
  deleteSnapshot: async ({ params }) => {
    await cloudlet.snapshots.remove(params.snapshot);
    return undefined;
  },
});
