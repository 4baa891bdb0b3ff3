import assert from 'node:assert/strict';
import { test } from 'node:test';
import { type Answer, fakeDaemon, refusal, reply } from '../sdk/fake-daemon.ts';
import { fakeShell } from './fake-shell.ts';
import { onlyForward, progressText } from './migration-progress.ts';
import { formatBitRate, formatDuration } from './output.ts';

const createdAt = new Date(Date.now() - 300_000).toISOString();
const operation = (state: string, more: object = {}) => ({
  id: 'op1',
  kind: 'vm.migrate',
  subject: { vmId: 'id1', name: 'web', migrationId: 'm1' },
  state,
  progress: null,
  createdAt,
  ...more,
});
const progress = (phase: string, doneBytes: number, round = 0) => ({
  phase,
  round,
  doneBytes,
  totalBytes: 1000,
  dirtyBps: 2e6,
  rateBps: 940e6,
  etaMs: 47_000,
});
const limits = { downtimeMs: 300, bandwidthBps: 100e6, autoConverge: true };
const migration = (state: string, more: object = {}) => ({
  id: 'm1',
  role: 'source',
  vm: { id: 'id1', name: 'web' },
  peer: { id: 'id2', name: 'south' },
  options: { mode: 'auto', storage: 'copied', limits, channels: 0 },
  state,
  over: false,
  createdAt,
  ...more,
});
const result = {
  totalMs: 88_000,
  downtimeMs: 85,
  memoryBytes: 2 * 1024 ** 3,
  diskBytes: 0,
  finishedAs: 'precopy',
};
const moved = migration('moved', { over: true, result });

async function setUp(answers: Record<string, Answer>) {
  const daemon = await fakeDaemon((request, response, raw) => {
    const answer = answers[`${request.method} ${request.path.split('?')[0]}`];
    if (answer) return answer(request, response, raw);
    reply(response, 404, refusal('not_found', `There is nothing at ${request.path}`));
  });
  const shell = fakeShell({ VIPER_URL: daemon.url, VIPER_TOKEN: 'secret' });
  return {
    ...shell,
    requests: daemon.requests,
    async [Symbol.asyncDispose]() {
      shell[Symbol.dispose]();
      await daemon[Symbol.asyncDispose]();
    },
  };
}

test('a relayed migration is told when it has left, and when it is whole', async () => {
  const relays = [{ name: 'r1', slabs: 9, bytes: 1 }];
  const relayed = { replicas: 2, slabs: 9, zeroPages: 5, alikePages: 0, relays };
  const left = { ...result, exitMs: 2300, totalMs: 2300, relayed };
  const whole = {
    ...left,
    totalMs: 40_000,
    merge: { slabs: 9, bytes: 1, faults: 3, wrong: 0, refetched: 0 },
  };
  const asked = [left, left, whole];
  await using shell = await setUp({
    'POST /v1/vms/web/migrate': (_, response) => reply(response, 202, operation('succeeded')),
    'GET /v1/operations/op1': (_, response) => reply(response, 200, operation('succeeded')),
    'GET /v1/migrations/m1': (_, response) =>
      reply(
        response,
        200,
        migration('moved', { over: true, result: asked.length > 1 ? asked.shift() : whole }),
      ),
  });
  const args = ['--engine', 'relayed', '--relays', 'r1,r2', '--replicas', '1'];
  const end = await shell.viper(['vm', 'migrate', 'web', '--to', 'south', ...args]);
  assert.equal(end.exitCode, 0, end.stderr);
  assert.deepEqual(JSON.parse(shell.requests[0]?.body ?? ''), {
    to: 'south',
    engine: 'relayed',
    relays: ['r1', 'r2'],
    replicas: 1,
  });
  assert.match(end.stdout + end.stderr, /has left after 2\.3 s: .*south fetches the rest from r1/);
  assert.match(end.stdout + end.stderr, /2\.3 s until it had left, 40 s in all/);
});

