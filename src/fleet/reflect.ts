/**
 * @peculiar/x509 keeps its algorithms in a container (tsyringe) that asks for the metadata functions of Reflect.
 * These three are all that it uses. Import this file before the library.
 */
const notes = new WeakMap<object, Map<unknown, unknown>>();
const read = (key: unknown, target: object) => notes.get(target)?.get(key);

if (!('getMetadata' in Reflect)) {
  Object.assign(Reflect, {
    getMetadata: read,
    getOwnMetadata: read,
    defineMetadata(key: unknown, value: unknown, target: object) {
      const ofTarget = notes.get(target) ?? new Map<unknown, unknown>();
      notes.set(target, ofTarget.set(key, value));
    },
  });
}
