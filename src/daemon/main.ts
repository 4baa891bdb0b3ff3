/**
 * Where the daemon starts. Compiled code, stripped of its types, is kept from one start to the next: that saves the
 * memory of the stripper (about 15 MB) and most of the time to load.
 */
import { enableCompileCache } from 'node:module';
import { homedir } from 'node:os';
import path from 'node:path';

const cache =
  process.env.VIPER_CACHE ?? path.join(process.env.XDG_CACHE_HOME ?? path.join(homedir(), '.cache'), 'viper');
enableCompileCache(path.join(cache, 'code'));
await import('./program.ts');
