import assert from 'node:assert/strict';
import { test } from 'node:test';
import { InTouch } from './in-touch.ts';

test('the peer is asked at once and now and then while it matters, and no failure of that matters', (context) => {
  context.mock.timers.enable({ apis: ['setInterval'] });
  let asked = 0;
  const inTouch = new InTouch(() => {
    asked += 1;
    return Promise.reject(new Error('away'));
  });
  inTouch.keep(true);
  inTouch.keep(true);
  assert.equal(asked, 1);
  context.mock.timers.tick(20_000);
  assert.equal(asked, 3);
  inTouch.keep(false);
  context.mock.timers.tick(60_000);
  assert.equal(asked, 3);
});
