/** Memory and disk space that cloudlets lend to the migrations of others: what a relay holds, and how one talks with it. FORMAT.md. */

export { FileShelf } from './file-shelf.ts';
export { maxSlabBytes } from './frames.ts';
export { PassOn } from './pass-on.ts';
export { RelayClient } from './relay-client.ts';
export { keyBytes, newKey, Seal } from './seal.ts';
export { type ServedStore, serveSlabs } from './serve-slabs.ts';
export { type GroupFacts, longestDiskLeaseMs, memoryShelf, type Shelf, SlabStore } from './slab-store.ts';

/** What a relay keeps slabs in. */
export type RelayHolds = 'memory' | 'disk';
