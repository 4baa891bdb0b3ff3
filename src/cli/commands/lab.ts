/**
 * `viper lab …`: cloudlets, WAN links and devices as network namespaces of this machine, to try things out on. These
 * commands act on the machine itself; what they make is a lab of real daemons, which become contexts.
 */
import { type Command, Option } from 'commander';
import type { Lab } from '../../lab/lab.ts';
import { runInPlace } from '../child.ts';
import { addContext, contextsFile, readContexts, writeContexts } from '../contexts.ts';
import { Interrupted, UsageError } from '../failures.ts';
import {
  addWireOptions,
  describeWire,
  parseRate,
  parseRtt,
  showStatus,
  type WireOptions,
  wireOf,
} from '../lab-links.ts';
import { createOutput, type Output, type OutputOptions } from '../output.ts';
import { withExample } from '../session.ts';
import { collect, parseCount } from '../values.ts';

interface LabCommandOptions extends OutputOptions {
  lab?: string;
}

interface UpOptions extends LabCommandOptions, WireOptions {
  cloudlets: number;
  topology: 'mesh' | 'star';
  device?: string[];
  radioRtt?: number;
  radioRate?: number;
  cellular?: true;
  cellularRtt?: number;
  cellularRate?: number;
  daemons: boolean;
}

interface LinkOptions extends LabCommandOptions, WireOptions {
  cut?: true;
  restore?: true;
}

export function addLabCommands(program: Command): void {
  const group = program
    .command('lab')
    .description('cloudlets, WAN links and devices on this machine, to try things out (root)')
    .helpGroup('The cloudlet on this machine:');
  const add = (usage: string, summary: string, example: string): Command =>
    withExample(group.command(usage).description(summary), example)
      .option('--lab <name>', 'which lab (lab if absent)')
      .option('--json', 'print the result as JSON')
      .option('-q, --quiet', 'no remarks');

  addWireOptions(
    add('up', 'make a lab and start its daemons; each becomes a context', 'viper lab up --rtt 20 --rate 350'),
  )
    .option('--cloudlets <number>', 'how many: c1, c2, ...', parseCount, 3)
    .addOption(
      new Option('--topology <topology>', 'WAN links between each two, or through c1')
        .choices(['mesh', 'star'])
        .default('mesh'),
    )
    .option('--device <name[@cloudlet]>', 'a device and where it starts; several times (phone@c1)', collect)
    .option('--radio-rtt <ms>', 'of the devices in their LAN (2)', parseRtt)
    .option('--radio-rate <rate>', 'of the devices in their LAN (100M)', parseRate)
    .option('--cellular', 'every device has a second path, which does not depend on where it is')
    .option('--cellular-rtt <ms>', 'of that path (60)', parseRtt)
    .option('--cellular-rate <rate>', 'of that path (20M)', parseRate)
    .option('--no-daemons', 'only the networks')
    .action(withOutput(up));

  add('down', 'take a lab down with all that runs in it; also what is left of one', 'viper lab down').action(
    withOutput(down),
  );

  add('status', 'what is in the lab, how its links are, where its devices are', 'viper lab status').action(
    withOutput(async (output, { lab: name }: LabCommandOptions) => {
      const status = await (await open(name)).status();
      output.show(status, () => showStatus(output, status));
    }),
  );

  add(
    'move <device>',
    'a device walks into the LAN of another cloudlet',
    'viper lab move phone --to c2 --gap 500',
  )
    .requiredOption('--to <cloudlet>', 'where it goes')
    .option('--gap <time>', 'out of any LAN on the way (ms, or with a unit)', parseRtt)
    .option('--no-address', 'it is left to the device to give itself an address there')
    .action(
      withOutput(
        async (
          output,
          device: string,
          { lab, to, gap = 0, address }: LabCommandOptions & { to: string; gap?: number; address: boolean },
        ) => {
          const place = await (await open(lab)).move(device, { to, gapMs: gap, assign: address });
          output.show(place, () => output.say(`${device} is at ${place.at} as ${place.address}.`));
        },
      ),
    );

  addWireOptions(
    add(
      'link <a> <b>',
      'change a link while it carries packets: of two cloudlets, or of a device and radio or cellular',
      'viper lab link c1 c2 --rtt 100 --rate 60 --loss 1',
    ),
  )
    .option('--cut', 'every packet is lost from now on')
    .option('--restore', 'and no more')
    .action(
      withOutput(async (output, a: string, b: string, { lab, cut, restore, ...wish }: LinkOptions) => {
        if (cut && restore) throw new UsageError('Pass either --cut or --restore');
        const change = { ...wireOf(wish), ...(cut || restore ? { isCut: cut ?? false } : {}) };
        const settings = await (await open(lab)).link(a, b, change);
        output.show(settings, () => output.say(`${a} ${b}: ${describeWire(settings)}.`));
      }),
    );

  add(
    'run <place> <argv...>',
    'run a program in the network of a device or cloudlet',
    'viper lab run phone -- ping 10.1.0.1',
  ).action(
    withOutput(async (_, place: string, argv: string[], { lab }: LabCommandOptions) => {
      const [program = '', ...args] = argv;
      const command = (await open(lab)).commandIn(place, [program, ...args]);
      process.exitCode = (await runInPlace(command)).exitCode;
    }),
  );
}

