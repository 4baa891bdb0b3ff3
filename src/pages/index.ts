export { blockBytes, digestBlocks, digestBytes, digestOf, isZeroBlock, noBlock } from './blocks.ts';
export { type BuildOptions, buildIndex } from './build-index.ts';
export { type Content, contentReader, contentSource } from './content-blocks.ts';
export { type IndexFile, openIndex, readIndexHeader } from './index-file.ts';
export type { IndexFacts } from './index-writer.ts';
export { MemoryIndex } from './memory-index.ts';
export {
  type BlockReader,
  type BlockSource,
  isSetName,
  maxPieceBlocks,
  type Piece,
  type SetIndex,
  type SetName,
} from './reference-set.ts';
