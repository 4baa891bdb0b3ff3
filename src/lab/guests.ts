/** Where `scripts/setup` puts the guest images that demo, tests and benches boot. */
import { homedir } from 'node:os';
import path from 'node:path';

export function guestImage(name: 'tiny' | 'debian'): string {
  const cache =
    process.env.VIPER_CACHE ??
    path.join(process.env.XDG_CACHE_HOME ?? path.join(homedir(), '.cache'), 'viper');
  return path.join(cache, 'guests', `${name}.qcow2`);
}
