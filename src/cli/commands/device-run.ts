/** `viper device run`: on a Linux device, until Ctrl-C. It reports where the device is, and says where its VM is. */
import { type Command, Option } from 'commander';
import {
  attachmentOf,
  type CompanionEvent,
  DeviceCompanion,
  measureByHandshake,
  measureConnections,
  runProgram,
} from '../../device/index.ts';
import {
  type HandoverMode,
  handoverModes,
  MptcpDevice,
  monitorLines,
  mptcpMonitorCommand,
} from '../../network/index.ts';
import { connectNode } from '../../sdk/node.ts';
import { createOutput, type Output } from '../output.ts';
import { addCommand, type CommonOptions, optionsOf } from '../session.ts';
import { resolveTarget } from '../target.ts';

interface RunOptions extends CommonOptions {
  radio?: string;
  cellular?: string;
  handover: HandoverMode;
  mptcp: boolean;
}

export function addDeviceRunCommand(device: Command): void {
  addCommand(
    device,
    'run',
    'on the device itself: tell the cloudlets where it is, keep its connections, say where its VM is',
    'viper device run --url https://edge1:7443 --token-file phone.token --ca ca.crt --radio wlan0',
  )
    .option('--radio <device>', 'the network device that goes from LAN to LAN (the first one if absent)')
    .option('--cellular <device>', 'a network device that is always connected')
    .addOption(
      new Option('--handover <mode>', 'how MPTCP uses the two').choices([...handoverModes]).default('full'),
    )
    .option('--no-mptcp', 'leave the MPTCP endpoints of the device alone')
    .action(async (_: unknown, command: Command) => {
      const options = optionsOf(command) as RunOptions;
      const output = createOutput(options);
      const { url, token, ca } = resolveTarget(options);
      const stop = new AbortController();
      for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => stop.abort());
      const links = { radio: options.radio, cellular: options.cellular };
      using mptcp = options.mptcp ? mptcpOf(options) : undefined;
      const companion = new DeviceCompanion({
        url,
        connect: (each) => connectNode({ url: each, ...(token ? { token } : {}), ...(ca ? { ca } : {}) }),
        attachment: () => attachmentOf(links),
        measure: measureByHandshake,
        measureConnections,
        ...(mptcp ? { mptcp } : {}),
        onEvent: (event) => tell(output, event),
      });
      await companion.run(stop.signal);
    });
}

function mptcpOf({ handover, radio, cellular }: RunOptions): MptcpDevice {
  const address = cellular && attachmentOf({ radio: cellular }).radio?.address;
  return new MptcpDevice({
    run: runProgram,
    monitor: (signal) => monitorLines(mptcpMonitorCommand, signal),
    mode: handover,
    ...(cellular && address && cellular !== radio ? { cellular: { device: cellular, address } } : {}),
  });
}

function tell(output: Output, event: CompanionEvent): void {
  if (output.json) output.line(JSON.stringify({ at: new Date().toISOString(), ...event }));
  else if (event.kind === 'unreachable') output.note(`${event.url} does not answer: ${event.message}`);
  else if (event.kind !== 'reported') output.say(sentenceOf(event));
}

const joinedSentences = {
  yes: 'Connections go on from here.',
  no: 'No connection came over yet.',
  none: 'There are no connections.',
};

function sentenceOf(event: Exclude<CompanionEvent, { kind: 'reported' | 'unreachable' }>): string {
  if (event.kind === 'arrived') return `In a LAN with the address ${event.address}.`;
  if (event.kind === 'left') return 'In no LAN.';
  if (event.kind === 'joined') return joinedSentences[event.joined];
  return `Your VM is now at ${event.cloudlet} (${event.url}).`;
}
