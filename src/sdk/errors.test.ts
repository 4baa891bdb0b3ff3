import assert from 'node:assert/strict';
import { test } from 'node:test';
import { errorFromReply, unreachable, ViperError } from './errors.ts';

test('a refusal of the API becomes an error with its code, details and request id', () => {
  const body = {
    error: {
      code: 'wrong_state',
      message: 'VM web is running',
      details: { allowed: ['stop'] },
      requestId: 'r7',
    },
  };
  const error = errorFromReply('startVm', 409, JSON.stringify(body));
  assert.ok(error instanceof ViperError);
  assert.equal(error.code, 'wrong_state');
  assert.equal(error.message, 'VM web is running');
  assert.deepEqual(error.details, { allowed: ['stop'] });
  assert.equal(error.status, 409);
  assert.equal(error.requestId, 'r7');
});

test('a failure that is not of the API is a bad reply which shows its text', () => {
  for (const text of ['<html>502 Bad Gateway</html>', '{}', '{"error":"no"}', '{"error":{"code":1}}', '']) {
    const error = errorFromReply('getVm', 502, text);
    assert.equal(error.code, 'bad_reply');
    assert.equal(error.status, 502);
    assert.ok(error.message.startsWith('getVm failed with HTTP status 502'), error.message);
    assert.ok(error.message.includes(text));
  }
});

test('a failed connection tells the action, the URL and what to do', () => {
  const refused = Object.assign(new Error('connect ECONNREFUSED'), { code: 'ECONNREFUSED' });
  const nested = new TypeError('fetch failed', {
    cause: new AggregateError([refused], 'all attempts failed'),
  });
  const error = unreachable('listVms', 'https://edge1:7443', nested);
  assert.equal(error.code, 'unreachable');
  assert.equal(error.status, 0);
  assert.equal(error.cause, nested);
  assert.equal(
    error.message,
    'listVms could not reach https://edge1:7443: the connection was refused. Is the daemon running there?',
  );
});

test('a failed connection without a known reason, as in a browser, still says what to check', () => {
  const error = unreachable('listVms', 'https://edge1:7443', new TypeError('Failed to fetch'));
  assert.match(
    error.message,
    /Failed to fetch\. Is the daemon running there, and is its certificate trusted\?$/,
  );
});
