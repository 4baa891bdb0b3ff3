import assert from 'node:assert/strict';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { fakeShell, type Shell } from '../fake-shell.ts';

/** A shell whose CLI runs this text as the daemon's program. */
function shellWith(daemonText: string): Shell {
  const place = fakeShell();
  const daemonProgram = join(place.directory, 'daemon.mjs');
  const program = join(place.directory, 'main.mjs');
  writeFileSync(daemonProgram, daemonText);
  const runFile = new URL('../run.ts', import.meta.url).href;
  writeFileSync(
    program,
    `import { run } from '${runFile}';\nawait run(process.argv.slice(2), ${JSON.stringify(daemonProgram)});\n`,
  );
  const shell = fakeShell({ CA_FILE: join(place.directory, 'ca.pem') }, program);
  writeFileSync(join(place.directory, 'ca.pem'), 'PEM');
  return {
    ...shell,
    [Symbol.dispose]() {
      shell[Symbol.dispose]();
      place[Symbol.dispose]();
    },
  };
}

const making = `
  const { VIPER_JOIN_TOKEN, CA_FILE } = process.env;
  console.error(JSON.stringify({ args: process.argv.slice(2), VIPER_JOIN_TOKEN }));
  console.log(JSON.stringify({
    id: 'id1', name: 'edge1', url: 'https://edge1:7443', caFile: CA_FILE, fingerprint: 'ff', token: 'admin-token',
  }));`;

test('init makes a cloudlet and a context that is the current one', async () => {
  using shell = shellWith(making);
  const end = await shell.viper(['init', '--state', '/s', '--name', 'edge1', '--url', 'https://edge1:7443']);
  assert.equal(end.exitCode, 0, end.stderr);
  const said = JSON.parse(end.stderr.split('\n')[0] ?? '');
  assert.deepEqual(said.args, [
    'init',
    '--state',
    '/s',
    '--name',
    'edge1',
    '--url',
    'https://edge1:7443',
    '--json',
  ]);
  assert.match(end.stdout, /Admin token: +admin-token\n/);
  assert.match(end.stderr, /Start it: viper daemon --state \/s\n$/);
  const config = JSON.parse(readFileSync(join(shell.directory, 'config', 'config.json'), 'utf8'));
  assert.deepEqual(config, {
    current: 'edge1',
    contexts: { edge1: { url: 'https://edge1:7443', ca: 'PEM', token: 'admin-token' } },
  });
});

test('join keeps its token out of the arguments of the child', async () => {
  using shell = shellWith(making);
  const args = ['join', 'https://edge0:7443', '--token-file', '-', '--name', 'edge1', '--json'];
  const end = await shell.viper(args, { input: 'join-secret\n' });
  assert.deepEqual(JSON.parse(end.stderr), {
    args: ['join', 'https://edge0:7443', '--name', 'edge1', '--json'],
    VIPER_JOIN_TOKEN: 'join-secret',
  });
  assert.equal(JSON.parse(end.stdout).id, 'id1');
});

test('a cloudlet that could not be made leaves no context, and the exit code of the program', async () => {
  using shell = shellWith("console.error('viper: no'); process.exit(5);");
  const end = await shell.viper(['init', '--state', '/s', '--name', 'edge1']);
  assert.deepEqual(end, { exitCode: 5, stdout: '', stderr: 'viper: no\n' });
  assert.match((await shell.viper(['context', 'list'])).stderr, /There are no contexts/);
});

test('the daemon gets the signals that are sent to the CLI, and its end is passed on', async () => {
  using shell = shellWith(`
    process.once('SIGTERM', () => process.exit(12));
    console.error('serving', ...process.argv.slice(2));
    setTimeout(() => process.exit(1), 20_000);`);
  const end = await shell.viper(['daemon', '--state', '/s'], {
    onOutput: (_, text, child) => text.includes('serving') && child.kill('SIGTERM'),
  });
  assert.deepEqual(end, { exitCode: 12, stdout: '', stderr: 'serving serve --state /s\n' });
  using killed = shellWith("process.kill(process.pid, 'SIGKILL');");
  assert.equal((await killed.viper(['daemon'])).exitCode, 137);
});
