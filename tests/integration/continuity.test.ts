/**
 * A VM follows its device from LAN to LAN and back, over real daemons, a real guest and the kernel's MPTCP, while one
 * connection carries a sequence whose every byte is checked; then the same with plain TCP, over a stretched LAN and by a
 * host route. What strikes in mid-handoff: `npm run test:handoffs`.
 */
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import type { LabCloudlet } from '../../src/lab/fleet.ts';
import type { Continuity } from '../../src/model/vm.ts';
import { booted, EventRecorder, patienceMs, sh, until } from './lab-vm.ts';
import { ping, skip } from './lab-world.ts';
import { end, flows, WalkingGuest } from './walking-guest.ts';

const options = { skip, timeout: 1_200_000 };

let guest: WalkingGuest;
let c1: LabCloudlet;
let c2: LabCloudlet;

if (!skip) {
  before(async () => {
    guest = await WalkingGuest.make('n');
    ({ c1, c2 } = guest);
  }, options);
  after(() => guest?.[Symbol.asyncDispose]());
}

/** The VM moves, its connections go on in the way that was asked for, and its guest has settled down. */
async function handOff(from: LabCloudlet, to: LabCloudlet, continuity: Continuity): Promise<void> {
  await using there = new EventRecorder(to.viper);
  await using here = new EventRecorder(from.viper);
  const body = { to: to.name, continuity, mode: 'precopy' as const };
  const operation = await from.viper.migrateVm({ params: { vm: 'web' }, body });
  const isOurs = ({ data }: { data: Record<string, unknown> }) =>
    data.migrationId === operation.subject.migrationId;
  const begun = await here.first(
    'the way of its connections',
    (event) => event.kind === 'vm.continuity' && isOurs(event),
  );
  const isAsWanted = begun.data.continuity === continuity;
  const connections = isAsWanted ? '' : await sh(from.viper, 'web', 'ss -tniO');
  assert.ok(isAsWanted, `${JSON.stringify(begun)}\n${connections}`);
  await from.viper.wait(operation, { timeoutMs: 2 * patienceMs });
  const arrived = await there.first('its address', (event) => event.kind === 'vm.address' && isOurs(event));
  assert.equal(arrived.data.unfinished, undefined, JSON.stringify(arrived));
}

test('an MPTCP connection goes on while device and VM walk there and back', options, async (context) => {
  const one = await guest.stream('mptcp');
  for (const [from, to] of [
    [c1, c2],
    [c2, c1],
  ] as const) {
    await guest.walk(to);
    await flows(one);
    await handOff(from, to, 'mptcp');
    await flows(one);
    assert.equal((await booted(to.viper, 'web')).hostname, 'web');
    const { attachment } = await to.viper.getVm({ params: { vm: 'web' } });
    assert.equal(attachment!.place.subnet, guest.lab.site(to.name).lan);
    await until(
      'the end of the tunnels',
      async () => (await guest.madeAt('c1')).length + (await guest.madeAt('c2')).length === 0,
    );
  }
  const { brokenBy, verifiedBytes, longestGap } = await end(one);
  assert.equal(brokenBy, undefined);
  context.diagnostic(JSON.stringify({ verifiedBytes, longestGap }));
});

async function outlives(continuity: 'stretch' | 'host-route'): Promise<void> {
  const address = await guest.addressAt(c1);
  const one = await guest.stream('tcp');
  await handOff(c1, c2, continuity);
  await flows(one);
  assert.equal(await guest.addressAt(c2), address);
  // From the LAN there the way leads straight to it.
  await guest.lab.move('phone', { to: 'c2' });
  const straight = await ping(guest.lab, 'phone', address, '-c', '5', '-i', '0.5');
  assert.ok(straight.received > 0, JSON.stringify(straight));
  await guest.lab.move('phone', { to: 'c1' });
  await flows(one);
  await handOff(c2, c1, continuity);
  await flows(one);
  assert.equal((await end(one)).brokenBy, undefined);
  assert.deepEqual([await guest.madeAt('c1'), await guest.madeAt('c2')], [[], []]);
}

test('plain TCP outlives the move of the VM there and back over a stretched LAN', options, () =>
  outlives('stretch'),
);

test('plain TCP outlives the move of the VM there and back by a host route', options, () =>
  outlives('host-route'),
);
