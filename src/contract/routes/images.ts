import type { OperationName } from '../endpoints.ts';
import * as schema from '../schemas.ts';
import { object, page, type Route } from './route.ts';

const image = object({ image: schema.Reference });

export const imageRoutes = {
  listImages: {
    summary: 'Images, oldest first',
    tag: 'images',
    access: 'read',
    query: page,
    status: 200,
    reply: schema.ImagePage,
    errors: [],
  },
  importImage: {
    summary:
      'Import a disk image: the body is the file itself, qcow2 or raw. The same bytes give the same image',
    tag: 'images',
    access: 'operate',
    query: schema.ImportQuery,
    binaryBody: true,
    status: 201,
    reply: schema.Image,
    errors: [
      'image_corrupt',
      'digest_mismatch',
      'insufficient_space',
      'name_taken',
      'unsupported_media_type',
      'too_many',
    ],
  },
  getImage: {
    summary: 'One image, by digest or alias',
    tag: 'images',
    access: 'read',
    params: image,
    status: 200,
    reply: schema.Image,
    errors: ['not_found'],
  },
  deleteImage: {
    summary: 'Remove an image that no VM and no snapshot uses',
    tag: 'images',
    access: 'operate',
    params: image,
    status: 204,
    errors: ['not_found', 'in_use'],
  },
  addImageAlias: {
    summary: 'Give an image a name; an alias of another image moves over',
    tag: 'images',
    access: 'operate',
    params: object({ image: schema.Reference, alias: schema.Name }),
    status: 200,
    reply: schema.Image,
    errors: ['not_found'],
  },
  removeImageAlias: {
    summary: 'Take a name from an image',
    tag: 'images',
    access: 'operate',
    params: object({ image: schema.Reference, alias: schema.Name }),
    status: 204,
    errors: ['not_found'],
  },
} as const satisfies Partial<Record<OperationName, Route>>;
