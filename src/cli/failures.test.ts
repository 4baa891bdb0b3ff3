import assert from 'node:assert/strict';
import { readFile } from 'node:fs/promises';
import { test } from 'node:test';
import { errorCodes } from '../model/errors.ts';
import { ViperError, type ViperErrorCode } from '../sdk/client.ts';
import { describeError, exitClasses, exitCodeOf, exitCodes, Interrupted, UsageError } from './failures.ts';

test('every error code has its exit code', () => {
  for (const code of [...errorCodes, 'unreachable', 'bad_reply'] as const) {
    assert.equal(exitCodeOf(new ViperError(code, 'x')), exitCodes[exitClasses[code]], code);
  }
  assert.equal(exitCodeOf(new ViperError('of_a_newer_daemon' as ViperErrorCode, 'x')), 1);
  assert.equal(exitCodeOf(new UsageError('x')), 2);
  assert.equal(exitCodeOf(new Interrupted()), 130);
  assert.equal(exitCodeOf(new TypeError('a bug')), 1);
});

test('docs/cli.md tells the same exit codes', async () => {
  const page = await readFile(new URL('../../docs/cli.md', import.meta.url), 'utf8');
  const rows = [...page.matchAll(/^\| (\d+) \|.*\|(.*)\|$/gm)];
  assert.deepEqual(
    rows.map(([, code]) => Number(code)),
    Object.values(exitCodes),
  );
  const told = rows.flatMap(([, code, codes = '']) =>
    [...codes.matchAll(/`(\w+)`/g)].map(([, name]) => [name, Number(code)] as const),
  );
  assert.deepEqual(
    Object.fromEntries(told),
    Object.fromEntries(Object.entries(exitClasses).map(([code, exitClass]) => [code, exitCodes[exitClass]])),
  );
});

test('an error shows the details that help', () => {
  const problems = [
    { field: 'body.memoryBytes', value: 5, wanted: 'a multiple of 1048576' },
    { field: 'body.name', wanted: 'this field' },
  ];
  assert.deepEqual(
    describeError(new ViperError('invalid_request', 'The request was refused', { details: { problems } })),
    [
      'viper: The request was refused',
      '  body.memoryBytes is 5, wanted a multiple of 1048576',
      '  body.name: wanted this field',
    ],
  );
  const one = new ViperError('invalid_request', 'Refused: body.name: wanted this field', {
    details: { problems: problems.slice(1) },
  });
  assert.deepEqual(describeError(one), ['viper: Refused: body.name: wanted this field']);
  const state = { state: 'running', allowed: ['stop', 'pause'] };
  assert.deepEqual(describeError(new ViperError('wrong_state', 'VM web is running', { details: state })), [
    'viper: VM web is running',
    '  allowed now: stop, pause',
  ]);
  const qemu = new ViperError('qemu_failed', 'QEMU died', {
    details: { output: 'one\ntwo\n' },
    operationId: 'op1',
  });
  assert.deepEqual(describeError(qemu), ['viper: QEMU died', '  | one', '  | two', '  operation: op1']);
  const inUse = new ViperError('in_use', 'Image is used', {
    details: { usedBy: [{ kind: 'vm', name: 'web' }, 'db', { vm: 5 }] },
  });
  assert.deepEqual(describeError(inUse), ['viper: Image is used', '  used by: vm web, db, {"vm":5}']);
});

test('details of another shape than expected are shown or left out, never a crash', () => {
  const odd = {
    problems: ['x', null, 3],
    allowed: 'start',
    usedBy: {},
    output: [1],
    operationId: 5,
    wanted: [],
  };
  assert.deepEqual(describeError(new ViperError('forbidden', 'no', { details: odd })), [
    'viper: no',
    '  x',
    '  null',
    '  3',
    '  | 1',
  ]);
  assert.deepEqual(describeError('thrown text'), ['viper: thrown text']);
});
