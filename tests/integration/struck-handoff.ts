/**
 * Handoffs of a real guest over real MPTCP that are struck in the middle: what strikes, as a list, and what must be so
 * afterwards, whatever struck. One connection is carried through all of them.
 */
import assert from 'node:assert/strict';
import { setTimeout as sleep } from 'node:timers/promises';
import type { LabCloudlet } from '../../src/lab/fleet.ts';
import type { Continuity } from '../../src/model/vm.ts';
import type { Operation } from '../../src/sdk/node.ts';
import { EventRecorder, patienceMs, sh, until } from './lab-vm.ts';
import { flows, type Program, type WalkingGuest } from './walking-guest.ts';

/** The phone is in the LAN of `to`, the VM on its way there from `from`. */
export interface Stage {
  guest: WalkingGuest;
  from: LabCloudlet;
  to: LabCloudlet;
}

export interface Strike {
  what: string;
  /** Before it is asked for, while connections come to the next address, or (if missing) with memory on its way. */
  when?: 'before' | 'joining';
  strike: (stage: Stage) => Promise<void>;
  /** How the connection was to go on; `mptcp` if missing. */
  continuity?: Continuity;
  /** The phone ends at the cloudlet that the VM leaves. */
  returns?: true;
  /** The VM may have stayed where it was, and is moved again then. */
  mayStay?: true;
}

/** So slow that the memory is on its way for some seconds. */
const bandwidthBps = 40_000_000;
const cutMs = 8000;
const awayMs = 6000;
/** Longer than a guest waits for its peers. */
const goneMs = 35_000;

export const strikes: Strike[] = [
  {
    what: 'the daemon of the source is killed',
    mayStay: true,
    strike: async ({ from }) => {
      await from.stop('SIGKILL');
      await from.start();
    },
  },
  {
    what: 'the daemon of the destination is killed',
    mayStay: true,
    strike: async ({ to }) => {
      await to.stop('SIGKILL');
      await to.start();
    },
  },
  {
    what: 'the WAN is cut for 8 s',
    strike: async ({ guest }) => {
      await guest.lab.link('c1', 'c2', { isCut: true });
      await sleep(cutMs);
      await guest.lab.link('c1', 'c2', { isCut: false });
    },
  },
  {
    what: 'the WAN is cut for 8 s while connections come to the next address',
    when: 'joining',
    mayStay: true,
    strike: async ({ guest }) => {
      await guest.lab.link('c1', 'c2', { isCut: true });
      await sleep(cutMs);
      await guest.lab.link('c1', 'c2', { isCut: false });
    },
  },
  {
    what: 'the device disappears and comes back',
    strike: async ({ guest, to }) => {
      await guest.lab.move('phone', { to: to.name, gapMs: awayMs });
    },
  },
  {
    what: 'the device goes back to the LAN where it was',
    returns: true,
    strike: async ({ guest, from }) => {
      await guest.walk(from);
    },
  },
  {
    what: 'the device is away when the VM sets out, and joins no address until it is there',
    when: 'before',
    continuity: 'stretch',
    strike: async ({ guest, to }) => {
      await guest.lab.move('phone', { to: to.name, gapMs: goneMs });
    },
  },
];

/** The last, for nobody can wake the agent from outside: the guest itself does, much later. */
export const withoutAgent: Strike = {
  what: 'the guest agent is silent',
  when: 'before',
  continuity: 'stretch',
  strike: async ({ from }) => {
    const script = 'sleep 0.5; systemctl stop qemu-guest-agent; sleep 60; systemctl start qemu-guest-agent';
    // A unit of its own: what the agent starts ends with it.
    await sh(from.viper, 'web', `systemd-run --no-block sh -c '${script}'`);
  },
};

