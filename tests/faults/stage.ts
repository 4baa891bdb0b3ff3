/**
 * Two real daemons, each behind a link that can be cut and on a disk that can be filled, and one guest that checks
 * its own memory and disk. A case strikes a migration of it; afterwards the stage says what became of the VM.
 */
import { execFileSync } from 'node:child_process';
import { openAsBlob } from 'node:fs';
import { chmod, copyFile, mkdir, rm, statfs, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { DatabaseSync } from 'node:sqlite';
import { setTimeout as sleep } from 'node:timers/promises';
import { stateFileName } from '../../src/daemon/store/database.ts';
import { type LabCloudlet, LabFleet } from '../../src/lab/fleet.ts';
import { guestImage } from '../../src/lab/guests.ts';
import { MiB } from '../../src/model/units.ts';
import { type Migration, type Operation, ViperError, type ViperEvent } from '../../src/sdk/client.ts';
import { checked, startCheckers } from '../integration/checking-guest.ts';
import { isOfSpareMonitor } from '../integration/migration-lab.ts';
import { type Case, type Fault, nameOf, stopsTheVm } from './cases.ts';
import { filesIn, qemusOf, tracesInQemu, vcpuTicks } from './outside.ts';

const vmName = 'one';
const tmpfsMiB = 512;
const holdMs = 2500;
const slowBps = 8_000_000;
const memoryBps = 60_000_000;
const restTimeoutMs = 150_000;
const agentTimeoutMs = 120_000;
/** After this long without an answer the operator is told. */
const attentionTimeoutMs = 45_000;

export interface Outcome {
  name: string;
  /** Where the VM is at the end, and how. */
  outcome: string;
  lost: boolean;
  /** Of a case that `stopsTheVm`: its memory is gone, its disk starts. */
  stopped: boolean;
  doubled: boolean;
  leftovers: string[];
  /** What the history of the migration says at its source, or at its destination if that has it alone. */
  told: string;
  /** The moment was not met, or the migration never came to rest. */
  problem?: string;
  seconds: number;
}

interface Struck {
  from: LabCloudlet;
  to: LabCloudlet;
  vmId: string;
  migrationId: string;
  operation: Operation;
}

export class Stage implements AsyncDisposable {
  readonly #fleet: LabFleet;
  readonly #north: LabCloudlet;
  readonly #south: LabCloudlet;
  readonly #faultFile: string;
  readonly #made: AsyncDisposableStack;
  readonly #cutMs: number;
  readonly #logs: string | undefined;
  /** The last event that was told before the case at work, by cloudlet. */
  readonly #eventsBefore = new Map<string, number>();

  private constructor(
    made: AsyncDisposableStack,
    {
      fleet,
      north,
      south,
      faultFile,
      cutMs,
      logs,
    }: {
      fleet: LabFleet;
      north: LabCloudlet;
      south: LabCloudlet;
      faultFile: string;
      cutMs: number;
      logs: string | undefined;
    },
  ) {
    this.#made = made;
    this.#fleet = fleet;
    this.#north = north;
    this.#south = south;
    this.#faultFile = faultFile;
    this.#cutMs = cutMs;
    this.#logs = logs;
  }

  /** `cutMs`: how long the long cut is. `logs`: where the daemons' logs of a case that goes wrong are put. */
  static async set({ cutMs = 30_000, logs }: { cutMs?: number; logs?: string } = {}): Promise<Stage> {
    await using making = new AsyncDisposableStack();
    const fleet = await LabFleet.create();
    making.defer(() => fleet[Symbol.asyncDispose]());
    const faultFile = path.join(fleet.root, 'fault');
    await writeFile(faultFile, '');
    const bin = path.join(fleet.root, 'bin');
    await mkdir(bin);
    await writeFile(path.join(bin, 'qemu-system-x86_64'), wrapper(fleet.root));
    await chmod(path.join(bin, 'qemu-system-x86_64'), 0o755);
    const add = async (name: string): Promise<LabCloudlet> => {
      const directory = path.join(fleet.root, name);
      await mkdir(directory, { mode: 0o700 });
      if (process.getuid?.() === 0) {
        execFileSync('mount', ['-t', 'tmpfs', '-o', `size=${tmpfsMiB}m,mode=700`, 'tmpfs', directory]);
        making.defer(async () => void execFileSync('umount', ['-l', directory]));
      }
      const env = { VIPER_FAULT: faultFile, PATH: `${bin}:${process.env.PATH}` };
      return fleet.add(name, { reserveBytes: 16 * MiB }, { env, proxied: true });
    };
    const north = await add('north');
    const south = await add('south');
    // What was mounted is let go of when no process holds it any more.
    making.defer(() => Promise.all([north.stop('SIGKILL'), south.stop('SIGKILL')]).then(() => {}));
    await north.viper.importImage({
      body: await openAsBlob(guestImage('tiny')),
      query: { alias: 'tiny' },
    });
    return new Stage(making.move(), { fleet, north, south, faultFile, cutMs, logs });
  }

  get canFillDisks(): boolean {
    return process.getuid?.() === 0;
  }

  get cloudlets(): LabCloudlet[] {
    return [this.#north, this.#south];
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#made.disposeAsync();
  }

  /** Runs one case from a VM that runs to a VM that was verified, or done away with. */
  async run(one: Case): Promise<Outcome> {
    const began = performance.now();
    const outcome: Outcome = {
      name: nameOf(one),
      outcome: '',
      lost: false,
      stopped: false,
      doubled: false,
      leftovers: [],
      told: '',
      seconds: 0,
    };
    const watch = new AbortController();
    let watching: Promise<void> | undefined;
    try {
      const from = await this.#requireVm();
      const to = this.#other(from);
      await this.#noteEventsBefore();
      const { id: vmId } = await from.viper.getVm({ params: { vm: vmName } });
      const filesBefore = await filesIn(this.#vmDirectory(from, vmId));
      watching = this.#watchForDoubles(vmId, watch.signal, () => {
        outcome.doubled = true;
      });
      const struck = await this.#strike(one, from, to, vmId);
      const told = await this.#settle(one.fault, struck);
      await this.#judge(outcome, one, struck, told, filesBefore);
    } catch (error) {
      outcome.problem = error instanceof Error ? error.message : String(error);
      await this.#heal();
    } finally {
      watch.abort();
      await watching;
    }
    const isBad = outcome.problem || outcome.lost || outcome.doubled || outcome.leftovers.length > 0;
    if (isBad) await this.#keepLogs(outcome.name);
    if (outcome.problem || outcome.lost || outcome.doubled) await this.#startOver();
    outcome.seconds = Math.round((performance.now() - began) / 1000);
    return outcome;
  }

  async #keepLogs(name: string): Promise<void> {
    if (this.#logs === undefined) return;
    const directory = path.join(this.#logs, name.replaceAll(/\W+/g, '-'));
    await mkdir(directory, { recursive: true });
    for (const each of this.cloudlets)
      await copyFile(path.join(each.directory, 'daemon.log'), path.join(directory, `${each.name}.log`));
  }

  // --- the fault

  /** Begins a migration, waits for the moment and strikes. */
  async #strike({ moment, fault }: Case, from: LabCloudlet, to: LabCloudlet, vmId: string): Promise<Struck> {
    const { role, state, phase, mode, engine = 'direct', by } = moment;
    const refuses = fault === 'destination refuses the state';
    const isHeld = phase === undefined && !refuses;
    await writeFile(this.#faultFile, isHeld ? `${role} ${state} ${holdMs}` : '');
    await writeFile(path.join(this.#fleet.root, 'refuse'), refuses ? 'yes' : 'no');
    // What goes condensed is little: at the usual rate its memory would be gone before it is struck.
    const isSlow = phase === 'disk' || by !== undefined || (phase === 'memory' && engine === 'condensed');
    const bandwidthBps = isSlow ? slowBps : memoryBps;
    const operation = await from.viper.migrateVm({
      params: { vm: vmName },
      body: { to: to.name, mode, engine, limits: { bandwidthBps, downtimeMs: 2000 } },
    });
    const migrationId = operation.subject.migrationId!;
    const struck = { from, to, vmId, migrationId, operation };
    const at = role === 'source' ? from : to;
    if (by === 'cancel') {
      await this.#until('copying', () => this.#isAt(from, migrationId, 'copying'), 60_000);
      await from.viper.cancelOperation({ params: { operation: operation.id } });
    }
    await this.#until(
      `${role} ${state}`,
      async () => {
        const now = await this.#migration(at, migrationId);
        return now?.state === state && (phase === undefined || now.progress?.phase === phase);
      },
      90_000,
    );
    await this.#do(fault, struck);
    await writeFile(this.#faultFile, '');
    return struck;
  }

  async #do(fault: Fault, { from, to, vmId }: Struck): Promise<void> {
    switch (fault) {
      case 'kill source daemon':
        await from.stop('SIGKILL');
        await writeFile(this.#faultFile, '');
        return from.start();
      case 'kill destination daemon':
        await to.stop('SIGKILL');
        await writeFile(this.#faultFile, '');
        return to.start();
      case 'kill source QEMU':
        return this.#killQemus(from, vmId);
      case 'kill destination QEMU':
        return this.#killQemus(to, vmId);
      case 'cut 1 s':
        return this.#cut(1000);
      case 'cut 30 s':
        return this.#cut(this.#cutMs);
      case 'cut for good':
        for (const { link } of this.cloudlets) link!.cut();
        return;
      case 'destination disk full':
        return this.#fill(to);
      case 'destination refuses the state':
        return;
    }
  }

  async #cut(ms: number): Promise<void> {
    for (const { link } of this.cloudlets) link!.cut();
    await sleep(ms);
    for (const { link } of this.cloudlets) link!.restore({ forget: ms > 10_000 });
  }

  async #killQemus(at: LabCloudlet, vmId: string): Promise<void> {
    for (const pid of await qemusOf(vmId, at.directory)) process.kill(pid, 'SIGKILL');
  }

  async #fill({ directory }: LabCloudlet): Promise<void> {
    const { bavail, bsize } = await statfs(directory);
    execFileSync('fallocate', ['-l', String(Math.max(1, bavail * bsize)), path.join(directory, 'filler')]);
  }

  async #heal(): Promise<void> {
    await writeFile(this.#faultFile, '');
    await writeFile(path.join(this.#fleet.root, 'refuse'), 'no');
    for (const { link, directory } of this.cloudlets) {
      if (link?.isCut) link.restore({ forget: true });
      await rm(path.join(directory, 'filler'), { force: true });
    }
  }

  // --- afterwards

  /** Until nothing moves any more. Gives what the operator had to do for that. */
  async #settle(fault: Fault, struck: Struck): Promise<string> {
    let told = '';
    const { from, migrationId } = struck;
    if (fault === 'cut for good') told = await this.#liveWithTheCut(struck);
    if (fault === 'destination disk full') {
      // Time enough to meet it, whatever comes of that.
      await sleep(4000);
      await this.#heal();
    }
    // Its slowness has served its end.
    await from.viper
      .limitMigration({ params: { migration: migrationId }, body: { downtimeMs: 2000, autoConverge: false } })
      .catch(() => {});
    await this.#until('rest', () => this.#isAtRest(struck), restTimeoutMs);
    return told;
  }

  /** The VM runs at one side, or the operator is told and settles it. */
  async #liveWithTheCut(struck: Struck): Promise<string> {
    const { from, to, vmId, operation } = struck;
    const deadline = Date.now() + attentionTimeoutMs;
    for (;;) {
      const [here, there] = await this.#running(vmId, 1500);
      if (here || there) {
        // One that only copies goes on by itself, if it is not ended by hand.
        if (here) await from.viper.cancelOperation({ params: { operation: operation.id } }).catch(() => {});
        await this.#heal();
        return '';
      }
      const where = await this.#attention(struck);
      const isServed = await this.#isAt(to, struck.migrationId, 'arrived');
      if (where && isServed) {
        await this.#heal();
        return ' (operator told)';
      }
      if (where) {
        const reason = 'the link is gone';
        await where.viper.claimVm({ params: { vm: vmId }, body: { reason } });
        const isAudited = await this.#hasEvent(
          where,
          ({ kind, vmId: of, data }) => kind === 'vm.claimed' && of === vmId && data.reason === reason,
        );
        if (!isAudited) throw new Error('The claim is in no event');
        await this.#until(
          'the claimed VM to run',
          async () => (await this.#running(vmId, 1500)).some(Boolean),
          60_000,
        );
        await this.#heal();
        return ` (operator told at the ${where === to ? 'destination' : 'source'}, claimed)`;
      }
      if (Date.now() > deadline) throw new Error('The VM stands still at both sides, and nobody is told');
    }
  }

  /** Where the operator was told of this migration. */
  async #attention({ from, to, vmId, migrationId }: Struck): Promise<LabCloudlet | undefined> {
    for (const each of [from, to]) {
      const isTold = await this.#hasEvent(
        each,
        ({ kind, vmId: of, data }) =>
          kind === 'migration.attention' && of === vmId && data.migrationId === migrationId,
      );
      if (isTold) return each;
    }
    return undefined;
  }

  /** Of this case: what was told before it began is left out. */
  async #hasEvent({ name, viper }: LabCloudlet, isIt: (event: ViperEvent) => boolean): Promise<boolean> {
    const after = this.#eventsBefore.get(name) ?? 0;
    return (await this.#events(viper, after)).some(isIt);
  }

  async #noteEventsBefore(): Promise<void> {
    for (const { name, viper } of this.cloudlets) {
      const known = this.#eventsBefore.get(name) ?? 0;
      const last = (await this.#events(viper, known)).at(-1);
      if (last) this.#eventsBefore.set(name, last.id);
    }
  }

  async #events(viper: LabCloudlet['viper'], after: number): Promise<ViperEvent[]> {
    const events: ViperEvent[] = [];
    try {
      for await (const event of viper.events({ after, signal: AbortSignal.timeout(500) })) events.push(event);
    } catch {
      // Nothing more to be read.
    }
    return events;
  }

  async #judge(
    outcome: Outcome,
    one: Case,
    struck: Struck,
    told: string,
    filesBefore: string[],
  ): Promise<void> {
    const { from, vmId, migrationId } = struck;
    const holders: LabCloudlet[] = [];
    for (const each of this.cloudlets) if (await this.#vmAt(each, vmId)) holders.push(each);
    const pids = await Promise.all(this.cloudlets.map(({ directory }) => qemusOf(vmId, directory)));
    const processes = pids.flat().length;
    if (holders.length > 1 || processes > 1) outcome.doubled = true;
    const [holder] = holders;
    if (!holder) {
      outcome.lost = true;
      outcome.outcome = 'nowhere';
      return;
    }
    outcome.told = await this.#history(struck);
    // What is on record is what is: a migration that moved the VM says so, and no other does.
    const recorded = (await this.#migration(from, migrationId))?.state;
    if (recorded !== undefined && (recorded === 'moved') !== (holder !== from))
      outcome.leftovers.push(`a record of ${from.name} that says ${recorded}`);
    const vm = (await this.#vmAt(holder, vmId))!;
    const side = holder === from ? 'source' : 'destination';
    outcome.outcome = `${vm.state} at the ${side}${told}`;
    if (vm.state === 'running') {
      await checked(this.#guest(holder), { memory: 24, disk: 12 }).catch((error: Error) => {
        outcome.lost = true;
        outcome.outcome += `: ${error.message}`;
      });
    } else if (vm.state === 'crashed' && stopsTheVm(one)) {
      outcome.outcome = `stopped at the ${side}${(await this.#attention(struck)) ? ' (operator told)' : ''}`;
      await holder.viper.wait(await holder.viper.startVm({ params: { vm: vmId } }));
      outcome.stopped = (await this.#vmAt(holder, vmId))?.state === 'running';
      const isTold =
        outcome.outcome.endsWith('told)') && outcome.told.includes('can be started from its disk');
      outcome.lost = !outcome.stopped || !isTold;
    } else if (vm.state !== 'crashed' || !one.fault.endsWith('QEMU')) outcome.lost = true;

    // What is in QEMU can only be asked by one at a time.
    for (const each of this.cloudlets) {
      const files = await filesIn(this.#vmDirectory(each, vmId));
      if (each !== holder) {
        if (files.length > 0) outcome.leftovers.push(`files at ${each.name}: ${files.join(' ')}`);
        if ((await qemusOf(vmId, each.directory)).length > 0) outcome.leftovers.push(`QEMU at ${each.name}`);
      } else if (vm.state === 'running') {
        const more = files.filter((file) => !filesBefore.includes(file) && !isOfSpareMonitor(file));
        if (more.length > 0) outcome.leftovers.push(`files at ${each.name}: ${more.join(' ')}`);
        await each.stop();
        const traces = await tracesInQemu(this.#vmDirectory(each, vmId)).catch((error) => [String(error)]);
        outcome.leftovers.push(...traces.map((trace) => `${trace} at ${each.name}`));
        await each.start();
      } else if (processes > 0 && !outcome.stopped) outcome.leftovers.push(`QEMU of a ${vm.state} VM`);
      if ((await this.#migration(each, migrationId))?.over === false)
        outcome.leftovers.push(`an open migration at ${each.name}`);
    }
    if (vm.state !== 'running') await this.#deleteVm(holder);
  }

  /** What an operator reads of it afterwards. */
  async #history({ from, to, migrationId }: Struck): Promise<string> {
    const migration = (await this.#migration(from, migrationId)) ?? (await this.#migration(to, migrationId));
    if (!migration) return 'no migration on record';
    const { state, failure, attention } = migration;
    const said = [
      state,
      failure && `${failure.code}: ${failure.message}`,
      attention && `operator: ${attention}`,
    ];
    return said.filter(Boolean).join('; ');
  }

  async #isAtRest({ from, to, vmId, migrationId }: Struck): Promise<boolean> {
    for (const each of [from, to]) {
      const migration = await this.#migration(each, migrationId);
      if (migration && !migration.over) return false;
      const vm = await this.#vmAt(each, vmId);
      if (vm && (vm.operationId || !['running', 'paused', 'crashed', 'stopped'].includes(vm.state)))
        return false;
    }
    return true;
  }

  /** Whether its vCPUs use any time: at the source, at the destination. */
  async #running(vmId: string, ms: number): Promise<boolean[]> {
    const count = async ({ directory }: LabCloudlet) => {
      const [pid] = await qemusOf(vmId, directory);
      return pid === undefined ? { pid, ticks: 0 } : { pid, ticks: await vcpuTicks(pid) };
    };
    const before = await Promise.all(this.cloudlets.map(count));
    await sleep(ms);
    const after = await Promise.all(this.cloudlets.map(count));
    return after.map(
      ({ pid, ticks }, index) => pid === before[index]!.pid && ticks - before[index]!.ticks > 1,
    );
  }

  /** Both running in two looks one after the other: in one look alone it may have moved. */
  async #watchForDoubles(vmId: string, signal: AbortSignal, onDouble: () => void): Promise<void> {
    let wereBoth = false;
    while (!signal.aborted) {
      const areBoth = (await this.#running(vmId, 400)).every(Boolean);
      if (areBoth && wereBoth) onDouble();
      wereBoth = areBoth;
    }
  }

  // --- the VM

  /** Where the VM runs; it is made if there is none. */
  async #requireVm(): Promise<LabCloudlet> {
    for (const each of this.cloudlets) {
      const vm = await this.#vmAt(each, vmName);
      if (vm?.state === 'running') return each;
      if (vm) await this.#deleteVm(each);
    }
    const { viper } = this.#north;
    const hardware = { memoryBytes: 128 * MiB, diskBytes: 64 * MiB };
    await viper.wait(
      await viper.createVm({ body: { name: vmName, image: 'tiny', instanceType: 'tiny', hardware } }),
    );
    await this.#until(
      'the guest agent',
      () =>
        viper.getGuest({ params: { vm: vmName } }).then(
          () => true,
          () => false,
        ),
      180_000,
    );
    await startCheckers(this.#guest(this.#north));
    return this.#north;
  }

  async #deleteVm({ viper }: LabCloudlet): Promise<void> {
    await viper.wait(await viper.deleteVm({ params: { vm: vmName }, query: { force: true } }));
  }

  /** Whatever state it is in, nothing of it may be there for the next case. */
  async #startOver(): Promise<void> {
    await this.#heal();
    for (const each of this.cloudlets) {
      await each.stop('SIGKILL');
      for (const vmId of await filesIn(path.join(each.directory, 'vms'))) {
        await this.#killQemus(each, vmId);
        await rm(this.#vmDirectory(each, vmId), { recursive: true, force: true });
      }
      forgetVms(each.directory);
      await each.start();
    }
  }

  /** A guest on a busy machine may miss the agent's time, which says nothing of its memory: it is asked again. */
  #guest({ viper }: LabCloudlet): Parameters<typeof checked>[0] {
    const exec = async (body: { argv: string[]; timeoutMs?: number; input?: string }) => {
      for (const deadline = Date.now() + agentTimeoutMs; ; ) {
        try {
          return await viper.execInGuest({ params: { vm: vmName }, body });
        } catch (error) {
          const isLate = error instanceof ViperError && ['agent_unavailable', 'timeout'].includes(error.code);
          // What has an input starts something, perhaps twice.
          if (!isLate || body.input !== undefined || Date.now() > deadline) throw error;
          await sleep(500);
        }
      }
    };
    return { agent: { exec } } as unknown as Parameters<typeof checked>[0];
  }

  #other = (one: LabCloudlet): LabCloudlet => (one === this.#north ? this.#south : this.#north);
  #vmDirectory = ({ directory }: LabCloudlet, vmId: string): string => path.join(directory, 'vms', vmId);

  async #vmAt({ viper }: LabCloudlet, vm: string) {
    return viper.getVm({ params: { vm } }).catch(() => undefined);
  }

  async #migration({ viper }: LabCloudlet, migration: string): Promise<Migration | undefined> {
    return viper.getMigration({ params: { migration } }).catch(() => undefined);
  }

  async #isAt(at: LabCloudlet, migrationId: string, state: string): Promise<boolean> {
    return (await this.#migration(at, migrationId))?.state === state;
  }

  async #until(what: string, isSo: () => Promise<boolean>, timeoutMs: number): Promise<void> {
    for (const deadline = Date.now() + timeoutMs; ; ) {
      if (await isSo()) return;
      if (Date.now() > deadline) throw new Error(`Waited for ${what} for ${timeoutMs / 1000} s`);
      await sleep(30);
    }
  }
}

/** Only after a case that has failed: the records of its VM and migration go as well. */
function forgetVms(directory: string): void {
  const database = new DatabaseSync(path.join(directory, stateFileName));
  database.exec('DELETE FROM vms; DELETE FROM migrations');
  database.close();
}

/** A QEMU that, if it is told so, lacks a device that the VM has, and so cannot read the state of a VM that comes. */
const wrapper = (root: string): string => `#!/bin/bash
real=$(PATH=\${PATH#*:} command -v qemu-system-x86_64)
if [ "$(cat ${root}/refuse 2>/dev/null)" = yes ] && [[ " $* " = *" -incoming "* ]]; then
  args=()
  for argument; do
    if [[ $argument = *virtio-balloon* ]]; then unset 'args[-1]'; else args+=("$argument"); fi
  done
  exec -a "$real" "$real" "\${args[@]}"
fi
exec -a "$real" "$real" "$@"
`;
