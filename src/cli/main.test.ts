import assert from 'node:assert/strict';
import type { ChildProcess } from 'node:child_process';
import { truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { type Answer, fakeDaemon, refusal, reply } from '../sdk/fake-daemon.ts';
import { fakeShell } from './fake-shell.ts';

const digest = `sha256:${'ab'.repeat(32)}`;
const createdAt = new Date(Date.now() - 300_000).toISOString();
const summary = (name: string, state: string) => ({
  id: `id-of-${name}`,
  name,
  state,
  createdAt,
  image: digest,
  cpus: 2,
  memoryBytes: 512 * 1024 ** 2,
});
const operation = (state: string, more: object = {}) => ({
  id: 'op1',
  kind: 'vm.create',
  subject: { vmId: 'id1', name: 'web' },
  state,
  progress: { phase: 'booting', done: 1, total: 2, unit: 'steps' },
  createdAt,
  ...more,
});

/** A daemon that answers by `METHOD /path` (no query), and a shell whose VIPER_URL leads to it. */
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
    url: daemon.url,
    async [Symbol.asyncDispose]() {
      shell[Symbol.dispose]();
      await daemon[Symbol.asyncDispose]();
    },
  };
}

test('a list is a table of all pages, and with --json one document', async () => {
  await using shell = await setUp({
    'GET /v1/vms': ({ path }, response) =>
      path.includes('after=2')
        ? reply(response, 200, { items: [summary('database', 'stopped')], next: null })
        : reply(response, 200, { items: [summary('web', 'running')], next: '2' }),
  });
  const people = await shell.viper(['vm', 'list']);
  assert.deepEqual(people.stdout.split('\n'), [
    'NAME      STATE    CPUS  MEMORY   IMAGE                AGE  ID',
    'web       running  2     512 MiB  sha256:abababababab  5m   id-of-web',
    'database  stopped  2     512 MiB  sha256:abababababab  5m   id-of-database',
    '',
  ]);
  assert.equal(people.exitCode, 0);
  assert.equal(people.stderr, '');
  assert.equal(shell.requests[0]?.headers.authorization, 'Bearer secret');
  const programs = await shell.viper(['vm', 'list', '--json']);
  assert.deepEqual(JSON.parse(programs.stdout), {
    items: [summary('web', 'running'), summary('database', 'stopped')],
    next: null,
  });
});

test('an empty list says on stderr how to make one', async () => {
  await using shell = await setUp({
    'GET /v1/vms': (_, response) => reply(response, 200, { items: [], next: null }),
  });
  const { stdout, stderr, exitCode } = await shell.viper(['vm', 'list']);
  assert.deepEqual({ stdout, exitCode }, { stdout: '', exitCode: 0 });
  assert.match(stderr, /There are no VMs. Make one: viper vm create/);
  assert.equal((await shell.viper(['-q', 'vm', 'list'])).stderr, '');
});

test('create sends what the options say, shows the phases and waits', async () => {
  const states = [operation('running'), operation('succeeded', { progress: null })];
  await using shell = await setUp({
    'POST /v1/vms': (_, response) => reply(response, 202, operation('running')),
    'GET /v1/operations/op1': (_, response) => reply(response, 200, states.shift()),
  });
  const keys = join(shell.directory, 'id.pub');
  writeFileSync(keys, '# mine\nssh-ed25519 AAAA me\n\n');
  const args = [
    '--image',
    'debian',
    '--memory',
    '512M',
    '--disk',
    '4G',
    '--cpus',
    '2',
    '--net',
    'lan',
    '--net',
    'user',
  ];
  const end = await shell.viper(['vm', 'create', 'web', ...args, '--ssh-key', keys, '--no-start']);
  assert.deepEqual(JSON.parse(shell.requests[0]?.body ?? ''), {
    name: 'web',
    image: 'debian',
    hardware: {
      cpu: { count: 2 },
      memoryBytes: 512 * 1024 ** 2,
      diskBytes: 4 * 1024 ** 3,
      nets: [{ network: 'lan' }, { network: 'user' }],
    },
    seed: { sshKeys: ['ssh-ed25519 AAAA me'] },
    start: false,
  });
  assert.deepEqual(end, {
    exitCode: 0,
    stdout: 'VM web is created (id1).\n',
    stderr: 'vm.create web: booting\n',
  });
});

