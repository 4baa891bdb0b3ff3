export { blockBytes, digestBlocks, digestBytes, digestOf, isZeroBlock, noBlock } from './blocks.ts';
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
