/** `viper peer …` and `viper join-token`: the cloudlets that know each other. */
import type { Command } from 'commander';
import { formatAge, formatTime } from '../output.ts';
import { addCommand, addGroup, withSession } from '../session.ts';
import { parseSeconds } from '../values.ts';

export function addPeerCommands(program: Command): void {
  const peer = addGroup(program, 'peer', 'the other cloudlets of the fleet');

  addCommand(peer, 'list', 'the other cloudlets', 'viper peer list').action(
    withSession(async ({ viper, output, signal }) => {
      const peers = await viper.listPeers({ signal });
      const rows = peers.items.map((each) => [
        each.name,
        each.url,
        each.lastSeenAt ? `${formatAge(each.lastSeenAt)} ago` : 'never',
        formatAge(each.joinedAt),
        each.id,
      ]);
      output.show(peers, () =>
        output.table(
          ['NAME', 'URL', 'SEEN', 'AGE', 'ID'],
          rows,
          'There are no peers. Let one join: viper join-token',
        ),
      );
    }),
  );

  addCommand(
    peer,
    'remove <peer>',
    'put a cloudlet out of the fleet, as this one sees it',
    'viper peer remove ID',
  ).action(
    withSession(async ({ viper, output, signal }, id: string) => {
      await viper.removePeer({ params: { peer: id }, signal });
      output.say(`Peer ${id} is removed.`);
    }),
  );

  addCommand(
    program,
    'join-token',
    'make a single-use token with which another cloudlet joins the fleet',
    'viper join-token --expires 10m > join.token',
  )
    .option('--expires <time>', 'how long it is good (1h if absent)', parseSeconds)
    .action(
      withSession(async ({ viper, output, signal }, options: { expires?: number }) => {
        const made = await viper.createJoinToken({
          body: options.expires === undefined ? {} : { expiresInS: options.expires },
          signal,
        });
        output.show(made, () => {
          output.note(
            `Good once, until ${formatTime(made.expiresAt)} UTC. On the other machine:\n` +
              `  viper join ${viper.url} --token TOKEN --state DIR --name NAME --listen HOST:PORT`,
          );
          output.line(made.token);
        });
      }),
    );
}
