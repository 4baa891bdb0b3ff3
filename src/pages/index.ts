export { blockBytes, digestBlocks, digestBytes, digestOf, isZeroBlock, noBlock } from './blocks.ts';
export { type BoundedReader, boundedReader, inTime } from './bounded-reader.ts';
export {
  type BuildFromDigestsOptions,
  type BuildOptions,
  buildIndex,
  buildIndexFromDigests,
} from './build-index.ts';
export { type Content, contentReader, contentSource, runsOf } from './content-blocks.ts';
export { type IndexFile, openIndex, readIndexHeader } from './index-file.ts';
export type { IndexFacts } from './index-writer.ts';
export { MemoryIndex } from './memory-index.ts';
export { openPageFile, PageFileWriter, pageFileKeyBytes } from './page-file.ts';
export {
  type BlockReader,
  type BlockSource,
  isSetName,
  maxPieceBlocks,
  type Piece,
  type SetIndex,
  type SetName,
} from './reference-set.ts';
