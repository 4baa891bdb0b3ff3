/** A lab as the kernel and ping see it: real namespaces, links, walks, and that nothing is left. */
import assert from 'node:assert/strict';
import { execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { promisify } from 'node:util';
import { Lab } from '../../src/lab/lab.ts';
import { until } from './lab-vm.ts';
import { labName, leftOf, lineOf, ping, probe, processesOf, skip } from './lab-world.ts';

const options = { skip, timeout: 300_000 };
const quick = ['-c', '5', '-i', '0.1'];
let lab: Lab;

if (!skip) {
  before(async () => {
    lab = await Lab.up({
      name: labName('w'),
      topology: 'star',
      devices: [{ name: 'phone', cellular: { rttMs: 60 } }],
    });
  });
  after(async () => {
    await lab?.[Symbol.asyncDispose]();
  });
}

/** Not below what was set, but for the clock ticks that are rounded, and of its order. */
function assertRtt(minMs: number, wantedMs: number): void {
  assert.ok(minMs >= 0.9 * wantedMs && minMs < 10 * wantedMs + 100, `${minMs} ms, wanted about ${wantedMs}`);
}

test('each link has its round-trip time, and a star leads through its middle', options, async () => {
  assertRtt((await ping(lab, 'c1', '10.2.0.1', ...quick)).minMs, 20);
  assertRtt((await ping(lab, 'c2', '10.3.0.1', ...quick)).minMs, 40);
  assertRtt((await ping(lab, 'phone', lab.site('c2').address, ...quick)).minMs, 20);
});

test('a device is in one LAN, and has a path of its own over its cellular link', options, async () => {
  assert.ok((await ping(lab, 'phone', '10.1.0.1', ...quick)).minMs < 20);
  assertRtt((await ping(lab, 'phone', '10.1.0.1', ...quick, '-I', '100.66.1.2')).minMs, 60);
  assertRtt((await ping(lab, 'c3', '100.66.1.2', ...quick)).minMs, 60);
});

test('the host reaches every cloudlet, and no cloudlet another one past the WAN', options, async () => {
  for (const { address } of lab.layout.sites)
    await promisify(execFile)('ping', ['-n', '-c', '1', '-W', '5', address]);
  await lab.link('c1', 'c2', { isCut: true });
  assert.equal((await ping(lab, 'c1', lab.site('c2').address, '-c', '2', '-i', '0.2')).received, 0);
  await promisify(execFile)('ping', ['-n', '-c', '1', '-W', '5', lab.site('c2').address]);
  await lab.link('c1', 'c2', { isCut: false });
});

test('a link changes while it is up: delay, loss, cut and back', options, async () => {
  await lab.link('c1', 'c2', { rttMs: 100 });
  assertRtt((await ping(lab, 'c1', '10.2.0.1', ...quick)).minMs, 100);
  await lab.link('c1', 'c2', { rttMs: 10, lossPercent: 30 });
  const lossy = await ping(lab, 'c1', '10.2.0.1', '-c', '200', '-i', '0.01');
  // Half of them, as both ways lose. Of 200 it is never less than 60 nor more than 140.
  assert.ok(lossy.received > 60 && lossy.received < 140, JSON.stringify(lossy));
  await lab.link('c1', 'c2', { isCut: true });
  assert.equal((await ping(lab, 'c1', '10.2.0.1', ...quick)).received, 0);
  await lab.link('c1', 'c2', { isCut: false, lossPercent: 0 });
  assert.equal((await ping(lab, 'c1', '10.2.0.1', ...quick)).received, 5);
  assert.deepEqual(
    (await lab.status()).links.find(({ places }) => places.join() === 'c1,c2'),
    { places: ['c1', 'c2'], rttMs: 10, rateBps: 350e6, lossPercent: 0, isCut: false },
  );
});

test('a link carries no more than its rate, and what it carries arrives whole', options, async () => {
  await lab.link('c1', 'c2', { rateBps: 10e6 });
  const server = probe(lab, 'c1', 'stream-server', '--listen', '0.0.0.0:7100');
  try {
    await lineOf(server.lines, 'listening');
    const client = probe(lab, 'c2', 'stream', '--to', '10.1.0.1:7100', '--bytes', '2500000');
    const summary = await lineOf(client.lines, 'summary');
    assert.equal(summary.brokenBy, undefined);
    assert.ok(Number(summary.verifiedBytes) >= 2_500_000);
    // 2 s at 10 Mbit/s, less what may pass in one burst.
    assert.ok(Number(summary.durationMs) > 1700, `${summary.durationMs} ms`);
  } finally {
    server.child.kill();
    // Without a limit, and with the usual one again.
    await lab.link('c1', 'c2', { rateBps: 0 });
    assertRtt((await ping(lab, 'c1', '10.2.0.1', ...quick)).minMs, 10);
    await lab.link('c1', 'c2', { rateBps: 350e6 });
  }
});

test(
  'a device walks: out of one LAN, on the cellular link alone for a while, into the next',
  options,
  async () => {
    const walk = lab.move('phone', { to: 'c2', gapMs: 4000 });
    await until(
      'the device to be nowhere',
      () => lab.status(),
      ({ devices }) => devices[0]!.at === undefined,
    );
    assertRtt((await ping(lab, 'phone', '10.1.0.1', '-c', '2', '-i', '0.2')).minMs, 60);
    assert.deepEqual(await walk, {
      name: 'phone',
      at: 'c2',
      address: '10.2.0.200',
      cellularAddress: '100.66.1.2',
    });
    assert.ok((await ping(lab, 'phone', '10.2.0.1', ...quick)).minMs < 20);
    assert.equal((await ping(lab, 'c1', '10.1.0.200', '-c', '1')).received, 0);
    await lab.link('phone', 'radio', { isCut: true });
    assert.equal((await ping(lab, 'phone', '10.2.0.1', ...quick, '-I', 'wlan0')).received, 0);
    await lab.link('phone', 'radio', { isCut: false });
    await lab.move('phone', { to: 'c2' });
    assert.equal((await ping(lab, 'phone', '10.2.0.1', ...quick)).received, 5);
    await lab.move('phone', { to: 'c1' });
  },
);

test('a probe sees the gap of a walk', options, async () => {
  const server = probe(lab, 'c3', 'echo-server', '--listen', '0.0.0.0:7200');
  try {
    await lineOf(server.lines, 'listening');
    await lab.link('phone', 'cellular', { isCut: true });
    const client = probe(lab, 'phone', 'echo', '--to', '10.3.0.1:7200', '--interval', '20');
    await lineOf(client.lines, 'answered');
    await lab.move('phone', { to: 'c2', gapMs: 1500 });
    assert.ok((await ping(lab, 'phone', '10.3.0.1', ...quick)).received > 0);
    client.child.kill();
    const { received, longestGap } = (await lineOf(client.lines, 'summary')) as unknown as {
      received: number;
      longestGap: { ms: number };
    };
    assert.ok(received > 0 && longestGap.ms >= 1500, JSON.stringify({ received, longestGap }));
  } finally {
    server.child.kill();
    await lab.link('phone', 'cellular', { isCut: false });
  }
});

test('what is not there is refused with what there is', options, async () => {
  await assert.rejects(lab.move('phone', { to: 'c9' }), {
    message: /cloudlet is 'c9', wanted one of c1, c2, c3/,
  });
  await assert.rejects(lab.move('car', { to: 'c1' }), { message: /device is 'car', wanted one of phone/ });
  await assert.rejects(lab.link('c2', 'c3', {}), {
    message: /link is 'c2 c3', wanted one of c1 c2, c1 c3, phone/,
  });
  await assert.rejects(Lab.up({ name: lab.name }), { code: 'name_taken' });
  await assert.rejects(Lab.open('nolab'), { code: 'not_found' });
});

const maker = `
  import { Lab } from ${JSON.stringify(path.resolve(import.meta.dirname, '../../src/lab/lab.ts'))};
  await Lab.up({ name: process.argv[1], devices: [{ name: 'phone' }] });
  console.log('up');
  setInterval(() => {}, 1000);
`;
const make = (name: string) =>
  spawn(process.execPath, ['--input-type=module', '-e', maker, name], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });

test('a lab whose maker was killed is taken away by the next one', options, async () => {
  const name = labName('k');
  const child = make(name);
  await once(child.stdout!, 'data');
  assert.ok((await leftOf(name)).length > 0 && (await processesOf(name)).length > 0);
  child.kill('SIGKILL');
  await once(child, 'exit');
  await using _next = await Lab.up({ name: labName('n'), cloudlets: ['c1'] });
  assert.deepEqual(await leftOf(name), []);
  assert.deepEqual(await processesOf(name), []);
});

test('a lab whose maker was killed while it made it is taken down by name', options, async () => {
  const name = labName('h');
  const child = make(name);
  await until(
    'a part of it',
    () => leftOf(name),
    (parts) => parts.length > 3,
  );
  await assert.rejects(Lab.down(name), { code: 'wrong_state', message: /is being made by process/ });
  child.kill('SIGKILL');
  await once(child, 'exit');
  assert.equal(await Lab.down(name), true);
  assert.deepEqual([await leftOf(name), await processesOf(name)], [[], []]);
  assert.equal(await Lab.down(name), false, 'a second time there is nothing');
});
