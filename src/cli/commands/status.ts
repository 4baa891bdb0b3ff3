/** `viper status`, `viper instance-types`. */
import type { Command } from 'commander';
import { formatBytes } from '../../model/units.ts';
import { formatBitRate } from '../output.ts';
import { addCommand, withSession } from '../session.ts';
import { rateOrNone } from '../values.ts';

export function addStatusCommands(program: Command): void {
  addCommand(program, 'status', 'the cloudlet: identity, QEMU, memory, disk, VMs', 'viper status').action(
    withSession(async ({ viper, output, signal }) => {
      const cloudlet = await viper.getCloudlet({ signal });
      const { memory, disk, vms } = cloudlet;
      const room = (of: { freeBytes: number; totalBytes: number }) =>
        `${formatBytes(of.freeBytes)} free of ${formatBytes(of.totalBytes)}`;
      output.show(cloudlet, () =>
        output.facts([
          ['Cloudlet', `${cloudlet.name} (${cloudlet.id})`],
          ['URL', cloudlet.url],
          ['Fleet', cloudlet.fleetId],
          ['Viper', cloudlet.version],
          ['QEMU', `${cloudlet.qemuVersion} (${cloudlet.accelerator})`],
          ['CPUs', String(cloudlet.cpus)],
          ['Memory', room(memory)],
          ['Disk', room(disk)],
          ['Networks', cloudlet.networks.map(({ name, kind }) => `${name} (${kind})`).join(', ')],
          [
            'Storages',
            cloudlet.storages.map(({ name, kind }) => `${name} (${kind})`).join(', ') || undefined,
          ],
          [
            'Migrations',
            cloudlet.limits.bandwidthBps === null
              ? undefined
              : `at most ${formatBitRate(cloudlet.limits.bandwidthBps)} together`,
          ],
          [
            'Lends',
            cloudlet.relay.memoryBytes > 0
              ? `at most ${formatBytes(cloudlet.relay.memoryBytes)}, ${formatBytes(cloudlet.relay.freeBytes)} of it now`
              : undefined,
          ],
          ['Draining', cloudlet.draining ? 'yes: it takes no VMs until `viper undrain`' : undefined],
          ['VMs', `${vms.running} running of ${vms.total}`],
        ]),
      );
    }),
  );

  addCommand(
    program,
    'limit',
    'limit what all migrations from the cloudlet take together; VMs share it equally',
    'viper limit --bandwidth 200M',
  )
    .requiredOption(
      '--bandwidth <rate>',
      'bits per second, such as 100M; none takes the limit away',
      rateOrNone,
    )
    .action(
      withSession(async ({ viper, output, signal }, { bandwidth }: { bandwidth: number | 'none' }) => {
        const bandwidthBps = bandwidth === 'none' ? null : bandwidth;
        const limits = await viper.limitCloudlet({ body: { bandwidthBps }, signal });
        output.show(limits, () =>
          output.say(
            limits.bandwidthBps === null
              ? 'Migrations take what the link gives.'
              : `All migrations together take at most ${formatBitRate(limits.bandwidthBps)}.`,
          ),
        );
      }),
    );

  addCommand(
    program,
    'instance-types',
    'the instance types that a VM can be created with',
    'viper instance-types',
  ).action(
    withSession(async ({ viper, output, signal }) => {
      const types = await viper.listInstanceTypes({ signal });
      const rows = types.items.map(({ name, cpus, memoryBytes, diskBytes, nets }) => [
        name,
        String(cpus),
        formatBytes(memoryBytes),
        formatBytes(diskBytes),
        nets.join(','),
      ]);
      output.show(types, () =>
        output.table(['NAME', 'CPUS', 'MEMORY', 'DISK', 'NETS'], rows, 'There are no instance types.'),
      );
    }),
  );
}