test('a migration is asked for as the options say, watched, and told with time, downtime and bytes', async () => {
  const operations = [operation('running'), operation('running'), operation('succeeded')];
  await using shell = await setUp({
    'POST /v1/vms/web/migrate': (_, response) => reply(response, 202, operation('running')),
    'GET /v1/operations/op1': (_, response) => reply(response, 200, operations.shift()),
    'GET /v1/migrations/m1': (_, response) =>
      reply(
        response,
        200,
        operations.length > 0 ? migration('copying', { progress: progress('disk', 100) }) : moved,
      ),
  });
  const args = ['--mode', 'hybrid', '--downtime', '100ms', '--bandwidth', '1.5G', '--auto-converge'];
  const end = await shell.viper(['vm', 'migrate', 'web', '--to', 'south', ...args]);
  assert.deepEqual(JSON.parse(shell.requests[0]?.body ?? ''), {
    to: 'south',
    mode: 'hybrid',
    limits: { downtimeMs: 100, bandwidthBps: 1.5e9, autoConverge: true },
  });
  assert.deepEqual(end, {
    exitCode: 0,
    stdout: 'VM web runs at south: 1 min 28 s in all, 85 ms downtime, 2 GiB sent.\n',
    stderr: 'migrate web: disk\n',
  });
  const noWait = await shell.viper(['vm', 'migrate', 'web', '--to', 'south', '--no-wait']);
  assert.equal(noWait.stdout, 'op1\n');
});

test('Ctrl-C says that the migration goes on, and a daemon that was restarted is watched on', async () => {
  const error = { code: 'interrupted', message: 'The daemon stopped', details: {} };
  let seen = 0;
  await using shell = await setUp({
    'POST /v1/vms/web/migrate': (_, response) => reply(response, 202, operation('running')),
    'POST /v1/vms/db/migrate': (_, response) => reply(response, 202, operation('failed', { error })),
    'GET /v1/operations/op1': (_, response) => reply(response, 200, operation('running')),
    'GET /v1/migrations/m1': (_, response) => {
      seen += 1;
      const now = migration('copying', { progress: progress('memory', 500, 1) });
      reply(response, 200, seen > 3 ? moved : now);
    },
  });
  const restarted = await shell.viper(['vm', 'migrate', 'db', '--to', 'south', '--quiet']);
  assert.match(restarted.stdout + restarted.stderr, /^$/);
  assert.equal(restarted.exitCode, 0);
  seen = -1000;
  const interrupted = await shell.viper(['vm', 'migrate', 'web', '--to', 'south'], {
    onOutput: (_, text, child) => text.endsWith('memory\n') && child.kill('SIGINT'),
  });
  assert.equal(interrupted.exitCode, 130);
  assert.match(
    interrupted.stderr,
    /migration m1 goes on\n.*viper migration watch m1\n.*viper migration cancel m1\n$/,
  );
});

test('a refusal lists every problem, and so does a dry run', async () => {
  const problems = [
    { field: 'memoryBytes', value: 9, wanted: 3, message: 'it needs 9 GiB of memory, 3 GiB are free' },
    { field: 'nets.0.network', value: 'lan', wanted: ['user'], message: "there is no network 'lan'" },
  ];
  const message = `VM 'web' cannot go to south: ${problems.map((each) => each.message).join('; ')}`;
  await using shell = await setUp({
    'POST /v1/vms/web/migrate': (_, response) =>
      reply(response, 409, refusal('migration_refused', message, { problems })),
    'POST /v1/vms/web/migrate/plan': (_, response) => reply(response, 200, { problems }),
    'POST /v1/vms/db/migrate/plan': (_, response) => {
      const inputs = { memoryBytes: 1024 ** 3, dirtyBps: 5e6, rttMs: 12 };
      const forecast = { totalMs: 61_000, downtimeMs: 310, bytes: 1024 ** 3, converges: false, inputs };
      reply(response, 200, { problems: [], forecast });
    },
  });
  const wanted = {
    exitCode: 5,
    stdout: '',
    stderr:
      "viper: VM 'web' cannot go to south\n  it needs 9 GiB of memory, 3 GiB are free\n  there is no network 'lan'\n",
  };
  assert.deepEqual(await shell.viper(['vm', 'migrate', 'web', '--to', 'south']), wanted);
  assert.deepEqual(await shell.viper(['vm', 'migrate', 'web', '--to', 'south', '--dry-run']), wanted);
  const json = await shell.viper(['vm', 'migrate', 'web', '--to', 'south', '--dry-run', '--json']);
  assert.deepEqual(JSON.parse(json.stdout), { problems });
  assert.equal(json.exitCode, 5);
  const forecast = await shell.viper(['vm', 'migrate', 'db', '--to', 'south', '--dry-run']);
  assert.match(forecast.stdout, /^VM db fits south\.\nTime: +1 min 1 s\nDowntime: +310 ms\nBytes: +1 GiB\n/);
  assert.match(
    forecast.stdout,
    /Converges: +no.*\nFrom memory: +1 GiB\nFrom what the guest writes: +5 Mbit\/s\nFrom the round trip: +12 ms/,
  );
});

