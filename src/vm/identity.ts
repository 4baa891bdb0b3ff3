/**
 * Gives a VM whose memory came from another one an identity of its own. Fixed scripts do it inside the guest,
 * through the agent; values travel as arguments and never become script. The order for the caller: cables out
 * (`setLinks`), load the memory, run the VM, `changeIdentity`, cables in, `renewLeases`.
 */
import { AppError } from '../model/errors.ts';
import { macPattern, namePattern } from '../model/ids.ts';
import type { GuestAgent } from './agent.ts';

export interface Identity {
  hostname: string;
  /** 32 lower-case hex digits (machine-id(5)). */
  machineId: string;
  /** Interfaces by the address that they have now. */
  macs: { from: string; to: string }[];
}

const timeoutMs = 20_000;

/** Throws `qemu_failed` with the script's words if the guest could not be changed. */
export async function changeIdentity(
  agent: Pick<GuestAgent, 'exec'>,
  identity: Identity,
  options: { signal?: AbortSignal } = {},
): Promise<void> {
  const { hostname, machineId, macs } = identity;
  check('hostname', hostname, namePattern);
  check('machineId', machineId, '^[0-9a-f]{32}$');
  for (const { from, to } of macs) {
    check('macs.from', from, macPattern);
    check('macs.to', to, macPattern);
  }
  const seconds = Math.round(Date.now() / 1000);
  const args = [hostname, machineId, String(seconds), ...macs.flatMap(({ from, to }) => [from, to])];
  await runScript(agent, 'take its new identity', changeScript, args, options.signal);
}

/**
 * Makes the guest's DHCP clients ask again, as somebody new, and its SSH server have keys of its own. The guest does it in its own time, which under TCG is
 * seconds: who waits for an address watches the guest's facts. A guest with
 * static addresses or with a client that the script does not know is left as it is.
 */
export async function renewLeases(
  agent: Pick<GuestAgent, 'exec'>,
  options: { signal?: AbortSignal } = {},
): Promise<void> {
  await runScript(agent, 'ask for new addresses', inBackground, [renewScript], options.signal);
}

async function runScript(
  agent: Pick<GuestAgent, 'exec'>,
  what: string,
  script: string,
  args: string[],
  signal: AbortSignal | undefined,
): Promise<void> {
  const argv: [string, ...string[]] = ['/bin/sh', '-s', '--', ...args];
  const { exitCode, stderr } = await agent.exec({ argv, input: script, timeoutMs, signal });
  if (exitCode === 0) return;
  const output = stderr.trim();
  throw new AppError('qemu_failed', `The guest did not ${what} (exit ${exitCode}): ${output}`, {
    exitCode,
    output,
  });
}

function check(field: string, value: string, pattern: string): void {
  if (new RegExp(pattern).test(value)) return;
  throw new AppError('invalid_request', `Cannot give the guest ${field} ${value}; wanted ${pattern}`, {
    problems: [{ field, value, wanted: pattern }],
  });
}

/**
 * POSIX sh, for busybox and Debian: $1 host name, $2 machine id, $3 the time, then pairs of old and new MAC
 * address. The clock is set because the memory may be days old. Addresses of all interfaces are looked up before
 * the first is changed, so that two may swap.
 */
const changeScript = `
set -u
fail() { echo "$1" >&2; exit 1; }
hostname=$1 machine_id=$2
date -s "@$3" > /dev/null || fail "cannot set the clock"
shift 3

old=$(cat /etc/hostname 2>/dev/null)
echo "$hostname" > /etc/hostname || fail "cannot write /etc/hostname"
hostname "$hostname" 2>/dev/null || echo "$hostname" > /proc/sys/kernel/hostname || fail "cannot set the host name"
if [ -n "$old" ] && grep -qw -- "$old" /etc/hosts 2>/dev/null; then
  sed "s/\\\\b$old\\\\b/$hostname/g" /etc/hosts > /etc/hosts.viper && cat /etc/hosts.viper > /etc/hosts
  rm -f /etc/hosts.viper
fi

echo "$machine_id" > /etc/machine-id || fail "cannot write /etc/machine-id"
[ ! -f /var/lib/dbus/machine-id ] || [ -L /var/lib/dbus/machine-id ] || echo "$machine_id" > /var/lib/dbus/machine-id

plan=
while [ $# -ge 2 ]; do
  device=
  for address in /sys/class/net/*/address; do
    [ "$(cat "$address")" = "$1" ] || continue
    device=\${address%/address}
    device=\${device##*/}
  done
  [ -n "$device" ] || fail "no interface has the address $1"
  plan="$plan $device=$2"
  shift 2
done

for step in $plan; do
  device=\${step%%=*} mac=\${step#*=}
  if ! ip link set dev "$device" address "$mac" 2>/dev/null; then
    ip link set dev "$device" down && ip link set dev "$device" address "$mac" || fail "cannot set $mac on $device"
    ip link set dev "$device" up || fail "cannot bring $device up"
  fi
done
`;

/** Runs its argument, a script, on its own. */
const inBackground = 'setsid /bin/sh -c "$1" > /dev/null 2>&1 < /dev/null &';

/**
 * systemd-networkd takes its DHCP identity from the machine id when it starts. udhcpc would renew the lease of the
 * VM that it was; the same command started anew asks for one of its own.
 */
const renewScript = `
set -u
sync
if [ -d /run/systemd/system ] && systemctl -q is-active systemd-networkd; then
  systemctl restart systemd-networkd || exit 1
fi
hostname=$(hostname)
for directory in /proc/[0-9]*; do
  read -r command 2>/dev/null < "$directory/comm" && [ "$command" = udhcpc ] || continue
  saved=/tmp/viper-udhcpc
  tr '\\0' '\\n' < "$directory/cmdline" | sed "s/^hostname:.*/hostname:$hostname/" | tr '\\n' '\\0' > "$saved" || continue
  exec 3< "$saved"
  rm -f "$saved"
  kill -KILL "\${directory#/proc/}"
  xargs -0 setsid <&3 > /dev/null 2>&1 &
  exec 3<&-
done

# Whoever has the key of one VM could else stand in for every clone of it. Under TCG this takes seconds, so it is last.
command -v ssh-keygen > /dev/null || exit 0
for key in /etc/ssh/ssh_host_*_key; do
  [ -f "$key" ] || continue
  type=\${key#/etc/ssh/ssh_host_}
  rm -f "$key.viper" "$key.viper.pub"
  nice -n 19 ssh-keygen -q -t "\${type%_key}" -N '' -f "$key.viper" || continue
  mv "$key.viper.pub" "$key.pub" && mv "$key.viper" "$key"
done
[ ! -d /run/systemd/system ] || systemctl -q try-reload-or-restart ssh.service sshd.service 2> /dev/null
exit 0
`;
