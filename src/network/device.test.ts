import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { Run } from './commands.ts';
import { MptcpDevice, type MptcpDeviceOptions } from './device.ts';
import { parseMptcpEvent } from './mptcp-monitor.ts';

const { signal } = new AbortController();
const home = { device: 'wlan0', address: '10.1.0.200' };
const cafe = { device: 'wlan0', address: '10.2.0.200' };
const cellular = { device: 'cell0', address: '100.66.1.2' };
const established = (address: string) =>
  `[SF_ESTABLISHED] token=8535b6dc remid=1 locid=2 saddr4=${address} daddr4=10.1.0.100 sport=1 dport=2 backup=0`;

/** A device that notes what is done; a path carries a connection as soon as it is there, where `reaches` says so. */
function fakeDevice(
  options: Partial<MptcpDeviceOptions> = {},
  reaches = (_address: string) => true,
  sockets = 'one',
) {
  const done: string[] = [];
  const lines: string[] = [];
  let wake = () => {};
  const run: Run = async (program, args) => {
    if (program === 'ss') return { stdout: sockets };
    done.push(args.slice(1).join(' '));
    const [, , verb, address = ''] = args;
    if (verb === 'add' && reaches(address)) lines.push(established(address));
    wake();
    return { stdout: '' };
  };
  async function* monitor(stop: AbortSignal) {
    stop.addEventListener('abort', () => wake());
    while (!stop.aborted) {
      for (const line of lines.splice(0)) yield line;
      await new Promise<void>((resolve) => {
        wake = resolve;
        if (lines.length > 0) resolve();
      });
    }
  }
  const device = new MptcpDevice({ run, monitor, joinTimeoutMs: 50, ...options });
  return { device, done };
}

test('a line of the monitor is read; others are passed over', () => {
  assert.deepEqual(parseMptcpEvent(established('10.2.0.200')), {
    name: 'SF_ESTABLISHED',
    token: '8535b6dc',
    localAddress: '10.2.0.200',
    remoteAddress: '10.1.0.100',
  });
  assert.deepEqual(parseMptcpEvent('[        CLOSED] token=8535b6dc'), { name: 'CLOSED', token: '8535b6dc' });
  for (const line of [
    'Timestamp: Sat Nov 21 03:09:58 2026 436966 usec',
    '',
    `[A] token=1 ${'x'.repeat(3000)}`,
  ])
    assert.equal(parseMptcpEvent(line), undefined);
});

test('the new path is there before the old one goes', async () => {
  const { device, done } = fakeDevice();
  using _ = device;
  await device.start(home, signal);
  assert.deepEqual(await device.arrived(cafe, signal), { joined: 'yes' });
  assert.deepEqual(done, [
    'endpoint flush',
    'limits set subflow 8 add_addr_accepted 8',
    'endpoint add 10.1.0.200 dev wlan0 id 1 subflow fullmesh',
    'endpoint add 10.2.0.200 dev wlan0 id 2 subflow fullmesh',
    'endpoint delete id 1',
  ]);
});

test('a path over which nothing comes leaves the old one in place, until a later one carries something', async () => {
  const { device, done } = fakeDevice({}, (address) => address !== cafe.address);
  using _ = device;
  await device.start(home, signal);
  assert.deepEqual(await device.arrived(cafe, signal), { joined: 'no' });
  assert.ok(done.every((line) => !line.startsWith('endpoint delete')));
  assert.deepEqual(await device.arrived(home, signal), { joined: 'yes' });
  assert.deepEqual(done.slice(-2), ['endpoint delete id 1', 'endpoint delete id 2']);
});

test('a path over which nothing came at first joins when it is tried again, and the old one goes', async () => {
  let isCut = true;
  const { device, done } = fakeDevice({}, (address) => address === home.address || !isCut);
  using _ = device;
  await device.start(home, signal);
  assert.deepEqual(await device.arrived(cafe, signal), { joined: 'no' });
  assert.deepEqual(await device.again(signal), { joined: 'no' });
  isCut = false;
  assert.deepEqual(await device.again(signal), { joined: 'yes' });
  assert.deepEqual(done.slice(-3), [
    'endpoint delete id 3',
    'endpoint add 10.2.0.200 dev wlan0 id 4 subflow fullmesh',
    'endpoint delete id 1',
  ]);
});

test('a path that does not answer is made again as another one, to the address where the connection began', async () => {
  let tries = 0;
  const options = { joinTimeoutMs: 60_000, joinAgainMs: 5 };
  const { device, done } = fakeDevice(options, (address) => address === cafe.address && ++tries === 2);
  using _ = device;
  await device.start(home, signal);
  assert.deepEqual(await device.arrived(cafe, signal), { joined: 'yes' });
  assert.deepEqual(done.slice(3), [
    'endpoint add 10.2.0.200 dev wlan0 id 2 subflow fullmesh',
    'endpoint delete id 2',
    'endpoint add 10.2.0.200 dev wlan0 id 3 subflow',
    'endpoint delete id 1',
  ]);
});

test('a device without connections waits for nothing', async () => {
  const { device, done } = fakeDevice({}, () => false, '');
  using _ = device;
  await device.start(home, signal);
  assert.deepEqual(await device.arrived(cafe, signal), { joined: 'none' });
  assert.equal(done.at(-1), 'endpoint delete id 1');
});

test('the cellular path is used at once, kept silent, or opened when the radio has gone, as the mode says', async () => {
  const flags = async (mode: 'full' | 'backup' | 'single-path') => {
    const { device, done } = fakeDevice({ mode, cellular });
    using _ = device;
    await device.start(home, signal);
    const atStart = done.filter((line) => line.includes('cell0'));
    await device.left(signal);
    const whileGone = done.filter((line) => line.includes('cell0'));
    await device.arrived(cafe, signal);
    return [atStart, whileGone, done.filter((line) => line === 'endpoint delete id 251')];
  };
  const add = 'endpoint add 100.66.1.2 dev cell0 id 251 subflow fullmesh';
  assert.deepEqual(await flags('full'), [[add], [add], []]);
  assert.deepEqual(await flags('backup'), [[`${add} backup`], [`${add} backup`], []]);
  assert.deepEqual(await flags('single-path'), [[], [add], ['endpoint delete id 251']]);
});
