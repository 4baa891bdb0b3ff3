import assert from 'node:assert/strict';
import { test } from 'node:test';
import { planGuard, planGuardRemoval } from './guard-plan.ts';

const owner = '11111111-0000-4000-8000-000000000000';
const tap = 'vipabcdef01n0';
const mac = '02:00:00:00:00:01';

test('all rules and sets are one transaction of nft, under names of this cloudlet', () => {
  const [program, rules, ...rest] = planGuard(owner, {
    taps: [
      { tap, mac, addresses: ['10.4.0.10', '10.5.0.10'] },
      { tap: 'vipabcdef01n1', mac: '02:00:00:00:00:02' },
    ],
    tunnelRemotes: ['192.0.2.2', '192.0.2.2'],
  });
  assert.deepEqual([program, rest], ['nft', []]);
  const lines = rules!.split('\n');
  assert.ok(
    lines.includes(
      `add element bridge viper_11111111 macs { "${tap}" . ${mac}, "vipabcdef01n1" . 02:00:00:00:00:02 }`,
    ),
  );
  // One that gets its address elsewhere is held to its MAC only.
  assert.ok(lines.includes(`add element bridge viper_11111111 addressed { "${tap}" }`));
  assert.ok(
    lines.includes(
      `add element bridge viper_11111111 addresses { "${tap}" . 10.4.0.10, "${tap}" . 10.5.0.10 }`,
    ),
  );
  assert.ok(lines.includes('add element inet viper_11111111 remotes { 192.0.2.2 }'));
  assert.ok(lines.every((line) => line.includes('viper_11111111')));
});

test('sets are emptied before they are filled, so that nobody keeps what was somebody else’s', () => {
  const [, rules] = planGuard(owner, { taps: [], tunnelRemotes: [] });
  for (const set of ['taps', 'macs', 'addressed', 'addresses'])
    assert.ok(rules!.includes(`flush set bridge viper_11111111 ${set}`), set);
  assert.doesNotMatch(rules!, /add element/);
  assert.deepEqual(planGuardRemoval(owner)[0], ['nft', 'delete', 'table', 'bridge', 'viper_11111111']);
});

test('what is no tap of ours, no MAC or no address never becomes part of a rule', () => {
  const good = { tap, mac, addresses: ['10.4.0.10'] };
  for (const bad of [{ tap: 'eth0' }, { mac: `${mac} } ; flush ruleset` }, { addresses: ['10.4.0.10 }'] }])
    assert.throws(() => planGuard(owner, { taps: [{ ...good, ...bad }], tunnelRemotes: [] }), {
      code: 'invalid_request',
    });
  assert.throws(() => planGuard(owner, { taps: [], tunnelRemotes: ['::1'] }), { code: 'invalid_request' });
});
