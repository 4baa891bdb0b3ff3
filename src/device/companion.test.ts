import assert from 'node:assert/strict';
import { once } from 'node:events';
import { createServer } from 'node:net';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type { NodeViper } from '../sdk/node.ts';
import { type Attachment, type CompanionEvent, type CompanionOptions, DeviceCompanion } from './companion.ts';
import { attachmentOf, measureByHandshake, measureConnections } from './linux.ts';

const inLan = (lan: number): Attachment => ({
  radio: { device: 'wlan0', address: `10.${lan}.0.2` },
  addresses: [`10.${lan}.0.2`],
  macs: ['02:00:00:00:00:01'],
});

/** Cloudlets without a network: each answers reports as it is told to. */
function stage(answers: Record<string, (body: { addresses: string[]; rtts: unknown[] }) => object>) {
  const reports: { url: string; body: { addresses: string[]; rtts: unknown[] } }[] = [];
  const closed: string[] = [];
  const connect = (url: string) =>
    ({
      close: async () => void closed.push(url),
      reportDevice: async ({ body }: { body: { addresses: string[]; rtts: unknown[] } }) => {
        reports.push({ url, body });
        const answer = answers[url];
        if (!answer) throw new Error(`${url} is away`);
        const neighbours = [{ id: 'other', name: 'other', url: 'https://other' }];
        return { cloudlet: { id: url, name: url, url }, neighbours, device: answer(body) };
      },
      deviceEvents: async function* ({ signal }: { signal: AbortSignal }) {
        await sleep(60_000, undefined, { signal });
        yield {};
      },
    }) as unknown as NodeViper;
  return { connect, reports, closed };
}

async function runUntil(
  options: Omit<CompanionOptions, 'onEvent' | 'measure'>,
  isEnough: (events: CompanionEvent[]) => boolean,
): Promise<{ events: CompanionEvent[]; companion: DeviceCompanion }> {
  const stop = new AbortController();
  const events: CompanionEvent[] = [];
  const companion = new DeviceCompanion({
    lookEveryMs: 1,
    measure: async () => 7,
    ...options,
    onEvent: (event) => {
      events.push(event);
      if (isEnough(events)) stop.abort();
    },
  });
  await companion.run(stop.signal);
  return { events, companion };
}

const here = () => ({ vmIsHere: true, lan: { name: 'c1' } });

test('a new LAN is told at once and before anything is measured, and its path joins meanwhile', async () => {
  const { connect, reports } = stage({ 'https://c1': here });
  let lan = 1;
  const done: string[] = [];
  const mptcp = {
    start: async () => void done.push('start'),
    left: async () => void done.push('left'),
    arrived: async ({ address }: { address: string }) => {
      done.push(`arrived ${address}`);
      return { joined: 'yes' as const };
    },
    again: async () => ({ joined: 'none' as const }),
  };
  const { events } = await runUntil(
    { url: 'https://c1', connect, mptcp, attachment: () => inLan(lan), reportEveryMs: 60_000 },
    (all) => {
      if (all.filter(({ kind }) => kind === 'reported').length === 2) lan = 2;
      return all.filter(({ kind }) => kind === 'reported').length >= 4;
    },
  );
  assert.deepEqual(done, ['start', 'arrived 10.2.0.2']);
  const [first, second] = reports.slice(2);
  assert.deepEqual(first!.body.addresses, ['10.2.0.2']);
  assert.deepEqual(first!.body.rtts, []);
  assert.deepEqual(second!.body.rtts, [
    { cloudletId: 'https://c1', rttMs: 7 },
    { cloudletId: 'other', rttMs: 7 },
  ]);
  assert.ok(events.some(({ kind }) => kind === 'joined'));
});

test('connections that cannot come to a new LAN are tried again until they have', async () => {
  const { connect } = stage({ 'https://c1': here });
  let lan = 1;
  let tries = 0;
  const mptcp = {
    start: async () => {},
    left: async () => {},
    arrived: async () => ({ joined: 'no' as const }),
    again: async () => ({ joined: ++tries < 3 ? ('no' as const) : ('yes' as const) }),
  };
  const { events } = await runUntil(
    { url: 'https://c1', connect, mptcp, attachment: () => inLan(lan) },
    (all) => {
      if (all.some(({ kind }) => kind === 'reported')) lan = 2;
      return all.some((each) => each.kind === 'joined' && each.joined === 'yes');
    },
  );
  assert.deepEqual(
    events.flatMap((each) => (each.kind === 'joined' ? [each.joined] : [])),
    ['no', 'yes'],
  );
  assert.equal(tries, 3);
});

