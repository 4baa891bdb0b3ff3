/**
 * `npm run bench:api`: what the API answers a second with 200 VMs known, beside a bare Fastify hello over the same
 * TLS in the same run, and what an idle daemon weighs. One client, keep-alive; rounds alternate between the two, so
 * that other work on the machine meets both.
 */
import { fork } from 'node:child_process';
import { once } from 'node:events';
import { openAsBlob, readFileSync } from 'node:fs';
import autocannon from 'autocannon';
import { LabFleet } from '../lab/fleet.ts';
import { guestImage } from '../lab/guests.ts';
import { MiB } from '../model/units.ts';
import { median, table } from './report.ts';

const vms = 200;
const rounds = 5;
const secondsPerRound = 4;
const connections = 10;

async function load(url: string, ca: string, token?: string): Promise<number> {
  const result = await autocannon({
    url,
    connections,
    duration: secondsPerRound,
    headers: token ? { authorization: `Bearer ${token}` } : {},
    tlsOptions: { ca },
  });
  if (result.non2xx > 0 || result.errors > 0) {
    throw new Error(`${url}: ${result.non2xx} refusals and ${result.errors} errors, wanted none`);
  }
  return result.requests.average;
}

const residentBytes = (pid: number): number =>
  Number(/^VmRSS:\s+(\d+) kB/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))![1]) * 1024;

await using fleet = await LabFleet.create();
await using cleanUp = new AsyncDisposableStack();
const cloudlet = await fleet.add('bench');
const { viper } = cloudlet;
const idleBytes = residentBytes(cloudlet.pid!);

await viper.importImage({ body: await openAsBlob(guestImage('tiny')), query: { alias: 'tiny' } });
for (let index = 0; index < vms; index += 1) {
  await viper.wait(await viper.createVm({ body: { name: `vm-${index}`, image: 'tiny', start: false } }));
}

const ca = readFileSync(cloudlet.caFile, 'utf8');
const hello = fork(new URL('./hello.ts', import.meta.url), [cloudlet.directory], { stdio: 'inherit' });
cleanUp.defer(() => void hello.kill());
const [{ port }] = (await once(hello, 'message')) as [{ port: number }];

const targets = {
  'bare Fastify hello': () => load(`https://127.0.0.1:${port}/`, ca),
  'GET /healthz': () => load(`${cloudlet.url}/healthz`, ca),
  'GET /v1/vms': () => load(`${cloudlet.url}/v1/vms`, ca, cloudlet.token),
  'GET /v1/vms?limit=200': () => load(`${cloudlet.url}/v1/vms?limit=200`, ca, cloudlet.token),
};
const rates = new Map<string, number[]>(Object.keys(targets).map((name) => [name, []]));
for (let round = 0; round < rounds; round += 1) {
  for (const [name, run] of Object.entries(targets)) rates.get(name)!.push(await run());
}

const base = median(rates.get('bare Fastify hello')!);
console.log(
  `${vms} VMs known, ${connections} connections, ${rounds} rounds of ${secondsPerRound} s, medians\n`,
);
console.log(
  table(
    ['what', 'requests/s', 'against the bare hello'],
    [...rates].map(([name, each]) => [name, median(each).toFixed(0), (median(each) / base).toFixed(2)]),
  ),
);
console.log(`\nresident memory of an idle daemon: ${(idleBytes / MiB).toFixed(0)} MiB`);
console.log(`resident memory after the load:   ${(residentBytes(cloudlet.pid!) / MiB).toFixed(0)} MiB`);
