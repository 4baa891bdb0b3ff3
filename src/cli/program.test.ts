import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { mkdirSync, symlinkSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import type { Command } from 'commander';
import { fakeDaemon, reply } from '../sdk/fake-daemon.ts';
import { addCompletionCommands } from './completion.ts';
import { fakeShell } from './fake-shell.ts';
import { createProgram } from './program.ts';

test('what cannot be understood is told with option, value and what was wanted', async () => {
  using shell = fakeShell();
  const ends: [args: string[], stderr: RegExp][] = [
    [
      ['vm', 'create', 'web', '--image', 'x', '--memory', '5Q'],
      /'--memory <size>' argument '5Q' is invalid. Wanted a size/,
    ],
    [['vm', 'stop', 'web', '--grace', '30'], /'--grace <time>' argument '30' is invalid. Wanted a time/],
    [
      ['token', 'create', '--name', 'a', '--scope', 'root'],
      /argument 'root' is invalid. Wanted one of admin, operate/,
    ],
    [['vm', 'create', 'web', '--url', 'http://x'], /Pass either --image or --snapshot/],
    [['vm', 'lst'], /unknown command 'lst'\n\(Did you mean list\?\)/],
    [['vm'], /Usage: viper vm/],
    [['vm', 'show', 'web', '--colour'], /unknown option '--colour'/],
    [['image', 'import', '/none', '--url', 'http://x'], /Cannot import '\/none'/],
    [['vm', 'list'], /No daemon is known: pass --url, set VIPER_URL, or make a context/],
  ];
  for (const [args, stderr] of ends) {
    const end = await shell.viper(args);
    assert.equal(end.exitCode, 2, args.join(' '));
    assert.match(end.stderr, stderr);
    assert.doesNotMatch(end.stderr, / at .*\.ts:/, 'no stack');
  }
});

test('contexts are added, used, listed without tokens, and removed', async () => {
  await using daemon = await fakeDaemon((_, response) => reply(response, 200, { items: [], next: null }));
  using shell = fakeShell();
  const add = ['context', 'add', 'edge1', '--url', daemon.url, '--token-file', '-'];
  assert.equal((await shell.viper(add, { input: 'top-secret\n' })).exitCode, 0);
  await shell.viper(['context', 'add', 'edge2', '--url', 'https://edge2:7443']);
  await shell.viper(['context', 'use', 'edge1']);
  const list = await shell.viper(['context', 'list']);
  assert.match(list.stdout, /^ +NAME +URL +TOKEN +CA\n\* +edge1 +http.* +yes +no\n +edge2 .* no +no\n$/);
  assert.doesNotMatch(list.stdout + (await shell.viper(['context', 'list', '--json'])).stdout, /top-secret/);
  await shell.viper(['vm', 'list']);
  assert.equal(daemon.requests[0]?.headers.authorization, 'Bearer top-secret');
  assert.equal((await shell.viper(['context', 'remove', 'edge1'])).exitCode, 0);
  assert.match(
    (await shell.viper(['context', 'use', 'edge1'])).stderr,
    /There is no context 'edge1'.*known: edge2/,
  );
});

test('every command has help with an example', () => {
  const shown: string[] = [];
  const check = (command: Command) => {
    for (const each of command.commands) check(each);
    // A word that only has commands below it.
    if (command.parent && command.commands.length > 0) return;
    let help = '';
    command.configureOutput({
      writeOut: (text) => {
        help += text;
      },
    });
    command.outputHelp();
    shown.push(command.name());
    assert.match(help, /\nExample:\n {2}\$ (viper|source <\(viper)/, command.name());
  };
  const program = createProgram('/none');
  addCompletionCommands(program);
  // What the shells call is for nobody to read.
  const hidden = program.commands.findIndex((each) => each.name() === 'complete');
  (program.commands as Command[]).splice(hidden, 1);
  check(program);
  assert.ok(shown.length > 40, String(shown.length));
});

test('the launcher starts through links, and tells what is missing', () => {
  const launcher = fileURLToPath(new URL('../../bin/viper', import.meta.url));
  using shell = fakeShell();
  symlinkSync(launcher, join(shell.directory, 'one'));
  symlinkSync('one', join(shell.directory, 'two'));
  const started = spawnSync(join(shell.directory, 'two'), ['--version'], { encoding: 'utf8' });
  assert.match(started.stdout, /^\d+\.\d+\.\d+\n$/);
  mkdirSync(join(shell.directory, 'package', 'bin'), { recursive: true });
  const copied = join(shell.directory, 'package', 'bin', 'viper');
  spawnSync('cp', [launcher, copied]);
  const missing = spawnSync(copied, ['--version'], { encoding: 'utf8' });
  assert.equal(missing.status, 1);
  assert.match(missing.stderr, /are not installed; run: cd .*package && npm ci\n$/);
});
