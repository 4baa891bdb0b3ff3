/** `viper device …`: mobile devices that VMs follow. `run` is for the device itself and is in device-run.ts. */
import type { Command } from 'commander';
import type { Device } from '../../sdk/client.ts';
import { formatAge } from '../output.ts';
import { addCommand, addGroup, type Session, withSession } from '../session.ts';
import { collect, parseSeconds } from '../values.ts';
import { addDeviceRunCommand } from './device-run.ts';
import { listAll } from './lists.ts';

interface AddOptions {
  vm?: string;
  mac?: string[];
  address?: string[];
  expires?: number;
}

export function addDeviceCommands(program: Command): void {
  const device = addGroup(program, 'device', 'mobile devices that VMs follow');

  addCommand(
    device,
    'add <name>',
    'register a device and make its token; the VM follows it from now on',
    'viper device add phone --vm web > phone.token',
  )
    .option('--vm <vm>', 'the VM that follows it')
    .option('--mac <address>', 'of its radio, so that cloudlets recognise it; may be repeated', collect)
    .option('--address <address>', 'where it is now; may be repeated', collect)
    .option('--expires <time>', 'the life of its token, such as 30d; without end if absent', parseSeconds)
    .action(
      withSession(async ({ viper, output, signal }, name: string, options: AddOptions) => {
        const created = await viper.createDevice({
          body: {
            name,
            ...(options.vm ? { vm: options.vm } : {}),
            ...(options.mac ? { macs: options.mac } : {}),
            ...(options.address ? { addresses: options.address } : {}),
            ...(options.expires === undefined ? {} : { expiresInS: options.expires }),
          },
          signal,
        });
        output.show(created, () => {
          output.note(
            `The token of ${name} is shown this once. On the device: viper device run --url ${viper.url}`,
          );
          output.line(created.secret);
        });
      }),
    );

  addCommand(device, 'list', 'all devices', 'viper device list').action(
    withSession((session) =>
      listAll(
        session,
        session.viper.listDevices,
        ['NAME', 'VM', 'WHERE', 'RTT', 'LAN', 'REPORTED', 'ID'],
        (each) => [
          each.name,
          each.vm?.name ?? '-',
          whereOf(each),
          formatRtt(each.rttMs),
          each.lan?.name ?? '-',
          each.reportedAt ? `${formatAge(each.reportedAt)} ago` : 'never',
          each.id,
        ],
        'There are no devices. Register one: viper device add NAME --vm VM',
      ),
    ),
  );

  addCommand(device, 'show <device>', 'one device, by name or id', 'viper device show phone').action(
    withSession(async (session, name: string) =>
      show(session, await session.viper.getDevice({ params: { device: name }, signal: session.signal })),
    ),
  );

  addCommand(
    device,
    'pair <device> <vm>',
    'let a VM follow the device',
    'viper device pair phone web',
  ).action(
    withSession(async ({ viper, output, signal }, name: string, vm: string) => {
      await viper.pairDevice({ params: { device: name }, body: { vm }, signal });
      output.say(`VM ${vm} follows device ${name}.`);
    }),
  );

  addCommand(device, 'unpair <device>', 'let no VM follow it', 'viper device unpair phone').action(
    withSession(async ({ viper, output, signal }, name: string) => {
      await viper.unpairDevice({ params: { device: name }, signal });
      output.say(`No VM follows device ${name}.`);
    }),
  );

  addCommand(device, 'remove <device>', 'forget it and revoke its token', 'viper device remove phone').action(
    withSession(async ({ viper, output, signal }, name: string) => {
      await viper.deleteDevice({ params: { device: name }, signal });
      output.say(`Device ${name} is removed.`);
    }),
  );

  addDeviceRunCommand(device);
}

function show({ output }: Session, device: Device): void {
  output.show(device, () =>
    output.facts([
      ['Name', device.name],
      ['Id', device.id],
      ['VM', device.vm?.name],
      ['Where', whereOf(device)],
      ['RTT', device.rttMs === undefined ? undefined : formatRtt(device.rttMs)],
      ['In the LAN of', device.lan?.name],
      ['Addresses', device.addresses.join(', ')],
      ['MACs', device.macs.join(', ')],
      ['Reported', device.reportedAt && `${formatAge(device.reportedAt)} ago`],
    ]),
  );
}

const whereOf = ({ vmIsHere, vmAt }: Device): string => (vmIsHere ? 'here' : (vmAt?.name ?? '-'));

export const formatRtt = (ms: number | undefined): string =>
  ms === undefined ? '-' : `${ms < 10 ? Number(ms.toFixed(1)) : Math.round(ms)} ms`;
