/**
 * A host that must be empty soon: in a lab of five cloudlets a busy guest of 1 GB leaves one for another that takes a
 * tenth of what the first could give. The others hold the rest, so the first is switched off long before the guest is
 * whole; at the end the guest verifies its memory.
 *
 *   npm run demo:exit [-- --memory 1024] [-- --filled 256] [-- --loopback]
 *
 * `--loopback` goes without namespaces, and so without the way between the cloudlets.
 */
import assert from 'node:assert/strict';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { ExitWorld } from '../src/bench/exit/world.ts';
import { progressText } from '../src/cli/migration-progress.ts';
import { formatDuration } from '../src/cli/output.ts';
import { formatBytes } from '../src/model/units.ts';
import { StatusLine } from './status-line.ts';

const { values } = parseArgs({
  options: {
    memory: { type: 'string', default: '1024' },
    filled: { type: 'string', default: '256' },
    loopback: { type: 'boolean', default: false },
  },
});
const size = { memoryMiB: Number(values.memory), filledMiB: Number(values.filled) };
const rates = { uplinkMbps: 200, destinationMbps: 20, relayMbps: 200 };
const vm = 'web';
const one = { params: { vm } };

const status = new StatusLine(process.stderr);
status.say(
  `five cloudlets: src gives ${rates.uplinkMbps} Mbit/s, dst takes ${rates.destinationMbps}, r1 to r3 lend memory`,
);
await using world = await ExitWorld.open({ relays: 3, rttMs: 20, isLoopback: values.loopback });
const { source, destination, relays } = world;
status.say(
  `${vm} boots, and fills ${size.filledMiB} MiB, half of it with random bytes, which takes it a minute or two`,
);
await world.boot([vm], { ...size, does: 'reads' });
status.say(
  `${vm} runs at src: ${size.memoryMiB} MiB, ${size.filledMiB} MiB of it filled and read all the while`,
);
await world.setRates(rates);

const began = performance.now();
const operation = await source.viper.migrateVm({
  ...one,
  body: { to: 'dst', engine: 'relayed', storage: 'shared' },
});
const migration = { params: { migration: operation.subject.migrationId! } };
const watch = setInterval(() => {
  source.viper.getMigration(migration).then(
    ({ progress }) => progress && status.update({ progress }),
    () => {},
  );
}, 300);
await source.viper.wait(operation);
clearInterval(watch);
const exitMs = performance.now() - began;
const { result } = await source.viper.getMigration(migration);
await source.stop('SIGKILL');
status.say(
  `exit after ${formatDuration(exitMs)}: no QEMU and no file of ${vm} is at src, and its daemon is killed`,
);
for (const { name, slabs, bytes } of result!.relayed!.relays)
  status.say(`  ${name} holds ${formatBytes(bytes)} in ${slabs} slabs`);
status.say(
  `${vm} was stopped for ${formatDuration(result!.downtimeMs ?? 0)} and runs at dst, which fetches what it lacks`,
);

for (;;) {
  const { over, progress } = await destination.viper.getMigration(migration);
  if (over) break;
  if (progress)
    process.stderr.isTTY ? status.update({ progress }) : status.say(`  ${progressText(progress)}`);
  await sleep(process.stderr.isTTY ? 300 : 3000);
}
const totalMs = performance.now() - began;
await world.verify([vm]);
const left = await Promise.all(relays.map(async ({ viper }) => (await viper.getRelay()).usedBytes));
assert.deepEqual(new Set(left), new Set([0]));
status.say(`whole after ${formatDuration(totalMs)}, and its checksums verify; the relays have forgotten it`);
status.say(
  `src was free ${(totalMs / exitMs).toFixed(1)} times sooner than the destination could take the guest`,
);
