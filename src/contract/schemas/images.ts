/** Disk images. */
import { Type } from 'typebox';
import { Bytes, Digest, Exact, Name, OneOf, Page, Time } from './basics.ts';

export const Image = Exact({
  digest: Digest,
  aliases: Type.Array(Name),
  format: OneOf(['qcow2', 'raw']),
  fileBytes: Bytes,
  virtualBytes: Bytes,
  createdAt: Time,
});
export const ImagePage = Page(Image);
export const ImportQuery = Exact({
  alias: Type.Optional(Name),
  digest: Type.Optional(Digest),
  format: Type.Optional(OneOf(['qcow2', 'raw'], 'Told from the bytes if absent.')),
});