test('a radio without a LAN leaves, and the way over the cellular link is made', async () => {
  const { connect } = stage({ 'https://c1': here });
  let looks = 0;
  const done: string[] = [];
  const mptcp = {
    start: async () => {},
    left: async () => void done.push('left'),
    arrived: async () => ({ joined: 'none' as const }),
    again: async () => ({ joined: 'none' as const }),
  };
  const attachment = (): Attachment => {
    looks += 1;
    return looks < 4 ? inLan(1) : { addresses: [], macs: [] };
  };
  await runUntil({ url: 'https://c1', connect, mptcp, attachment }, (all) =>
    all.some(({ kind }) => kind === 'left'),
  );
  assert.deepEqual(done, ['left']);
});

test('the device goes on with the cloudlet where its VM is now', async () => {
  const { connect, reports, closed } = stage({
    'https://c1': () => ({ vmIsHere: false, vmAt: { name: 'c2', url: 'https://c2' } }),
    'https://c2': here,
  });
  const { events, companion } = await runUntil(
    { url: 'https://c1', connect, attachment: () => inLan(2), reportEveryMs: 1 },
    () => reports.filter(({ url }) => url === 'https://c2').length > 1,
  );
  assert.deepEqual(
    events.find(({ kind }) => kind === 'vm-at'),
    { kind: 'vm-at', cloudlet: 'c2', url: 'https://c2' },
  );
  assert.equal(companion.url, 'https://c2');
  assert.ok(closed.includes('https://c1'));
});

test('a cloudlet that is away is told of once, and one where the VM was before is asked instead', async () => {
  const answers: Parameters<typeof stage>[0] = {
    'https://c1': () => ({ vmIsHere: false, vmAt: { name: 'c2', url: 'https://c2' } }),
  };
  const { connect, reports } = stage(answers);
  const { events } = await runUntil(
    { url: 'https://c1', connect, attachment: () => inLan(2), reportEveryMs: 1 },
    () => reports.filter(({ url }) => url === 'https://c2').length > 2,
  );
  const away = events.filter(({ kind }) => kind === 'unreachable');
  assert.ok(away.length >= 1);
  assert.ok(reports.filter(({ url }) => url === 'https://c1').length >= 2);
});

test('the attachment is the radio first, then the cellular link', () => {
  const card = (address: string, mac: string, internal = false) => ({
    address,
    mac,
    internal,
    netmask: '',
    cidr: null,
    family: 'IPv4' as const,
  });
  const interfaces = {
    lo: [card('127.0.0.1', '00:00:00:00:00:00', true)],
    wwan0: [card('100.64.0.2', '02:00:00:00:00:02')],
    wlan0: [card('10.4.0.2', '02:00:00:00:00:01')],
  };
  const wanted = {
    radio: { device: 'wlan0', address: '10.4.0.2' },
    addresses: ['10.4.0.2', '100.64.0.2'],
    macs: ['02:00:00:00:00:01', '02:00:00:00:00:02'],
  };
  assert.deepEqual(attachmentOf({ radio: 'wlan0', cellular: 'wwan0' }, interfaces), wanted);
  assert.deepEqual(attachmentOf({ cellular: 'wwan0' }, interfaces), wanted);
  const { radio, addresses } = attachmentOf({ radio: 'wlan1', cellular: 'wwan0' }, interfaces);
  assert.deepEqual([radio, addresses], [undefined, ['100.64.0.2']]);
});

test('connections that something came over of late tell their round trip, without a probe', async () => {
  const lines = [
    'ESTAB 0 0 10.1.0.200:5 10.1.0.100:7001 cubic rtt:24.3/2.1 ato:40 lastsnd:9 lastrcv:12 lastack:12',
    'ESTAB 0 0 10.1.0.200:6 10.1.0.100:7002 cubic rtt:2.5/0.9 ato:40 lastsnd:9 lastrcv:60000 lastack:12',
  ];
  const asked: string[] = [];
  const run = async (program: string, args: readonly string[]) => {
    asked.push([program, ...args].join(' '));
    return { stdout: lines.join('\n') };
  };
  const { signal } = new AbortController();
  assert.equal(await measureConnections('10.1.0.100', signal, run), 24.3);
  assert.deepEqual(asked, ['ss -tniOH state established dst 10.1.0.100']);
  lines.splice(0);
  assert.equal(await measureConnections('10.1.0.100', signal, run), undefined);
});

test('a host that answers has a round trip, a closed port has none', async () => {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as { port: number };
  const signal = AbortSignal.timeout(20_000);
  assert.ok((await measureByHandshake(`https://127.0.0.1:${port}`, signal))! > 0);
  server.close();
  await once(server, 'close');
  assert.equal(await measureByHandshake(`https://127.0.0.1:${port}`, signal), undefined);
});
