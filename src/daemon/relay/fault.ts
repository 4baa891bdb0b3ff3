/**
 * Fault injection, for `tests/faults/relayed.ts` alone: the file that VIPER_FAULT names holds `relay corrupt`, and slabs
 * come back with a byte changed; or `relay boast`, and the cloudlet says that it has far more memory than it has.
 */
import { readFileSync } from 'node:fs';
import type { ServedStore, SlabStore } from '../../relay/index.ts';

const boastBytes = 2 ** 40;

/** The store itself, unless a test asks for another. */
export function withFault(store: SlabStore): ServedStore {
  if (!process.env.VIPER_FAULT) return store;
  return {
    put: (group, slab, bytes) => store.put(group, slab, bytes),
    drop: (group) => store.drop(group),
    prolong: (group) => store.prolong(group),
    share: (group, slab, from) => store.share(group, slab, from),
    remove: (group, slab) => store.remove(group, slab),
    whenHeld: (group, slab, onHeld) => store.whenHeld(group, slab, onHeld),
    get: (group, slab) => {
      const bytes = store.get(group, slab);
      if (!bytes || fault() !== 'corrupt') return bytes;
      const changed = Buffer.from(bytes);
      changed[changed.length >> 1]! ^= 1;
      return changed;
    },
    get freeBytes() {
      return fault() === 'boast' ? boastBytes : store.freeBytes;
    },
  };
}

function fault(): string | undefined {
  const [role, what] = readFileSync(process.env.VIPER_FAULT!, 'utf8').trim().split(' ');
  return role === 'relay' ? what : undefined;
}
