/**
 * The disk of a VM as its QEMU has it, read over a server of QEMU's own. It is started for the first read, which is a rare
 * thing, and never writes.
 */
import { dirname, join } from 'node:path';
import { AppError } from '../model/errors.ts';
import { connectNbd, type NbdClient } from '../nbd/index.ts';
import type { QmpConnection } from '../qmp/index.ts';
import { nodeNames } from '../vm/argv.ts';

const exportName = 'read-back';

export class ReadBack {
  readonly #qmp: QmpConnection;
  readonly #path: string;
  #client: Promise<NbdClient> | undefined;

  /** `beside`: a file in the VM's directory. */
  constructor(qmp: QmpConnection, beside: string) {
    this.#qmp = qmp;
    this.#path = join(dirname(beside), 'read.sock');
  }

  async read(offset: number, lengthBytes: number): Promise<Buffer> {
    this.#client ??= this.#open();
    return (await this.#client).read(offset, lengthBytes);
  }

  /** QEMU's server stays until it is told to end, or ends itself. */
  close(): void {
    this.#client?.then((client) => client[Symbol.asyncDispose]()).catch(() => {});
  }

  async #open(): Promise<NbdClient> {
    await this.#qmp.execute('nbd-server-start', { addr: { type: 'unix', data: { path: this.#path } } });
    await this.#qmp.execute('block-export-add', {
      type: 'nbd',
      id: exportName,
      name: exportName,
      'node-name': nodeNames.disk,
      writable: false,
    });
    return connectNbd({ path: this.#path, exportName });
  }
}

/** Also that of an earlier daemon; one that was never begun is no error. */
export async function endReadBack(qmp: QmpConnection): Promise<void> {
  await qmp.execute('nbd-server-stop').catch((error) => {
    if (!(error instanceof AppError) || error.details.qmpClass === undefined) throw error;
  });
}
