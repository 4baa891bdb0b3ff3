/**
 * Network namespaces as plans and as they are found. Whatever runs in a namespace of the lab belongs to the lab: so
 * the processes to end are found by where they are, which the kernel knows, and not by name.
 */
import type { Command } from '../network/index.ts';

/** The same command with its network being that of the namespace. */
export function inNamespace(namespace: string, [program, ...args]: Command): Command {
  // iproute2 does it by itself, which saves a process.
  if (program === 'ip' || program === 'tc') return [program, '-n', namespace, ...args];
  // Not `ip netns exec`: that hides the host's mounts and its control groups too.
  return ['nsenter', `--net=/run/netns/${namespace}`, '--', program, ...args];
}

export interface NamespaceOptions {
  /** It forwards what is not for itself. */
  forwards: boolean;
}

/** Makes a namespace that is fit for paths which are long, fat, and not the same there and back. */
export function planNamespace(namespace: string, { forwards }: NamespaceOptions): Command[] {
  // Hosts without IPv6 lack its settings; `-e` passes over those.
  const sysctl = (...settings: string[]): Command =>
    inNamespace(namespace, ['sysctl', '-e', '-q', '-w', ...settings]);
  return [
    ['ip', 'netns', 'add', namespace],
    sysctl(
      `net.ipv4.ip_forward=${forwards ? 1 : 0}`,
      'net.ipv4.conf.all.rp_filter=0',
      'net.ipv4.conf.default.rp_filter=0',
      'net.ipv4.conf.all.send_redirects=0',
      'net.ipv4.conf.default.send_redirects=0',
      'net.ipv6.conf.all.disable_ipv6=1',
      'net.ipv6.conf.default.disable_ipv6=1',
      // 64 MiB: what is under way at 1 Gbit/s and 500 ms.
      'net.ipv4.tcp_rmem=4096 131072 67108864',
      'net.ipv4.tcp_wmem=4096 131072 67108864',
      // What one connection learned of a link that was changed since is no help to the next.
      'net.ipv4.tcp_no_metrics_save=1',
    ),
    inNamespace(namespace, ['ip', 'link', 'set', 'dev', 'lo', 'up']),
  ];
}

export const listNamespacesCommand: Command = ['ip', 'netns', 'list'];

/** The names among the output of `listNamespacesCommand` that begin so. */
export const parseNamespaces = (output: string, beginning: string): string[] =>
  output
    .split('\n')
    .map((line) => line.split(' ')[0]!)
    .filter((name) => name.startsWith(beginning));

export const listProcessesCommand = (namespace: string): Command => ['ip', 'netns', 'pids', namespace];

export const parseProcesses = (output: string): number[] =>
  output.split('\n').flatMap((line) => (/^\d+$/.test(line) ? [Number(line)] : []));
