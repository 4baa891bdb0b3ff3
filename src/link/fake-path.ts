/** For tests only: a TCP proxy between two ends of the link that cuts, freezes, truncates and delays. */
import { once } from 'node:events';
import { type AddressInfo, createConnection, createServer, type Socket } from 'node:net';

export interface FakePath extends AsyncDisposable {
  /** Where it listens, as the URL of the daemon behind it. */
  readonly url: string;
  /** Connections that it has taken so far, and those that are open now. */
  readonly takenCount: number;
  readonly openCount: number;
  /** Bytes that it has carried. */
  readonly carriedBytes: number;
  /** Breaks all connections now. */
  cut(): void;
  /** Lets this many bytes more through on each open connection, then breaks it, most likely within a frame. */
  cutAfter(bytes: number): void;
  /** From now on nothing gets through, but nobody is told; new connections are taken and get nothing either. */
  freeze(): void;
  thaw(): void;
  /** While it is closed, connections are broken at once. */
  close(): void;
  open(): void;
  /** Holds each chunk back for so long. */
  delay(ms: number): void;
}

export async function fakePath(port: number): Promise<FakePath> {
  const pairs = new Set<{ sockets: Socket[]; leftBytes: number }>();
  let frozen = false;
  let closed = false;
  let delayMs = 0;
  let takenCount = 0;
  let carriedBytes = 0;

  const server = createServer((near) => {
    takenCount += 1;
    if (closed) {
      near.resetAndDestroy();
      return;
    }
    const far = createConnection({ port, host: '127.0.0.1' });
    const pair = { sockets: [near, far], leftBytes: Number.POSITIVE_INFINITY };
    pairs.add(pair);
    const breakPair = () => {
      pairs.delete(pair);
      for (const socket of pair.sockets) socket.destroy();
    };
    for (const [from, to] of [
      [near, far],
      [far, near],
    ] as const) {
      from.on('error', breakPair);
      from.on('close', breakPair);
      from.on('data', (bytes) => {
        // Frozen: taken and lost, as by a path that nobody answers for.
        if (frozen) return;
        const part = bytes.subarray(0, pair.leftBytes);
        pair.leftBytes -= part.length;
        carriedBytes += part.length;
        const pass = () => {
          if (to.destroyed) return;
          if (!to.write(part) && !frozen && !from.isPaused()) {
            from.pause();
            to.once('drain', () => from.resume());
          }
          if (pair.leftBytes === 0) to.end(breakPair);
        };
        if (delayMs > 0) setTimeout(pass, delayMs);
        else pass();
      });
    }
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');

  const cut = () => {
    for (const { sockets } of [...pairs]) for (const socket of sockets) socket.resetAndDestroy();
  };
  return {
    url: `https://127.0.0.1:${(server.address() as AddressInfo).port}`,
    get takenCount() {
      return takenCount;
    },
    get openCount() {
      return pairs.size;
    },
    get carriedBytes() {
      return carriedBytes;
    },
    cut,
    cutAfter(bytes) {
      for (const pair of pairs) pair.leftBytes = bytes;
    },
    freeze() {
      frozen = true;
    },
    thaw() {
      frozen = false;
    },
    close() {
      closed = true;
      cut();
    },
    open() {
      closed = false;
    },
    delay(ms) {
      delayMs = ms;
    },
    async [Symbol.asyncDispose]() {
      cut();
      server.close();
      await once(server, 'close');
    },
  };
}
