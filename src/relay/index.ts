/** Memory that cloudlets lend to the migrations of others: what a relay holds, and how one talks with it. FORMAT.md. */
export { maxSlabBytes } from './frames.ts';
export { PassOn } from './pass-on.ts';
export { RelayClient } from './relay-client.ts';
export { keyBytes, newKey, Seal } from './seal.ts';
export { type ServedStore, serveSlabs } from './serve-slabs.ts';
export { type GroupFacts, longestLeaseMs, SlabStore } from './slab-store.ts';
