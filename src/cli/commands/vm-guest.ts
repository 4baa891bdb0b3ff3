/** `viper vm guest` and `viper vm exec`: what goes through the guest agent. */
import type { Command } from 'commander';
import { addCommand, withSession } from '../session.ts';
import { parseDuration, readText } from '../values.ts';

export function addVmGuestCommands(vm: Command): void {
  addCommand(vm, 'guest <vm>', 'what the guest agent says of the guest', 'viper vm guest web').action(
    withSession(async ({ viper, output, signal }, name: string) => {
      const guest = await viper.getGuest({ params: { vm: name }, signal });
      const { hostname, os, kernel, interfaces = [] } = guest;
      output.show(guest, () =>
        output.facts([
          ['Host name', hostname],
          ['System', os && [os.name, os.version].filter(Boolean).join(' ')],
          ['Kernel', kernel],
          ...interfaces.map((each): [string, string] => [
            `Interface ${each.name}`,
            [each.mac, ...each.addresses.map(({ address, prefixLength }) => `${address}/${prefixLength}`)]
              .filter(Boolean)
              .join(' '),
          ]),
        ]),
      );
    }),
  );

  addCommand(
    vm,
    'exec <vm> <argv...>',
    'run a program in the guest; ends with its exit code',
    'viper vm exec web -- systemctl is-active nginx',
  )
    .option('--timeout <time>', 'how long it may take (30s if absent)', parseDuration)
    .option('--input <file>', 'its standard input; - passes on the own one')
    .action(
      withSession(
        async (
          { viper, output, signal },
          name: string,
          argv: string[],
          { timeout, input }: { timeout?: number; input?: string },
        ) => {
          const reply = await viper.execInGuest({
            params: { vm: name },
            body: {
              argv,
              ...(timeout === undefined ? {} : { timeoutMs: timeout }),
              ...(input === undefined ? {} : { input: readText(input, '--input') }),
            },
            signal,
          });
          output.show(reply, () => {
            process.stdout.write(reply.stdout);
            process.stderr.write(reply.stderr);
            if (reply.truncated) output.note('viper: the output was longer; its rest is lost');
          });
          process.exitCode = reply.exitCode >= 0 && reply.exitCode <= 255 ? reply.exitCode : 255;
        },
      ),
    );
}
