/**
 * The demo: three cloudlets in a lab of network namespaces, 20 ms and 350 Mbit/s between them, and a Debian guest that
 * serves a stream to a device over one connection. The device walks c1, c2, c3, c1; its VM follows by itself.
 *
 *   npm run demo [-- --continuity stretch|host-route] [-- --json] [-- --keep]
 *
 * By default the connection is MPTCP's and changes its addresses. With `stretch` or `host-route` it is plain TCP: the VM
 * keeps its address, and so does the device at its end, its cellular one, while its radio walks. `--json` prints the
 * table as JSON and nothing else on standard output; `--keep` leaves the lab up.
 */
import { parseArgs, styleText } from 'node:util';
import { createOutput } from '../src/cli/output.ts';
import { Lab } from '../src/lab/lab.ts';
import { type Handoff, Walk, type WalkOptions, walkVm } from '../src/lab/walk.ts';
import type { StreamEnd } from '../src/lab/walk-programs.ts';
import { StatusLine } from './status-line.ts';

const { values: options } = parseArgs({
  options: {
    json: { type: 'boolean', default: false },
    keep: { type: 'boolean', default: false },
    continuity: { type: 'string', default: 'mptcp' },
  },
});
const { continuity } = options;
if (continuity !== 'mptcp' && continuity !== 'stretch' && continuity !== 'host-route') {
  console.error(`--continuity is '${continuity}', wanted mptcp, stretch or host-route`);
  process.exit(2);
}

/** What a guest without KVM can send on a busy machine. */
const streamBps = 2_000_000;
/** Below the rate of the WAN, so that the stream has room beside the migration. */
const migration = { bandwidthBps: 200_000_000 };
const config = { follow: { measureEveryMs: 5000, cooldownMs: 5000, migration } };
const way = ['c1', 'c2', 'c3', 'c1'];

const status = new StatusLine(process.stderr);
const interrupted = new AbortController();
for (const name of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const)
  process.once(name, () => interrupted.abort(new Error(`ended by ${name}`)));
const { signal } = interrupted;

const megabytes = (bytes: number): string => (bytes / 1e6).toFixed(bytes < 10e6 ? 1 : 0);

/** Numbers are in ms, so that the table fits 80 columns. */
function show(handoffs: readonly Handoff[], stream: StreamEnd): void {
  const output = createOutput(options);
  const ms = (value: number): string => value.toFixed(value < 10 ? 1 : 0);
  const rows = handoffs.map((each) => [
    `${each.from} to ${each.to}`,
    ...[each.decisionMs, each.attachedToStartedMs, each.totalMs, each.downtimeMs, each.gapMs].map(ms),
    [each.rttBeforeMs, each.rttViaWanMs, each.rttAfterMs].map(ms).join(' / '),
    `${megabytes(each.sentBytes)} of ${megabytes(each.contentBytes)}`,
  ]);
  const head = ['handoff', 'decided', 'started', 'total', 'stopped', 'gap', 'RTT', 'MB sent'];
  output.show({ continuity, handoffs, stream }, () => {
    output.table(head, rows, 'no handoff');
    output.line('');
    output.line('Times in ms. decided: since the sign of the walk; started: since the arrival;');
    output.line('stopped: no vCPU ran; gap: longest silence of the application then; RTT: before,');
    output.line('over the WAN, after; MB sent: of what memory and disk of the VM hold');
    const sent = handoffs.reduce((sum, each) => sum + each.sentBytes, 0);
    const content = handoffs.reduce((sum, each) => sum + each.contentBytes, 0);
    output.line(`${megabytes(sent)} of ${megabytes(content)} MB had to travel`);
    const verified = stream.verifiedBytes.toLocaleString('en');
    output.line(styleText('bold', `1 TCP connection, 0 resets, ${verified} bytes verified`));
  });
}

async function demo(lab: Lab): Promise<void> {
  const watch: WalkOptions = {
    lab,
    config,
    continuity: continuity as WalkOptions['continuity'],
    streamBps,
    signal,
    tell: (text) => status.say(text),
    onEcho: ({ rttMs, silentMs }) => status.update({ rttMs, silentMs }),
    onStream: ({ bps }) => status.update({ bps }),
    onDecision: ({ reasons }) => {
      for (const reason of reasons.slice(0, 2)) status.say(`  ${reason}`);
    },
    onProgress: (progress) => status.update({ progress }),
  };
  await using walk = await Walk.begin(watch);
  const handoffs: Handoff[] = [];
  for (const [index, from] of way.slice(0, -1).entries()) {
    const to = way[index + 1]!;
    const handoff = await walk.handOff(from, to);
    handoffs.push(handoff);
    const { totalMs, gapMs, sentBytes, contentBytes } = handoff;
    status.say(
      `${walkVm} is at ${to} after ${(totalMs / 1000).toFixed(1)} s, silent for ${gapMs.toFixed(0)} ms; ` +
        `${megabytes(sentBytes)} of ${megabytes(contentBytes)} MB travelled`,
    );
  }
  const stream = await walk.end();
  status.clear();
  show(handoffs, stream);
  if (options.keep) await walk.leave();
}

// Several demos may run at a time.
const lab = await Lab.up({
  name: `w${process.pid.toString(36)}`,
  cloudlets: ['c1', 'c2', 'c3'],
  devices: [{ name: 'phone', at: 'c1', ...(continuity === 'mptcp' ? {} : { cellular: {} }) }],
});
try {
  await demo(lab);
  if (options.keep) {
    await lab.stay();
    status.say(
      `the lab stays; bin/viper lab status --lab ${lab.name} shows it, bin/viper lab down --lab ${lab.name} ends it`,
    );
  }
} catch (error) {
  status.clear();
  console.error(styleText('red', `failed: ${(error as Error).message}`));
  process.exitCode = signal.aborted ? 130 : 1;
} finally {
  if (!options.keep || process.exitCode) await lab[Symbol.asyncDispose]();
  status.clear();
}
