/** `viper vm console` and `viper vm log`: the serial console, live or as it was written. */
import type { Command } from 'commander';
import { type ConsoleSession, ViperError } from '../../sdk/client.ts';
import { addCommand, type Session, withSession } from '../session.ts';
import { parseSize } from '../values.ts';

/** Ctrl-], as in telnet and virsh. */
const detachByte = 0x1d;

export function addVmConsoleCommands(vm: Command): void {
  addCommand(vm, 'console <vm>', 'the live serial console; Ctrl-] detaches', 'viper vm console web').action(
    withSession(async (session, name: string) => {
      const attached = await session.viper.attachConsole({ params: { vm: name }, signal: session.signal });
      session.output.note(`Attached to the console of ${name}; Ctrl-] detaches.\r`);
      await joinTerminal(attached);
      await requireNormalEnd(attached, name);
      session.output.note('\r\nDetached.');
    }),
  );

  addCommand(vm, 'log <vm>', 'what the serial console wrote', 'viper vm log web --follow')
    .option('-f, --follow', 'go on with what it writes')
    .option('--tail <size>', 'only the last bytes (64K if absent, at most 1M)', parseSize)
    .action(
      withSession(async (session, name: string, options: { follow?: true; tail?: number }) => {
        const { viper, signal } = session;
        const tail = options.tail === undefined ? {} : { query: { tailBytes: options.tail } };
        const readLog = () => viper.getConsoleLog({ params: { vm: name }, ...tail, signal });
        if (options.follow) return followLog(session, name, readLog);
        process.stdout.write(await readLog());
      }),
    );
}

/** Keys to the VM, its output to the screen, until either hangs up or Ctrl-] is pressed. */
async function joinTerminal(attached: ConsoleSession): Promise<void> {
  const { stdin } = process;
  const writer = attached.writable.getWriter();
  const onKeys = (keys: Buffer) => {
    const end = stdin.isTTY ? keys.indexOf(detachByte) : -1;
    const sent = end < 0 ? keys : keys.subarray(0, end);
    // A session that has ended is told by its output.
    if (sent.length > 0) writer.write(sent).catch(() => {});
    if (end >= 0) attached.close();
  };
  const onEnd = () => writer.close().catch(() => {});
  if (stdin.isTTY) stdin.setRawMode(true);
  stdin.on('data', onKeys).once('end', onEnd).resume();
  try {
    await copyOut(attached.readable);
  } finally {
    stdin.removeListener('data', onKeys).removeListener('end', onEnd).pause();
    if (stdin.isTTY) stdin.setRawMode(false);
    attached.close();
  }
}

async function copyOut(readable: ReadableStream<Uint8Array>): Promise<void> {
  const reader = readable.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    process.stdout.write(value);
  }
}

/**
 * The log, then what comes live. The console is attached first, so nothing falls between; what came live before
 * the log was read is in both, and is shown once.
 */
async function followLog(session: Session, name: string, readLog: () => Promise<string>): Promise<void> {
  const { viper, signal } = session;
  await using attached = await viper.attachConsole({ params: { vm: name }, signal });
  const decoder = new TextDecoder();
  let early: string | undefined = '';
  const reader = attached.readable.getReader();
  const copying = (async () => {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const text = decoder.decode(value, { stream: true });
      if (early === undefined) process.stdout.write(text);
      else early += text;
    }
  })();
  const log = await readLog();
  process.stdout.write(log + afterOverlap(log, early));
  early = undefined;
  await copying;
  signal.throwIfAborted();
  await requireNormalEnd(attached, name);
}

/** A console that the VM or the user ended is well; one that was cut is told. */
async function requireNormalEnd(attached: ConsoleSession, name: string): Promise<void> {
  const { code, reason } = await attached.closed;
  if (code === 1000 || code === 1005) return;
  throw new ViperError('unreachable', `The console of ${name} was cut off${reason ? `: ${reason}` : ''}`);
}

/** What `live` has beyond the end of `log`. */
export function afterOverlap(log: string, live: string): string {
  for (let length = Math.min(log.length, live.length); length > 0; length -= 1) {
    if (log.endsWith(live.slice(0, length))) return live.slice(length);
  }
  return live;
}
