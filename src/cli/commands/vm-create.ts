/** `viper vm create`, and the options of hardware that `viper snapshot create` takes too. */
import { type Command, Option } from 'commander';
import { type Continuity, continuities } from '../../model/vm.ts';
import type { CreateVm, Hardware } from '../../sdk/client.ts';
import { UsageError } from '../failures.ts';
import { addLongWorkOptions, finish, type LongWorkOptions } from '../progress.ts';
import { addCommand, type Session, withSession } from '../session.ts';
import { collect, parseCount, parseSize, readText } from '../values.ts';

export interface HardwareOptions {
  type?: string;
  cpus?: number;
  memory?: number;
  disk?: number;
  net?: string[];
}

export const addHardwareOptions = (command: Command): Command =>
  command
    .option('--type <type>', 'instance type; see `viper instance-types`')
    .option('--cpus <number>', 'vCPUs', parseCount)
    .option('--memory <size>', 'memory, such as 512M', parseSize)
    .option('--disk <size>', 'size of the disk, such as 4G', parseSize)
    .option('--net <network>', 'network to join; once for each interface', collect);

/** What the options say beyond the instance type. */
export function hardwareOf({ cpus, memory, disk, net }: HardwareOptions): Hardware | undefined {
  const hardware: Hardware = {
    ...(cpus === undefined ? {} : { cpu: { count: cpus } }),
    ...(memory === undefined ? {} : { memoryBytes: memory }),
    ...(disk === undefined ? {} : { diskBytes: disk }),
    ...(net === undefined ? {} : { nets: net.map((network) => ({ network })) }),
  };
  return Object.keys(hardware).length > 0 ? hardware : undefined;
}

interface CreateOptions extends HardwareOptions, LongWorkOptions {
  image?: string;
  snapshot?: string;
  storage?: string;
  sshKey?: string[];
  userData?: string;
  start: boolean;
  continuity?: Continuity;
  tenant?: string;
}

export function addVmCreateCommand(vm: Command): void {
  const command = addCommand(
    vm,
    'create <name>',
    'create a VM from an image or a golden snapshot, and start it',
    'viper vm create web --image debian-12 --memory 512M --ssh-key ~/.ssh/id_ed25519.pub',
  )
    .option('--image <image>', 'alias or digest of the image')
    .option('--snapshot <snapshot>', 'golden snapshot to start from, instead of an image');
  addHardwareOptions(command)
    .option('--storage <storage>', 'shared storage for the disk; see `viper status`')
    .option('--ssh-key <file>', 'public keys that may log in; may be repeated', collect)
    .option('--user-data <file>', 'raw cloud-init user data')
    .addOption(
      new Option(
        '--continuity <way>',
        "how its clients' connections outlive a move (mptcp with two interfaces in one network, else stretch)",
      ).choices(continuities),
    )
    .option('--tenant <name>', 'for whom it runs: VMs of one tenant send what they have in common once')
    .option('--no-start', 'leave it stopped');
  addLongWorkOptions(command).action(withSession(create));
}

async function create(session: Session, name: string, options: CreateOptions): Promise<void> {
  const { image, snapshot, type, storage } = options;
  if ((image === undefined) === (snapshot === undefined)) {
    throw new UsageError(`Pass either --image or --snapshot, to say what VM '${name}' is made from`);
  }
  const hardware = hardwareOf(options);
  const seed = seedOf(options);
  const body: CreateVm = {
    name,
    ...(image === undefined ? {} : { image }),
    ...(snapshot === undefined ? {} : { snapshot }),
    ...(type === undefined ? {} : { instanceType: type }),
    ...(hardware ? { hardware } : {}),
    ...(storage === undefined ? {} : { storage }),
    ...(seed ? { seed } : {}),
    ...(options.start ? {} : { start: false }),
    ...(options.continuity ? { continuity: options.continuity } : {}),
    ...(options.tenant === undefined ? {} : { tenant: options.tenant }),
  };
  const operation = await session.viper.createVm({ body, signal: session.signal });
  const state = options.start ? 'created and runs' : 'created';
  await finish(
    session,
    operation,
    options,
    ({ subject }) => `VM ${name} is ${state} (${subject.vmId ?? '?'}).`,
  );
}

function seedOf({ sshKey, userData }: CreateOptions): CreateVm['seed'] {
  const sshKeys = sshKey?.flatMap((file) => keysOf(readText(file, '--ssh-key'), file));
  return sshKeys || userData !== undefined
    ? {
        ...(sshKeys ? { sshKeys } : {}),
        ...(userData === undefined ? {} : { userData: readText(userData, '--user-data') }),
      }
    : undefined;
}

function keysOf(text: string, file: string): string[] {
  if (text.includes('PRIVATE KEY'))
    throw new UsageError(`'${file}' is a private key; --ssh-key wants the .pub file`);
  const keys = text.split('\n').map((line) => line.trim());
  return keys.filter((line) => line !== '' && !line.startsWith('#'));
}