test('migrations are listed, shown, limited and cancelled', async () => {
  const failure = { code: 'failed', message: 'no room' };
  await using shell = await setUp({
    'GET /v1/migrations': (_, response) => reply(response, 200, { items: [moved], next: null }),
    'GET /v1/migrations/m1': (_, response) => reply(response, 200, moved),
    'GET /v1/migrations/m2': (_, response) =>
      reply(response, 200, migration('ended', { id: 'm2', over: true, failure, attention: 'look at it' })),
    'PUT /v1/migrations/m1/limits': ({ body }, response) => {
      const { options } = migration('copying');
      reply(response, 200, migration('copying', { options: { ...options, limits: JSON.parse(body) } }));
    },
    'GET /v1/operations': (_, response) =>
      reply(response, 200, { items: [operation('failed'), operation('running', { id: 'op2' })], next: null }),
    'DELETE /v1/operations/op2': (_, response) => reply(response, 202, operation('running', { id: 'op2' })),
  });
  const list = await shell.viper(['migration', 'list']);
  assert.match(list.stdout, /m1 +web +to south +auto +moved +1 min 28 s +85 ms +5m\n$/);
  const show = await shell.viper(['migration', 'show', 'm1']);
  assert.match(show.stdout, /Limits: +downtime 300 ms, 100 Mbit\/s, auto-converge\n/);
  assert.match(show.stdout, /Result memoryBytes: +2 GiB\n/);
  assert.match((await shell.viper(['migration', 'show', 'm2'])).stdout, /Attention: +look at it\n/);
  const limit = await shell.viper(['migration', 'limit', 'm1', '--bandwidth', 'none', '--downtime', '1s']);
  assert.equal(
    limit.stdout,
    'The limits of migration m1 are now: downtime 1 s, no limit of bandwidth, auto-converge.\n',
  );
  assert.equal((await shell.viper(['migration', 'limit', 'm1'])).exitCode, 2);
  const paused = await shell.viper(['migration', 'pause', 'm1']);
  assert.match(paused.stdout, /now: downtime 300 ms, 100 Mbit\/s, auto-converge, paused\.\n$/);
  assert.doesNotMatch((await shell.viper(['migration', 'resume', 'm1'])).stdout, /paused/);
  const calm = await shell.viper(['migration', 'limit', 'm1', '--auto-converge', 'off']);
  assert.match(calm.stdout, /now: downtime 300 ms, 100 Mbit\/s\.\n$/);
  assert.equal(
    (await shell.viper(['migration', 'cancel', 'm1'])).stdout,
    'Migration m1 is being cancelled.\n',
  );
  const over = await shell.viper(['migration', 'cancel', 'm2']);
  assert.match(over.stderr, /Migration m2 cannot be cancelled: it is over: ended\n$/);
  assert.equal(over.exitCode, 5);
  const failed = await shell.viper(['migration', 'watch', 'm2']);
  assert.deepEqual(failed, { exitCode: 7, stdout: '', stderr: "viper: VM 'web' was not moved: no room\n" });
});

