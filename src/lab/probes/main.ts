/**
 * Measuring programs, to be run where a device or a guest is (`viper lab run phone -- node src/lab/probes/main.ts …`):
 *
 *   echo-server   --listen HOST:PORT
 *   echo          --to HOST:PORT [--from ADDRESS] [--protocol udp|tcp] [--interval MS] [--every MS] [--for MS] [--csv FILE]
 *   stream-server --listen HOST:PORT [--rate BPS]
 *   stream        --to HOST:PORT [--from ADDRESS] [--every MS] [--bytes N] [--for MS] [--csv FILE]
 *
 * Clients print one JSON document a line: `echo` that the first answer came, both a sample each `--every` (500 ms), and
 * each a summary at its end, which SIGTERM and SIGINT bring about too. They end with 1 if the connection broke or a byte
 * was wrong. Times are milliseconds since the epoch. Servers say `{"kind":"listening"}` once they do.
 */
import { openSync, writeSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { refusal } from '../spec.ts';
import { type Endpoint, probeEcho, serveEcho } from './echo.ts';
import { receiveStream, serveStream } from './stream.ts';

const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: {
    listen: { type: 'string' },
    to: { type: 'string' },
    from: { type: 'string' },
    protocol: { type: 'string', default: 'udp' },
    interval: { type: 'string', default: '10' },
    every: { type: 'string', default: '500' },
    for: { type: 'string' },
    bytes: { type: 'string' },
    rate: { type: 'string' },
    csv: { type: 'string' },
  },
});

const print = (kind: string, facts: object = {}) => console.log(JSON.stringify({ kind, ...facts }));

function endpoint(option: 'listen' | 'to'): Endpoint {
  const [, host, port] = /^([0-9.]+):(\d{1,5})$/.exec(values[option] ?? '') ?? [];
  if (!host) throw refusal(`--${option}`, values[option], 'ADDRESS:PORT');
  return { host, port: Number(port) };
}

function count(option: 'interval' | 'every' | 'for' | 'bytes' | 'rate'): number {
  const value = Number(values[option]);
  if (Number.isFinite(value) && value > 0) return value;
  throw refusal(`--${option}`, values[option], 'a number above 0');
}
const countIfAny = (option: 'for' | 'bytes' | 'rate') =>
  values[option] === undefined ? undefined : count(option);

/** A row of the CSV file, if one is wanted. */
function table(header: string): (...row: number[]) => void {
  if (values.csv === undefined) return () => {};
  const file = openSync(values.csv, 'w');
  writeSync(file, `${header}\n`);
  return (...row) => void writeSync(file, `${row.map((each) => Number(each.toFixed(3))).join(',')}\n`);
}

const stop = new AbortController();
for (const name of ['SIGTERM', 'SIGINT'] as const) process.once(name, () => stop.abort());
const { signal } = stop;

function endAfter(): void {
  const ms = countIfAny('for');
  if (ms !== undefined) setTimeout(() => stop.abort(), ms).unref();
}

function conclude(summary: { brokenBy: string | undefined }): void {
  print('summary', summary);
  process.exitCode = summary.brokenBy === undefined ? 0 : 1;
}

switch (positionals[0]) {
  case 'echo-server':
    await serveEcho(endpoint('listen'), signal);
    print('listening');
    break;
  case 'stream-server':
    await serveStream(endpoint('listen'), signal, countIfAny('rate'));
    print('listening');
    break;
  case 'echo': {
    if (values.protocol !== 'udp' && values.protocol !== 'tcp')
      throw refusal('--protocol', values.protocol, 'udp or tcp');
    const row = table('sequence,sentMs,receivedMs');
    let isAnswered = false;
    endAfter();
    conclude(
      await probeEcho({
        to: endpoint('to'),
        ...(values.from === undefined ? {} : { from: values.from }),
        protocol: values.protocol,
        intervalMs: count('interval'),
        everyMs: count('every'),
        onSample: (sample) => isAnswered && print('sample', sample),
        signal,
        onAnswer: ({ sequence, sentMs, receivedMs }) => {
          if (!isAnswered) print('answered');
          isAnswered = true;
          row(sequence, sentMs, receivedMs);
        },
      }),
    );
    break;
  }
  case 'stream': {
    const row = table('atMs,bytes,bps,totalBytes');
    const maxBytes = countIfAny('bytes');
    endAfter();
    conclude(
      await receiveStream({
        from: endpoint('to'),
        ...(values.from === undefined ? {} : { localAddress: values.from }),
        everyMs: count('every'),
        ...(maxBytes === undefined ? {} : { maxBytes }),
        signal,
        onSample: (sample) => {
          print('sample', sample);
          row(sample.atMs, sample.bytes, sample.bps, sample.totalBytes);
        },
      }),
    );
    break;
  }
  default:
    throw refusal('the command', positionals[0], 'echo-server, echo, stream-server or stream');
}
