/** The program `viper`; `bin/viper` starts it with a Node that is new enough. */
import { fileURLToPath } from 'node:url';
import { run } from './run.ts';

await run(process.argv.slice(2), fileURLToPath(new URL('../daemon/main.ts', import.meta.url)));
