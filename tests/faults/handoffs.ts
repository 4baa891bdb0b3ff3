/**
 * All that strikes handoffs, one after the other on one guest and one connection: `npm run test:handoffs`, as root. It
 * takes minutes.
 */
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { skip } from '../integration/lab-world.ts';
import { strikeHandoff, strikes, withoutAgent } from '../integration/struck-handoff.ts';
import { end, type Program, WalkingGuest } from '../integration/walking-guest.ts';

const options = { skip, timeout: 1_200_000 };

let guest: WalkingGuest;
let one: Program;

if (!skip) {
  before(async () => {
    guest = await WalkingGuest.make('k');
    one = await guest.stream('mptcp');
  }, options);
  after(() => guest?.[Symbol.asyncDispose]());
}

for (const about of [...strikes, withoutAgent])
  test(`${about.what}: the connection goes on`, options, () => strikeHandoff(guest, one, about));

test('nothing of it was lost or sent twice', options, async (context) => {
  const { brokenBy, verifiedBytes, longestGap } = await end(one);
  assert.equal(brokenBy, undefined);
  context.diagnostic(JSON.stringify({ verifiedBytes, longestGap }));
});
