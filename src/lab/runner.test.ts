import assert from 'node:assert/strict';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { execute, tell } from './runner.ts';

/** Answers as a wirefilter does: a greeting, and for each line a status, each with a prompt at its end. */
async function fakeFilter(answer: (line: string) => string) {
  const directory = await mkdtemp(path.join(tmpdir(), 'viper-filter-'));
  const socket = path.join(directory, 'filter');
  const lines: string[] = [];
  const server = createServer((connection) => {
    connection.write('\nVDE wirefilter V.2.3.2\n\nVDEwf$ ');
    connection
      .on('error', () => {})
      .on('data', (bytes) => {
        lines.push(String(bytes));
        connection.write(`${answer(String(bytes))}\n\nVDEwf$ `);
      });
  }).listen(socket);
  await once(server, 'listening');
  return {
    socket,
    lines,
    async [Symbol.asyncDispose]() {
      server.close();
      await rm(directory, { recursive: true });
    },
  };
}

test('lines are told one by one, each after the one before was accepted', async () => {
  await using filter = await fakeFilter(() => '1000 Success');
  await tell(filter.socket, ['delay 10', 'loss 1']);
  assert.deepEqual(filter.lines, ['delay 10\n', 'loss 1\n']);
});

test('a line that is not accepted is an error with line and answer, and ends it', async () => {
  await using filter = await fakeFilter(() => '1038 Function not implemented');
  await assert.rejects(tell(filter.socket, ['bogus', 'loss 1']), {
    code: 'unsupported',
    message: /'bogus' was answered by '1038 Function not implemented/,
  });
  assert.deepEqual(filter.lines, ['bogus\n']);
});

test('a filter that is not there is an error', async () => {
  await assert.rejects(tell('/nowhere/filter', ['loss 1']), { code: 'unsupported', message: /ENOENT/ });
});

test('a program that fails is an error with what it said', async () => {
  await assert.rejects(execute(['sh', '-c', 'echo no such wire >&2; exit 3']), {
    code: 'unsupported',
    message: /no such wire/,
  });
  assert.equal(await execute(['echo', 'yes']), 'yes\n');
});
