/** A map that forgets what was not asked for the longest, by count. */
export class RecentlyUsed<T> {
  readonly #most: number;
  readonly #values = new Map<number, T>();

  constructor(most: number) {
    this.#most = most;
  }

  get(key: number): T | undefined {
    const value = this.#values.get(key);
    if (value === undefined) return undefined;
    this.#values.delete(key);
    this.#values.set(key, value);
    return value;
  }

  set(key: number, value: T): void {
    this.#values.delete(key);
    this.#values.set(key, value);
    if (this.#values.size > this.#most) this.#values.delete(this.#values.keys().next().value!);
  }
}
