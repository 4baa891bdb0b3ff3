import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { fakeDaemon, reply } from '../sdk/fake-daemon.ts';
import { fakeShell } from './fake-shell.ts';

const values = (stdout: string) =>
  stdout
    .split('\n')
    .filter((line) => line.includes('\t'))
    .map((line) => line.split('\t')[0]);

test('there is a script for each shell', async () => {
  using shell = fakeShell();
  for (const name of ['bash', 'zsh', 'fish']) {
    const { stdout, exitCode } = await shell.viper(['completion', name]);
    assert.equal(exitCode, 0);
    assert.match(stdout, /viper complete --/, name);
  }
  const { exitCode, stderr } = await shell.viper(['completion', 'tcsh']);
  assert.equal(exitCode, 2);
  assert.match(stderr, /Allowed choices are zsh, bash, fish/);
});

test('bash completes by its script, without the package bash-completion too', async () => {
  using shell = fakeShell();
  const { stdout } = await shell.viper(['completion', 'bash']);
  const answering = "viper() { printf 'stop\\tstop a VM\\nstart\\tstart a VM\\n:4\\n'; }";
  const pressed = 'COMP_WORDS=(viper vm sto) COMP_CWORD=2; __viper_complete 2>/dev/null; echo "$COMPREPLY"';
  const bash = spawnSync('bash', ['--norc', '-c', `${stdout}\n${answering}\n${pressed}`], {
    encoding: 'utf8',
  });
  assert.equal(bash.stdout, 'stop\n', bash.stderr);
});

test('commands, options and names from the daemon are completed', async () => {
  await using daemon = await fakeDaemon(({ path }, response) => {
    if (path.startsWith('/v1/vms'))
      reply(response, 200, { items: [{ name: 'web', state: 'running' }], next: null });
    else reply(response, 200, { items: [{ aliases: ['debian', 'stable'], digest: 'sha256:1' }], next: null });
  });
  using shell = fakeShell({ VIPER_URL: daemon.url });
  const complete = async (...words: string[]) =>
    values((await shell.viper(['complete', '--', ...words])).stdout);
  assert.deepEqual(await complete('sna'), ['snapshot']);
  assert.ok((await complete('vm', 'stop', 'web', '--')).includes('--grace'));
  assert.deepEqual(
    daemon.requests.filter(({ path }) => path.startsWith('/v1/images')),
    [],
  );
  assert.deepEqual(await complete('vm', 'stop', ''), ['web']);
  assert.deepEqual(await complete('vm', 'create', 'x', '--image', ''), ['debian', 'stable']);
});

test('files are completed, and a folder brings its entries', async () => {
  using shell = fakeShell();
  mkdirSync(join(shell.directory, 'images'));
  writeFileSync(join(shell.directory, 'images', 'tiny.qcow2'), '');
  const images = join(shell.directory, 'images');
  const { stdout } = await shell.viper(['complete', '--', 'image', 'import', images.slice(0, -2)]);
  assert.deepEqual(values(stdout), [`${images}/`, `${images}/tiny.qcow2`]);
});

test('a daemon that does not answer costs a moment and no error', async () => {
  await using daemon = await fakeDaemon(() => {});
  for (const url of [daemon.url, 'http://127.0.0.1:9', 'nonsense']) {
    using shell = fakeShell({ VIPER_URL: url });
    const began = Date.now();
    const { stdout, stderr, exitCode } = await shell.viper(['complete', '--', 'vm', 'stop', '']);
    assert.deepEqual({ stdout, stderr, exitCode }, { stdout: ':4\n', stderr: '', exitCode: 0 });
    assert.ok(Date.now() - began < 10_000);
  }
});