test('a claim wants --force and tells the danger without it', async () => {
  await using shell = await setUp({
    'POST /v1/vms/web/claim': (_, response) => reply(response, 200, { name: 'web', state: 'running' }),
  });
  const warned = await shell.viper(['vm', 'claim', 'web', '--reason', 'it burnt down']);
  assert.equal(warned.exitCode, 2);
  assert.match(warned.stderr, /Not claimed: .* there are two of it/);
  assert.equal(shell.requests.length, 0);
  const claimed = await shell.viper(['vm', 'claim', 'web', '--reason', 'it burnt down', '--force']);
  assert.equal(claimed.stdout, 'VM web belongs to this cloudlet, and is running.\n');
  assert.equal(shell.requests[0]?.body, '{"reason":"it burnt down"}');
});

test('a custodian claims a VM from its migration, and tells what is lost by it', async () => {
  const claimed = operation('succeeded', { kind: 'vm.claim', subject: { name: 'web', migrationId: 'm1' } });
  const held = {
    migrationId: 'm1',
    vm: { id: 'v1', name: 'web' },
    from: { id: 'c2', name: 'south' },
    memoryBytes: 2 ** 30,
    state: 'held',
    createdAt: new Date().toISOString(),
  };
  await using shell = await setUp({
    'GET /v1/escrows': (_, response) => reply(response, 200, { items: [held] }),
    'POST /v1/escrows/m1/claim': (_, response) => reply(response, 202, claimed),
  });
  assert.match((await shell.viper(['escrow', 'list'])).stdout, /web +south +held +1 GiB .* m1/);
  const args = ['vm', 'claim', 'web', '--from', 'm1', '--reason', 'it burnt down'];
  const warned = await shell.viper(args);
  assert.equal(warned.exitCode, 2);
  assert.match(warned.stderr, /since it left its source, also on its disk, is gone/);
  const end = await shell.viper([...args, '--force']);
  assert.equal(end.stdout, 'VM web belongs to this cloudlet, and is as it left its source.\n');
  assert.equal(shell.requests.at(-1)?.body, '{"vm":"web","reason":"it burnt down"}');
});

test('a cloudlet is drained and undrained', async () => {
  const drained = operation('succeeded', {
    kind: 'cloudlet.drain',
    subject: {},
    result: { moved: 'web db' },
  });
  await using shell = await setUp({
    'POST /v1/drain': (_, response) => reply(response, 202, drained),
    'DELETE /v1/drain': (_, response) => reply(response, 204),
  });
  const args = ['--to', 'south', 'west', '--parallel', '4', '--order', 'largest'];
  const end = await shell.viper(['drain', ...args]);
  assert.equal(end.stdout, 'Moved: web db. The cloudlet is drained.\n');
  assert.deepEqual(JSON.parse(shell.requests[0]?.body ?? ''), {
    to: ['south', 'west'],
    parallel: 4,
    order: 'largest',
  });
  assert.equal((await shell.viper(['undrain'])).stdout, 'The cloudlet takes VMs again.\n');
});

test('what is shown of a migration never runs backwards', () => {
  const forward = onlyForward();
  const shown = [
    progress('disk', 100),
    progress('memory', 600, 2),
    // What a daemon says that has just been started again.
    progress('preflight', 0),
    { ...progress('memory', 650, 1), totalBytes: 4000 },
    progress('switchover', 1000, 3),
  ].map((each) => forward(each as Parameters<typeof forward>[0]));
  assert.deepEqual(
    shown.map(({ phase, round, doneBytes, fraction }) => [phase, round, doneBytes, fraction]),
    [
      ['disk', 0, 100, 0.1],
      ['memory', 2, 600, 0.6],
      ['memory', 2, 600, 0.6],
      ['memory', 2, 650, 0.6],
      ['switchover', 3, 1000, 1],
    ],
  );
  assert.equal(
    progressText(shown[1]!),
    'memory, round 2: 600 B of 1000 B at 940 Mbit/s, dirties 2 Mbit/s, 47 s left',
  );
});

test('durations and rates are short', () => {
  const durations: [number, string][] = [
    [85.4, '85 ms'],
    [1500, '1.5 s'],
    [59_400, '59 s'],
    [200_000, '3 min 20 s'],
    [3_900_000, '1 h 5 min'],
  ];
  for (const [ms, text] of durations) assert.equal(formatDuration(ms), text);
  assert.equal(formatBitRate(0), '0 bit/s');
  assert.equal(formatBitRate(1.5e9), '1.5 Gbit/s');
});
