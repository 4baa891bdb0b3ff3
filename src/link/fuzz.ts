/** For tests only: fast-check runs whose seed is printed and can be given back. */
import fc from 'fast-check';

export function fuzz<T>(property: fc.IProperty<T>, numRuns: number): void {
  const seed = Number(process.env.SEED ?? Date.now() % 2 ** 31);
  console.log(`fuzz seed ${seed} (repeat with SEED=${seed})`);
  fc.assert(property, { seed, numRuns });
}
