/** All commands of `viper` in one tree. */
import { readFileSync } from 'node:fs';
import { Command } from 'commander';
import { addContextCommands } from './commands/context.ts';
import { addDaemonCommands } from './commands/daemon.ts';
import { addDeviceCommands } from './commands/device.ts';
import { addDrainCommands } from './commands/drain.ts';
import { addEscrowCommands } from './commands/escrow.ts';
import { addFollowCommands } from './commands/follow.ts';
import { addImageCommands } from './commands/image.ts';
import { addLabCommands } from './commands/lab.ts';
import { addMigrationCommands } from './commands/migration.ts';
import { addOperationCommands } from './commands/operation.ts';
import { addPeerCommands } from './commands/peer.ts';
import { addRelayCommands } from './commands/relay.ts';
import { addSnapshotCommands } from './commands/snapshot.ts';
import { addStatusCommands } from './commands/status.ts';
import { addTokenCommands } from './commands/token.ts';
import { addVmCommands } from './commands/vm.ts';
import { addCommonOptions, withExample } from './session.ts';

/** `daemonProgram` is the file that `init`, `join` and `daemon` run. */
export function createProgram(daemonProgram: string): Command {
  const program = new Command('viper');
  program
    .description('VMs on a cloudlet: create, clone, move, look into and remove them.')
    .version(version(), '-V, --version')
    // So that `init --url` is the option of `init`, and not that of every command.
    .enablePositionalOptions()
    .exitOverride()
    .configureOutput({ outputError: (text, write) => write(text.replace(/^error: /, 'viper: ')) })
    .showHelpAfterError('(--help shows the options and an example)');
  withExample(
    program,
    'viper init --state ~/edge1 --name edge1 --listen 127.0.0.1:7443\n' +
      'viper daemon --state ~/edge1 &\n' +
      'viper image import debian-12.qcow2 --alias debian-12\n' +
      'viper vm create web --image debian-12 --memory 512M\n' +
      'viper vm console web',
  );
  addContextCommands(program);
  addStatusCommands(program);
  addImageCommands(program);
  addVmCommands(program);
  addSnapshotCommands(program);
  addMigrationCommands(program);
  addDrainCommands(program);
  addRelayCommands(program);
  addEscrowCommands(program);
  addDeviceCommands(program);
  addFollowCommands(program);
  addOperationCommands(program);
  addTokenCommands(program);
  addPeerCommands(program);
  addCommonOptions(program);
  // After the common options: `init` and `join` have a --url and a --token of their own.
  addDaemonCommands(program, daemonProgram);
  addLabCommands(program);
  return program;
}

function version(): string {
  const text = readFileSync(new URL('../../package.json', import.meta.url), 'utf8');
  return (JSON.parse(text) as { version: string }).version;
}
