/**
 * Where the daemon's log goes: a file descriptor, mostly standard output. A log that cannot be written must never
 * hold up the daemon and the VMs that it serves, so lines that find no room (a full disk, a pipe that nobody reads)
 * are left out, and how many were is told as soon as there is room again. Pino's own output instead waits, with the
 * whole process, until the rest of a line that was half written finds room.
 */
import { writeSync } from 'node:fs';

type Write = (bytes: Buffer) => number;

export class LogOutput {
  readonly #write: Write;
  #lost = 0;
  #isLineOpen = false;

  /** `write` gives how many bytes it took, or throws. */
  constructor(write: Write = (bytes) => writeSync(1, bytes)) {
    this.#write = write;
  }

  /** `line` ends with a line feed, as pino's lines do. */
  write(line: string): void {
    const notice = this.#lost > 0 ? `{"level":40,"msg":"${this.#lost} lines of this log were lost"}\n` : '';
    if (!this.#put(notice + line)) this.#lost += 1;
    else this.#lost = 0;
  }

  #put(text: string): boolean {
    const bytes = Buffer.from((this.#isLineOpen ? '\n' : '') + text);
    try {
      const taken = this.#write(bytes);
      if (taken > 0) this.#isLineOpen = taken < bytes.length;
      return taken === bytes.length;
    } catch {
      return false;
    }
  }
}
