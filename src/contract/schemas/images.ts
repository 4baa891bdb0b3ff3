/** Disk images. */
import { Type } from 'typebox';
import { Bytes, Digest, Exact, Name, OneOf, Page, Time } from './basics.ts';

export const ImageIndex = Type.Union(
  [
    Exact({ state: Type.Literal('waiting') }),
    Exact({ state: Type.Literal('building'), doneBytes: Bytes, totalBytes: Bytes }),
    Exact({ state: Type.Literal('ready'), blocks: Type.Integer(), fileBytes: Bytes }),
    Exact({ state: Type.Literal('failed'), message: Type.String() }),
  ],
  {
    description:
      'Made in the background after the import: with it a migration refers to blocks of the image that both sides ' +
      'hold. `blocks` counts distinct blocks of 4 KiB that are not zero.',
  },
);
export const Image = Exact({
  digest: Digest,
  aliases: Type.Array(Name),
  format: OneOf(['qcow2', 'raw']),
  fileBytes: Bytes,
  virtualBytes: Bytes,
  createdAt: Time,
  index: ImageIndex,
});
export const ImagePage = Page(Image);
export const ImportQuery = Exact({
  alias: Type.Optional(Name),
  digest: Type.Optional(Digest),
  format: Type.Optional(OneOf(['qcow2', 'raw'], 'Told from the bytes if absent.')),
});
