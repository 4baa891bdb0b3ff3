/**
 * A second monitor of a VM that comes by post-copy, over two named pipes. QEMU's main loop may wait for a page that
 * is still at the source, and answers nothing meanwhile but commands out of band; yet a monitor on a socket wants its
 * main loop before it takes those, after each connect anew. Pipes know no connect: what was agreed on when QEMU
 * started holds for every later daemon. So one that starts again can offer such a QEMU the stream that it lacks.
 *
 * It is read for as long as there is a daemon, for QEMU keeps what nobody reads.
 */
import { closeSync, constants, openSync } from 'node:fs';
import { Socket } from 'node:net';
import { createInterface } from 'node:readline';
import { AppError } from '../model/errors.ts';
import { withDeadline } from '../qmp/index.ts';
import type { MachinePaths } from './paths.ts';
import { run } from './run.ts';

const answerTimeoutMs = 5000;

interface Message {
  id?: string;
  QMP?: object;
  return?: object;
  error?: { class: string; desc: string };
}

export class SpareMonitor implements Disposable {
  readonly #in: Socket;
  readonly #out: Socket;
  readonly #waiters = new Set<(message: Message) => void>();

  private constructor(commands: number, answers: number) {
    this.#in = new Socket({ fd: commands, readable: false, writable: true });
    this.#out = new Socket({ fd: answers, readable: true, writable: false });
    // QEMU's end is seen elsewhere.
    for (const pipe of [this.#in, this.#out]) pipe.on('error', () => {}).unref();
    createInterface({ input: this.#out }).on('line', (line) => this.#take(line));
  }

  /** Before QEMU starts. */
  static async makePipes({ spareIn, spareOut }: MachinePaths, signal: AbortSignal): Promise<void> {
    await run('mkfifo', ['-m', '600', spareIn, spareOut], { signal });
  }

  /** `undefined` for a QEMU that has none, or has ended. */
  static open({ spareIn, spareOut }: MachinePaths): SpareMonitor | undefined {
    const { O_WRONLY, O_RDONLY, O_NONBLOCK } = constants;
    using undo = new DisposableStack();
    try {
      // Without a QEMU that reads there is nothing to write to, and this says so at once.
      const commands = undo.adopt(openSync(spareIn, O_WRONLY | O_NONBLOCK), closeSync);
      const answers = undo.adopt(openSync(spareOut, O_RDONLY | O_NONBLOCK), closeSync);
      const monitor = new SpareMonitor(commands, answers);
      undo.move();
      return monitor;
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      if (code === 'ENOENT' || code === 'ENXIO') return undefined;
      throw error;
    }
  }

  /** Once, when QEMU has started and its main loop is free. */
  async negotiate(): Promise<void> {
    await this.#ask({ execute: 'qmp_capabilities', arguments: { enable: ['oob'] } });
  }

  /** QEMU listens at the socket for a source that comes with the missing pages. Refused unless its stream is lost. */
  async recover(socketPath: string): Promise<void> {
    await this.#ask({ 'exec-oob': 'migrate-recover', arguments: { uri: `unix:${socketPath}` } });
  }

  [Symbol.dispose](): void {
    this.#in.destroy();
    this.#out.destroy();
  }

  async #ask(command: object): Promise<void> {
    // No daemon before used it, whose answers may still be in the pipe.
    const id = crypto.randomUUID();
    const { promise, resolve } = Promise.withResolvers<Message>();
    const take = (message: Message) => {
      if (message.id === id) resolve(message);
    };
    this.#waiters.add(take);
    try {
      this.#in.write(`${JSON.stringify({ ...command, id })}\n`);
      const onTimeout = () =>
        new AppError('timeout', `QEMU's spare monitor did not answer within ${answerTimeoutMs} ms`, {
          waitedFor: 'spare monitor',
          timeoutMs: answerTimeoutMs,
        });
      const { error } = await withDeadline(promise, { timeoutMs: answerTimeoutMs, onTimeout });
      if (!error) return;
      const { class: qmpClass, desc } = error;
      throw new AppError('qemu_failed', `QEMU refused: ${desc}`, { qmpClass, output: desc });
    } finally {
      this.#waiters.delete(take);
    }
  }

  #take(line: string): void {
    let message: Message;
    try {
      message = JSON.parse(line) as Message;
    } catch {
      // The rest of a line whose beginning another daemon has read.
      return;
    }
    for (const waiter of this.#waiters) waiter(message);
  }
}