/** Strikes a handoff to where the VM is not. Afterwards phone and VM are at one cloudlet, and the connection goes on. */
export async function strikeHandoff(guest: WalkingGuest, one: Program, about: Strike): Promise<void> {
  const from = await guest.holder();
  const to = from === guest.c1 ? guest.c2 : guest.c1;
  await guest.walk(to);
  await flows(one);
  const stage = { guest, from, to };
  await using here = new EventRecorder(from.viper);
  const early = about.when === 'before' ? about.strike(stage) : undefined;
  // The radio is down, the agent is asleep by then.
  if (early) await sleep(3000);
  const operation = await from.viper.migrateVm({ params: { vm: 'web' }, body: bodyOf(to) });
  if (about.when === 'joining') await about.strike(stage);
  else if (!early) {
    const { migrationId } = operation.subject;
    await until('memory on its way', async () => {
      const { progress } = await from.viper.getMigration({ params: { migration: migrationId! } });
      return progress?.phase === 'memory';
    });
    await about.strike(stage);
  }
  await early;
  const { moved, message } = await endOf(from, operation);
  assert.ok(moved || about.mayStay, `the VM did not move: ${message}`);
  await flows(one);
  const told = here.events.find(
    ({ kind, data }) => kind === 'vm.continuity' && data.migrationId === operation.subject.migrationId,
  );
  if (about.continuity) assert.equal(told?.data.continuity, about.continuity, JSON.stringify(told));
  await bringTogether(guest, about.returns ? from : to);
  await flows(one);
}

const bodyOf = (to: LabCloudlet) => ({
  to: to.name,
  engine: 'condensed' as const,
  mode: 'hybrid' as const,
  limits: { bandwidthBps },
});

/** A daemon that was killed tells by its history; so does one that was not. */
async function endOf(
  { viper }: LabCloudlet,
  { id, subject }: Operation,
): Promise<{ moved: boolean; message: string }> {
  await until(
    'the end of what was asked for',
    () => viper.getOperation({ params: { operation: id } }),
    ({ state }) => state !== 'running',
  );
  const found = await until(
    'the end of the migration',
    () =>
      viper.getMigration({ params: { migration: subject.migrationId! } }).catch((error) => {
        // It had not begun when its daemon was killed.
        if (error.code === 'not_found') return undefined;
        throw error;
      }),
    (each) => each === undefined || each.finishedAt !== undefined,
  );
  return { moved: found?.state === 'moved', message: found?.failure?.message ?? 'it has not begun' };
}

/** The VM follows the phone to that cloudlet, unless it is there, and is at home there; nothing is left of what was. */
async function bringTogether(guest: WalkingGuest, at: LabCloudlet): Promise<void> {
  const holder = await guest.holder();
  if (holder !== at) await move(holder, at);
  else {
    const { attachment } = await at.viper.getVm({ params: { vm: 'web' } });
    // Away from home, it goes home and comes again with an address of this LAN.
    if (attachment?.home) {
      const home = at === guest.c1 ? guest.c2 : guest.c1;
      await guest.walk(home);
      await move(at, home);
    }
  }
  await until(
    'the end of tunnels and bridges',
    async () => (await guest.madeAt('c1')).length + (await guest.madeAt('c2')).length === 0,
  );
}

async function move(from: LabCloudlet, to: LabCloudlet): Promise<void> {
  const { attachment } = await from.viper.getVm({ params: { vm: 'web' } });
  const continuity: Continuity = attachment?.home ? 'stretch' : 'mptcp';
  await using here = new EventRecorder(from.viper);
  const operation = await from.viper.migrateVm({ params: { vm: 'web' }, body: { to: to.name, continuity } });
  const { migrationId } = operation.subject;
  const told = await here.first(
    'the way of its connections',
    ({ kind, data }) => kind === 'vm.continuity' && data.migrationId === migrationId,
  );
  const isAsWanted = told.data.continuity === continuity;
  const connections = isAsWanted ? '' : await sh(from.viper, 'web', 'ss -tniOH');
  assert.ok(isAsWanted, `${JSON.stringify(told)}\n${connections}`);
  await from.viper.wait(operation, { timeoutMs: 2 * patienceMs });
}
