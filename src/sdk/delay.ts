/** Resolves after `ms`; rejects at once with the reason of an aborted signal, and leaves no timer behind. */
export function delay(ms: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    if (signal?.aborted) return reject(signal.reason);
    const onAbort = () => {
      clearTimeout(timer);
      reject(signal?.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener('abort', onAbort);
      resolve();
    }, ms);
    signal?.addEventListener('abort', onAbort, { once: true });
  });
}

/** Waits that double from `firstMs` up to `mostMs`, each cut by up to a quarter so that clients spread out. */
export function backOff(firstMs: number, mostMs: number): { nextMs(): number; reset(): void } {
  let ms = firstMs;
  return {
    nextMs() {
      const now = ms;
      ms = Math.min(ms * 2, mostMs);
      return now * (1 - Math.random() / 4);
    },
    reset() {
      ms = firstMs;
    },
  };
}
