/**
 * A link between two namespaces with a round-trip time, a rate and a loss. Two ways to the same link: `netem`, where
 * the kernel has it, on a pair of virtual cables; or `vde`: two taps, each at a switch of vde2, and between the
 * switches a `wirefilter` that holds packets back and loses some, while the kernel's tbf holds the rate.
 */
import path from 'node:path';
import type { Command } from '../network/index.ts';
import type { Wire, WireEnd } from './layout.ts';
import { inNamespace } from './namespaces.ts';
import type { WireSettings } from './spec.ts';

export type Emulator = 'netem' | 'vde';

/** What to run, and then what to tell the wirefilter at a socket. */
export interface WireSteps {
  commands: Command[];
  tell?: { socket: string; lines: string[] };
}

export interface WirePlace {
  emulator: Emulator;
  /** Where the processes of the emulation live. */
  core: string;
  /** For their sockets; its path is short, as a socket's has a bound. */
  directory: string;
}

/** `netem` is there if this works in a new namespace; it touches nothing else. */
export const netemProbe: Command = ['tc', 'qdisc', 'add', 'dev', 'lo', 'root', 'netem', 'delay', '1ms'];

/** Makes the link with both ends in their namespaces, up and without addresses. */
export function planWire(wire: Wire, { emulator, core, directory }: WirePlace): Command[] {
  const [a, b] = wire.ends;
  const ups = wire.ends.map((end) => at(end, ['ip', 'link', 'set', 'dev', end.device, 'up']));
  if (emulator === 'netem')
    return [
      [
        ...['ip', 'link', 'add', 'name', a.device, 'netns', a.namespace, 'type', 'veth'],
        ...['peer', 'name', b.device, 'netns', b.namespace],
      ] as unknown as Command,
      ...ups,
      ...planShape(wire.ends, wire.settings, emulator),
    ];
  const switches = wire.ends.map((_, index) => path.join(directory, wire.name, String(index)));
  const { delay, loss } = filterSettings(wire.settings);
  return [
    // The taps are there before the switches, which go on with their start after they have returned.
    ...wire.ends.flatMap((end, index): Command[] => [
      at(end, ['ip', 'tuntap', 'add', 'dev', end.device, 'mode', 'tap']),
      at(end, ['vde_switch', '-d', '-s', switches[index]!, '-t', end.device]),
    ]),
    inNamespace(core, [
      ...(['wirefilter', '--daemon', '-v', switches.join(':')] as const),
      ...['-d', delay, '-l', loss, '-M', filterSocket(wire, directory)],
    ]),
    ...ups,
    ...planShape(wire.ends, wire.settings, emulator),
  ];
}

/** Gives a link other settings while it carries packets. `ends`: where they are now. */
export function changeWire(
  wire: Wire,
  ends: readonly [WireEnd, WireEnd],
  settings: WireSettings,
  { emulator, directory }: WirePlace,
): WireSteps {
  const commands = planShape(ends, settings, emulator);
  if (emulator === 'netem') return { commands };
  const { delay, loss } = filterSettings(settings);
  return {
    commands,
    tell: { socket: filterSocket(wire, directory), lines: [`delay ${delay}`, `loss ${loss}`] },
  };
}

/** What the kernel does at both ends. It is forgotten when an end goes to another namespace. */
export const planShape = (ends: readonly WireEnd[], settings: WireSettings, emulator: Emulator): Command[] =>
  ends.map((end) => {
    const set = (...discipline: string[]) =>
      at(end, ['tc', 'qdisc', 'replace', 'dev', end.device, 'root', ...discipline]);
    if (emulator === 'netem') return set('netem', ...netemSettings(settings));
    if (settings.rateBps === 0) return set('pfifo');
    // A burst is what may pass in some timer ticks; what waits longer than the latency is dropped, as routers do.
    const burstBytes = Math.max(16 * 1024, Math.ceil((settings.rateBps / 8) * 0.006));
    const rate = `${settings.rateBps}bit`;
    return set('tbf', 'rate', rate, 'burst', `${burstBytes}b`, 'latency', `${queueMs}ms`);
  });

/** How long a packet may wait for its turn at the rate. */
const queueMs = 100;

function netemSettings({ rttMs, rateBps, lossPercent, isCut }: WireSettings): string[] {
  const heldMs = rttMs / 2 + queueMs;
  const limit = 1000 + Math.ceil(((rateBps || 10e9) / 8 / 1500) * (heldMs / 1000));
  return [
    ...['limit', String(limit), 'delay', `${rttMs / 2}ms`, 'loss', `${isCut ? 100 : lossPercent}%`],
    ...(rateBps === 0 ? [] : ['rate', `${rateBps}bit`]),
  ];
}

const filterSettings = ({ rttMs, lossPercent, isCut }: WireSettings) => ({
  delay: String(rttMs / 2),
  loss: String(isCut ? 100 : lossPercent),
});

const filterSocket = (wire: Wire, directory: string): string => path.join(directory, wire.name, 'filter');

const at = ({ namespace }: WireEnd, command: Command): Command => inNamespace(namespace, command);
