import assert from 'node:assert/strict';
import { test } from 'node:test';
import { AppError } from '../model/errors.ts';
import { CommandFailed, run } from './run.ts';

const { signal } = new AbortController();

test('output comes back; arguments reach the program as they are, without a shell', async () => {
  const { stdout, stderr } = await run('printf', ['%s|', '$HOME; `id`', "it's"], { signal });
  assert.equal(stdout, "$HOME; `id`|it's|");
  assert.equal(stderr, '');
});

test('only the given environment reaches the program', async () => {
  process.env.VIPER_TEST_SECRET = 'secret';
  const { stdout } = await run('env', [], { signal, env: { GIVEN: 'yes' } });
  delete process.env.VIPER_TEST_SECRET;
  assert.match(stdout, /GIVEN=yes/);
  assert.doesNotMatch(stdout, /secret/);
});

test('a failure tells the exit code and the tail of stderr', async () => {
  await assert.rejects(run('sh', ['-c', 'echo out; echo broken >&2; exit 3'], { signal }), (error) => {
    assert.ok(error instanceof CommandFailed);
    assert.equal(error.exitCode, 3);
    assert.equal(error.stdout, 'out\n');
    assert.match(error.message, /exit 3: broken$/);
    return true;
  });
});

test('a program that waits for input meets its end', async () => {
  assert.equal((await run('cat', [], { signal })).stdout, '');
});

test('a program that is too slow, or that nobody waits for any more, is killed', async () => {
  await assert.rejects(run('sleep', ['60'], { signal, timeoutMs: 20 }), { code: 'timeout' });
  const soon = AbortSignal.timeout(20);
  await assert.rejects(run('sleep', ['60'], { signal: soon }), { code: 'cancelled' });
  await assert.rejects(run('sleep', ['60'], { signal: AbortSignal.abort() }), { code: 'cancelled' });
  const reason = new AppError('interrupted', 'The daemon stops');
  await assert.rejects(run('sleep', ['60'], { signal: AbortSignal.abort(reason) }), { code: 'interrupted' });
});

test('a program that is not installed is named', async () => {
  await assert.rejects(run('viper-no-such-program', [], { signal }), {
    code: 'unsupported',
    details: { missing: 'viper-no-such-program' },
  });
});

test('more output than allowed is a failure', async () => {
  const options = { signal, maxOutputBytes: 1000 };
  await assert.rejects(run('head', ['-c', '2000', '/dev/zero'], options), /more output than allowed/);
});
