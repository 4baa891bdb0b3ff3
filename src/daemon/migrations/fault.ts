/**
 * Fault injection, for `npm run test:faults` alone: the file that VIPER_FAULT names holds `ROLE STATE MS`, say
 * `source switching 2000`. A migration then stands still for that long right after its journal has the state and
 * before anything of it is done, so that a test can strike just there.
 */
import { readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';

/** Nothing to wait for, unless a test asks for it. */
export function holdForFault(role: 'source' | 'destination', state: string): Promise<void> | undefined {
  const file = process.env.VIPER_FAULT;
  if (!file) return undefined;
  const [wantedRole, wantedState, ms] = readFileSync(file, 'utf8').trim().split(' ');
  return role === wantedRole && state === wantedState ? sleep(Number(ms)) : undefined;
}
