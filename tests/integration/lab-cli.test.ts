/** `viper lab …` as a person types it: one command after the other, each a process of its own. */
import assert from 'node:assert/strict';
import { execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { promisify } from 'node:util';
import { until } from './lab-vm.ts';
import { labName, leftOf, processesOf, skip } from './lab-world.ts';

const options = { skip, timeout: 300_000 };
const launcher = path.resolve(import.meta.dirname, '../../bin/viper');
const name = labName('v');
let home: string;

if (!skip) {
  before(async () => {
    home = await mkdtemp(path.join(tmpdir(), 'viper-lab-cli-'));
  });
  after(async () => {
    await viper('lab', 'down', '--lab', name);
    await rm(home, { recursive: true });
  });
}

async function viper(...argv: string[]): Promise<{ code: number; stdout: string; stderr: string }> {
  const env = { ...process.env, VIPER_CONFIG: path.join(home, 'config.json') };
  const end = await promisify(execFile)(launcher, argv, { env, timeout: 240_000 }).catch((error) => error);
  return { code: 0, ...end, stdout: end.stdout, stderr: end.stderr };
}

/** Of a lab command that must succeed: what it prints with --json. */
async function lab(command: string, ...argv: string[]) {
  const { code, stdout, stderr } = await viper('lab', command, '--lab', name, '--json', ...argv);
  assert.equal(code, 0, stderr);
  return JSON.parse(stdout);
}

test('a lab comes up, its daemon is a context, and both go together', options, async () => {
  const status = await lab('up', '--cloudlets', '1', '--device', 'phone');
  assert.deepEqual(
    status.devices.map(({ at }: { at: string }) => at),
    ['c1'],
  );
  const shown = await viper('--context', `${name}-c1`, 'status', '--json');
  assert.equal(shown.code, 0, shown.stderr);
  assert.equal((await viper('lab', 'up', '--lab', name)).code, 5, 'one of that name is up');
  assert.deepEqual(await lab('down'), { existed: true });
  assert.deepEqual([await leftOf(name), await processesOf(name)], [[], []]);
  assert.doesNotMatch((await viper('context', 'list')).stdout, new RegExp(name));
  assert.deepEqual(await lab('down'), { existed: false });
});

test('Ctrl-C while it comes up leaves nothing', options, async () => {
  const env = { ...process.env, VIPER_CONFIG: path.join(home, 'config.json') };
  const child = spawn(launcher, ['lab', 'up', '--lab', name], { env, stdio: 'ignore' });
  await until(
    'a part of it',
    () => leftOf(name),
    (parts) => parts.length > 3,
  );
  child.kill('SIGINT');
  assert.deepEqual(await once(child, 'exit'), [130, null]);
  assert.deepEqual([await leftOf(name), await processesOf(name)], [[], []]);
});

test('links and devices are changed by later commands, and seen by status', options, async () => {
  await lab(
    'up',
    '--no-daemons',
    '--cloudlets',
    '2',
    '--rtt',
    '10',
    '--rate',
    '1.5G',
    '--cellular',
    '--device',
    'phone@c2',
  );
  assert.equal((await lab('link', 'c2', 'c1', '--rtt', '100', '--rate', '60', '--loss', '1')).rateBps, 60e6);
  assert.equal((await lab('link', 'c1', 'c2', '--cut')).isCut, true);
  assert.equal((await lab('link', 'c1', 'c2', '--restore')).rttMs, 100);
  assert.equal((await lab('move', 'phone', '--to', 'c1', '--gap', '50')).address, '10.1.0.200');
  const { links, devices } = await lab('status');
  assert.deepEqual(links[0], {
    places: ['c1', 'c2'],
    rttMs: 100,
    rateBps: 60e6,
    lossPercent: 1,
    isCut: false,
  });
  assert.equal(devices[0].at, 'c1');
  assert.match((await viper('lab', 'status', '--lab', name)).stdout, /c1 c2 +100 ms, 60 Mbit\/s, 1 % lost\n/);
});

test('a program runs in the network of a device, and its end is that of the command', options, async () => {
  const run = (...argv: string[]) => viper('lab', 'run', '--lab', name, 'phone', '--', ...argv);
  assert.match((await run('ip', '-br', 'address', 'show', 'dev', 'wlan0')).stdout, /10\.1\.0\.200/);
  assert.equal((await run('sh', '-c', 'exit 7')).code, 7);
});

test('what cannot be done is told in one line, by the exit code of its class', options, async () => {
  for (const [argv, code, message] of [
    [['move', 'phone', '--to', 'c9'], 2, /cloudlet is 'c9', wanted one of c1, c2/],
    [['link', 'c1', 'c2', '--rtt', '99999'], 2, /link.rttMs is 99999, wanted 0 to 10000 ms/],
    [['link', 'c1', 'c2', '--cut', '--restore'], 2, /either --cut or --restore/],
    [['link', 'c1', 'c2', '--rate', 'fast'], 2, /'fast' is invalid/],
  ] as const) {
    const end = await viper('lab', ...argv, '--lab', name);
    assert.equal(end.code, code, end.stderr);
    assert.match(end.stderr, message);
    assert.doesNotMatch(end.stderr, / at .*\.ts:/);
  }
  assert.equal((await viper('lab', 'status', '--lab', 'nolab')).code, 4);
});
