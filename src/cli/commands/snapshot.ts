/** `viper snapshot …`: golden snapshots. */
import type { Command } from 'commander';
import { formatBytes } from '../../model/units.ts';
import { formatAge, formatTime, shortDigest } from '../output.ts';
import { addLongWorkOptions, finish, type LongWorkOptions } from '../progress.ts';
import { addCommand, addGroup, type Session, withSession } from '../session.ts';
import { parseDuration } from '../values.ts';
import { explainIndex, formatIndex } from './image.ts';
import { listAll } from './lists.ts';
import { addHardwareOptions, type HardwareOptions, hardwareOf } from './vm-create.ts';

interface CreateOptions extends HardwareOptions, LongWorkOptions {
  image: string;
  readyTimeout?: number;
}

export function addSnapshotCommands(program: Command): void {
  const snapshot = addGroup(program, 'snapshot', 'golden snapshots: images just booted, with their RAM');

  const command = addCommand(
    snapshot,
    'create <name>',
    'boot an image once and keep its RAM and disk, so that VMs start from there',
    'viper snapshot create debian-ready --image debian-12 --memory 512M',
  ).requiredOption('--image <image>', 'alias or digest of the image');
  addHardwareOptions(command).option('--ready-timeout <time>', 'for the boot (3m if absent)', parseDuration);
  addLongWorkOptions(command).action(withSession(create));

  addCommand(snapshot, 'list', 'all golden snapshots, oldest first', 'viper snapshot list').action(
    withSession((session) =>
      listAll(
        session,
        session.viper.listSnapshots,
        ['NAME', 'IMAGE', 'MEMORY', 'FILES', 'INDEX', 'BOOT', 'AGE', 'ID'],
        (each) => [
          each.name,
          shortDigest(each.spec.disk.image),
          formatBytes(each.spec.memoryBytes),
          formatBytes(each.memoryFileBytes + each.diskFileBytes),
          formatIndex(each.index),
          `${(each.bootMs / 1000).toFixed(1)} s`,
          formatAge(each.createdAt),
          each.id,
        ],
        'There are no golden snapshots. Make one: viper snapshot create NAME --image IMAGE',
      ),
    ),
  );

  addCommand(
    snapshot,
    'show <snapshot>',
    'one golden snapshot, by name or id',
    'viper snapshot show debian-ready',
  ).action(
    withSession(async ({ viper, output, signal }, name: string) => {
      const found = await viper.getSnapshot({ params: { snapshot: name }, signal });
      const { spec } = found;
      output.show(found, () =>
        output.facts([
          ['Name', found.name],
          ['Id', found.id],
          ['Image', spec.disk.image],
          ['CPUs', `${spec.cpu.count} (${spec.cpu.model})`],
          ['Memory', `${formatBytes(spec.memoryBytes)}, ${formatBytes(found.memoryFileBytes)} kept`],
          ['Disk', `${formatBytes(spec.disk.sizeBytes)}, ${formatBytes(found.diskFileBytes)} kept`],
          ['Machine', spec.machine],
          ['Digest', found.digest ?? 'not known yet'],
          ['Index', explainIndex(found.index)],
          ['Boot', `${(found.bootMs / 1000).toFixed(1)} s`],
          ['Created', formatTime(found.createdAt)],
        ]),
      );
    }),
  );

  addLongWorkOptions(
    addCommand(
      snapshot,
      'push <snapshot>',
      'copy a golden snapshot to a peer, with its image: VMs start there from it, and travel there light',
      'viper snapshot push debian-ready --to edge2',
    ).requiredOption('--to <peer>', 'name or id of the peer'),
  ).action(withSession(push));

  addCommand(
    snapshot,
    'remove <snapshot>',
    'remove a golden snapshot; VMs that came from it stay',
    'viper snapshot remove debian-ready',
  ).action(
    withSession(async ({ viper, output, signal }, name: string) => {
      await viper.deleteSnapshot({ params: { snapshot: name }, signal });
      output.say(`Snapshot ${name} is removed.`);
    }),
  );
}

async function push(
  session: Session,
  name: string,
  options: LongWorkOptions & { to: string },
): Promise<void> {
  const { viper, signal } = session;
  const operation = await viper.pushSnapshot({
    params: { snapshot: name },
    body: { to: options.to },
    signal,
  });
  await finish(session, operation, options, () => `Snapshot ${name} is at ${options.to}.`);
}

async function create(session: Session, name: string, options: CreateOptions): Promise<void> {
  const hardware = hardwareOf(options);
  const operation = await session.viper.createSnapshot({
    body: {
      name,
      image: options.image,
      ...(options.type === undefined ? {} : { instanceType: options.type }),
      ...(hardware ? { hardware } : {}),
      ...(options.readyTimeout === undefined ? {} : { readyTimeoutMs: options.readyTimeout }),
    },
    signal: session.signal,
  });
  await finish(session, operation, options, () => `Snapshot ${name} is made.`);
}