test('with --no-wait only the id of the operation is printed', async () => {
  await using shell = await setUp({
    'POST /v1/vms/web/stop': (_, response) => reply(response, 202, operation('running')),
  });
  const end = await shell.viper(['vm', 'stop', 'web', '--grace', '2m', '--no-wait']);
  assert.deepEqual(end, { exitCode: 0, stdout: 'op1\n', stderr: '' });
  assert.equal(shell.requests[0]?.body, '{"graceMs":120000}');
});

test('an operation that fails ends with its error, and Ctrl-C says that it goes on', async () => {
  const error = { code: 'qemu_failed', message: 'QEMU died', details: { output: ['no disk'] } };
  await using shell = await setUp({
    'POST /v1/vms/web/start': (_, response) => reply(response, 202, operation('failed', { error })),
    'POST /v1/vms/web/pause': (_, response) => reply(response, 202, operation('running')),
    'GET /v1/operations/op1': (_, response) => reply(response, 200, operation('running')),
  });
  const failed = await shell.viper(['vm', 'start', 'web']);
  assert.equal(failed.exitCode, 7);
  assert.match(failed.stderr, /viper: QEMU died\n {2}\| no disk\n {2}operation: op1\n$/);
  const interrupted = await shell.viper(['vm', 'pause', 'web'], {
    onOutput: (_, text, child) => text.endsWith('booting\n') && child.kill('SIGINT'),
  });
  assert.equal(interrupted.exitCode, 130);
  assert.match(
    interrupted.stderr,
    /operation op1 goes on\n.*viper operation watch op1\n.*viper operation cancel op1\n$/,
  );
  const late = await shell.viper(['vm', 'pause', 'web', '--timeout', '100ms', '--quiet']);
  assert.equal(late.exitCode, 7);
  assert.match(late.stderr, /^viper: Operation op1 has not ended within 100 ms; it goes on in the daemon\n/);
});

test('a refusal ends with the exit code of its class and the details that help', async () => {
  const wrongState = refusal('wrong_state', "VM 'web' is running", { state: 'running', allowed: ['stop'] });
  await using shell = await setUp({
    'POST /v1/vms/web/start': (_, response) => reply(response, 409, wrongState),
    'GET /v1/tokens': (_, response) =>
      reply(response, 403, refusal('forbidden', 'Lacks admin', { wanted: 'admin' })),
    'GET /v1/cloudlet': (_, response) => reply(response, 500, refusal('internal', 'Unexpected failure')),
    'GET /v1/peers': (_, response) => response.end('<html>'),
  });
  const conflict = await shell.viper(['vm', 'start', 'web']);
  assert.deepEqual(conflict, {
    exitCode: 5,
    stdout: '',
    stderr: "viper: VM 'web' is running\n  allowed now: stop\n",
  });
  const ends: [args: string[], exitCode: number, stderr: RegExp][] = [
    [['token', 'list'], 3, /viper token create --name NAME --scope admin/],
    [['vm', 'show', 'web'], 4, /^viper: There is nothing at \/v1\/vms\/web\n$/],
    [['status'], 1, /request: req-1/],
    [['peer', 'list'], 1, /Does the URL lead to a Viper daemon\?/],
    [['status', '--url', 'http://127.0.0.1:9'], 6, /getCloudlet could not reach http:\/\/127.0.0.1:9/],
    [['status', '--url', 'edge1'], 2, /'edge1' is not the URL of a daemon/],
  ];
  for (const [args, exitCode, stderr] of ends) {
    const end = await shell.viper(args);
    assert.equal(end.exitCode, exitCode, args.join(' '));
    assert.match(end.stderr, stderr);
    assert.equal(end.stdout, '');
  }
});