/** The lab's own code is loaded by these commands alone. */
const labRoom = () => import('../../lab/lab.ts');
const open = async (name?: string): Promise<Lab> => (await labRoom()).Lab.open(name);

async function up(output: Output, options: UpOptions): Promise<void> {
  const { Lab } = await labRoom();
  const cellular = options.cellular
    ? wireOf({ rtt: options.cellularRtt, rate: options.cellularRate })
    : undefined;
  const devices = (options.device ?? ['phone']).map((text) => {
    const [name = '', at] = text.split('@');
    return { name, ...(at === undefined ? {} : { at }), ...(cellular ? { cellular } : {}) };
  });
  const wish = {
    ...(options.lab === undefined ? {} : { name: options.lab }),
    cloudlets: Array.from({ length: options.cloudlets }, (_, index) => `c${index + 1}`),
    topology: options.topology,
    wan: wireOf(options),
    radio: wireOf({ rtt: options.radioRtt, rate: options.radioRate }),
    devices,
  };
  const lab = await untilInterrupted(async (signal) => {
    const made = await Lab.up(wish, { signal });
    if (options.daemons) await startDaemons(made, signal);
    await made.stay();
    return made;
  });
  const status = await lab.status();
  output.show(status, () => {
    showStatus(output, status);
    if (options.daemons)
      output.note(`Contexts: ${lab.layout.sites.map(({ name }) => contextOf(lab, name)).join(', ')}`);
  });
}

/** Ctrl-C ends the work, which takes back what it has made, and then this process. */
async function untilInterrupted<T>(work: (signal: AbortSignal) => Promise<T>): Promise<T> {
  const stop = new AbortController();
  const onInterrupt = () => stop.abort(new Interrupted());
  process.on('SIGINT', onInterrupt);
  try {
    return await work(stop.signal);
  } catch (error) {
    stop.signal.throwIfAborted();
    throw error;
  } finally {
    process.removeListener('SIGINT', onInterrupt);
  }
}

/** All or nothing: without its daemons the lab is taken down again. */
async function startDaemons(lab: Lab, signal: AbortSignal): Promise<void> {
  const { LabFleet } = await import('../../lab/fleet.ts');
  try {
    const fleet = await LabFleet.create(lab);
    const file = contextsFile();
    for (const { name } of lab.layout.sites) {
      signal.throwIfAborted();
      const { url, token, ca } = await fleet.add(name);
      addContext(file, contextOf(lab, name), { url, token, ca });
    }
    writeContexts(file, { ...readContexts(file), current: contextOf(lab, lab.layout.sites[0]!.name) });
    await fleet.leave();
  } catch (error) {
    await lab[Symbol.asyncDispose]();
    forgetContexts(lab);
    throw error;
  }
}

async function down(output: Output, { lab: name }: LabCommandOptions): Promise<void> {
  const { Lab } = await labRoom();
  const lab = await Lab.open(name).catch(() => undefined);
  const existed = await Lab.down(name);
  if (lab) forgetContexts(lab);
  output.show({ existed }, () => output.say(existed ? 'The lab is down.' : 'There was no lab.'));
}

function forgetContexts({ layout }: Lab): void {
  const file = contextsFile();
  const urls = layout.sites.map(({ url }) => url);
  const { current, contexts } = readContexts(file);
  const kept = Object.entries(contexts).filter(([, { url }]) => !urls.includes(url));
  if (kept.length === Object.keys(contexts).length) return;
  const isKept = kept.some(([name]) => name === current);
  writeContexts(file, { ...(isKept && current ? { current } : {}), contexts: Object.fromEntries(kept) });
}

const contextOf = ({ name }: Lab, cloudlet: string): string => `${name}-${cloudlet}`;

function withOutput<A extends unknown[]>(run: (output: Output, ...rest: A) => Promise<void>) {
  return async (...all: unknown[]): Promise<void> => {
    const options = all.at(-2) as OutputOptions;
    await run(createOutput(options), ...(all.slice(0, -1) as A));
  };
}
