/** For tests: an export in memory that notes what was done to it. */
import { type Extent, extentFlag } from './protocol.ts';
import type { Backend } from './server.ts';

const blockBytes = 512;
const zeros = Buffer.alloc(blockBytes);

export class MemoryBackend implements Backend {
  readonly bytes: Buffer;
  readonly done: string[] = [];

  constructor(sizeBytes: number) {
    this.bytes = Buffer.alloc(sizeBytes);
  }

  get sizeBytes(): number {
    return this.bytes.length;
  }

  async read(offset: number, lengthBytes: number): Promise<Buffer> {
    return Buffer.from(this.bytes.subarray(offset, offset + lengthBytes));
  }

  async write(offset: number, bytes: Buffer): Promise<void> {
    this.done.push('write');
    bytes.copy(this.bytes, offset);
  }

  async writeZeroes(offset: number, lengthBytes: number): Promise<void> {
    this.done.push('writeZeroes');
    this.bytes.fill(0, offset, offset + lengthBytes);
  }

  async trim(offset: number, lengthBytes: number): Promise<void> {
    this.done.push('trim');
    this.bytes.fill(0, offset, offset + lengthBytes);
  }

  async flush(): Promise<void> {
    this.done.push('flush');
  }

  /** Blocks of 512 bytes that are all zeroes are holes. */
  async extents(offset: number, lengthBytes: number): Promise<Extent[]> {
    const extents: Extent[] = [];
    for (let at = offset; at < offset + lengthBytes; ) {
      const end = Math.min(offset + lengthBytes, (Math.floor(at / blockBytes) + 1) * blockBytes);
      const isZero = zeros.compare(this.bytes, at, end, 0, end - at) === 0;
      const flags = isZero ? extentFlag.hole | extentFlag.zero : 0;
      const last = extents.at(-1);
      if (last?.flags === flags) last.lengthBytes += end - at;
      else extents.push({ lengthBytes: end - at, flags });
      at = end;
    }
    return extents;
  }
}