test('an image is imported with its size and told when done', async () => {
  const image = {
    digest,
    aliases: ['tiny'],
    format: 'raw',
    fileBytes: 3e6,
    virtualBytes: 3e6,
    createdAt,
    index: { state: 'waiting' },
  };
  await using shell = await setUp({ 'POST /v1/images': (_, response) => reply(response, 201, image) });
  const file = join(shell.directory, 'tiny.raw');
  writeFileSync(file, Buffer.alloc(3e6, 'x'));
  const end = await shell.viper(['image', 'import', file, '--alias', 'tiny', '--json']);
  assert.deepEqual(JSON.parse(end.stdout), image);
  assert.equal(end.stderr, 'import tiny.raw: sending\nimport tiny.raw: verifying\n');
  assert.equal(shell.requests[0]?.path, '/v1/images?alias=tiny');
  assert.equal(shell.requests[0]?.headers['content-length'], '3000000');
  assert.equal(shell.requests[0]?.body.length, 3e6);
});

test('an import that is refused while it is sent tells the refusal and no more', async () => {
  const answer: Answer = (_, response) =>
    reply(response, 507, refusal('insufficient_space', 'No room for the image'));
  await using daemon = await fakeDaemon(answer, undefined, { hasty: true });
  using shell = fakeShell({ VIPER_URL: daemon.url });
  const file = join(shell.directory, 'large.raw');
  writeFileSync(file, '');
  truncateSync(file, 512 * 1024 ** 2);
  const end = await shell.viper(['image', 'import', file, '--quiet']);
  assert.deepEqual(end, { exitCode: 8, stdout: '', stderr: 'viper: No room for the image\n' });
});

test('exec prints what the program printed and ends with its exit code', async () => {
  const answer = { exitCode: 3, stdout: 'out', stderr: 'err', truncated: false };
  await using shell = await setUp({
    'POST /v1/vms/web/guest/exec': (_, response) => reply(response, 200, answer),
  });
  const end = await shell.viper(['vm', 'exec', 'web', '--input', '-', '--', 'sh', '-c', 'x --json'], {
    input: 'in',
  });
  assert.deepEqual(end, { exitCode: 3, stdout: 'out', stderr: 'err' });
  assert.deepEqual(JSON.parse(shell.requests[0]?.body ?? ''), {
    argv: ['sh', '-c', 'x --json'],
    input: 'in',
  });
});

test('events are lines; Ctrl-C ends them', async () => {
  const event = {
    id: 7,
    at: '2026-01-01T10:00:00.000Z',
    kind: 'vm.started',
    vmId: 'id1',
    data: { name: 'web' },
  };
  await using shell = await setUp({
    'GET /v1/events': (_, response) => {
      response.writeHead(200, { 'content-type': 'text/event-stream' });
      response.write(`id: 7\nevent: vm.started\ndata: ${JSON.stringify(event)}\n\n`);
    },
  });
  const onOutput = (stdout: string, _: string, child: ChildProcess) => {
    if (stdout.endsWith('}\n')) child.kill('SIGINT');
  };
  const people = await shell.viper(['events', '--after', '0'], { onOutput });
  assert.equal(people.stdout, '2026-01-01 10:00:00 7 vm.started id1 {"name":"web"}\n');
  assert.equal(people.exitCode, 130);
  assert.equal(people.stderr, '');
  assert.equal(shell.requests[0]?.path, '/v1/events?after=0');
  const programs = await shell.viper(['events', '--json'], { onOutput });
  assert.deepEqual(JSON.parse(programs.stdout), event);
});

test('a new token is alone on stdout', async () => {
  const created = { token: { id: 'id1', name: 'ci', scopes: ['read'] }, secret: 'viper_x' };
  await using shell = await setUp({ 'POST /v1/tokens': (_, response) => reply(response, 201, created) });
  const end = await shell.viper(['token', 'create', '--name', 'ci', '--scope', 'read', '--expires', '30d']);
  assert.deepEqual(end, { exitCode: 0, stdout: 'viper_x\n', stderr: 'The token is shown this once:\n' });
  assert.deepEqual(JSON.parse(shell.requests[0]?.body ?? ''), {
    name: 'ci',
    scopes: ['read'],
    expiresInS: 2_592_000,
  });
});
