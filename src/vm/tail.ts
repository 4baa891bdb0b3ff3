/** The end of a file that another process appends to. */
import { open } from 'node:fs/promises';

/** At most the last `maxBytes` of the file; nothing if there is no such file. */
export async function readTail(path: string, maxBytes: number): Promise<Buffer> {
  const file = await open(path, 'r').catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return undefined;
    throw error;
  });
  if (!file) return Buffer.alloc(0);
  try {
    const { size } = await file.stat();
    const length = Math.min(size, maxBytes);
    const { buffer, bytesRead } = await file.read(Buffer.alloc(length), 0, length, size - length);
    return buffer.subarray(0, bytesRead);
  } finally {
    await file.close();
  }
}

/** The last lines of a text file, for an error message. */
export async function readLastLines(path: string, maxLines = 20): Promise<string> {
  const text = (await readTail(path, 8192)).toString('utf8').trimEnd();
  return text.split('\n').slice(-maxLines).join('\n');
}
