/** The management net of a lab on the host: one of the 512 that 198.18.0.0/15, set aside for labs (RFC 2544), holds. */
import { createHash } from 'node:crypto';
import { AppError } from '../model/errors.ts';
import { execute } from './runner.ts';

const count = 512;

/** The same for the same name as long as it is free, so that URLs stay. */
export async function chooseSubnet(lab: string): Promise<number> {
  const taken = subnetsOf(await execute(['ip', '-j', 'address', 'show']));
  return freeSubnet(lab, taken);
}

export function freeSubnet(lab: string, taken: ReadonlySet<number>): number {
  const first = createHash('sha256').update(lab).digest().readUInt16BE() % count;
  for (let step = 0; step < count; step += 1) {
    const subnet = (first + step) % count;
    if (!taken.has(subnet)) return subnet;
  }
  throw new AppError('too_many', `Lab: ${count} labs are up, wanted a free net of 198.18.0.0/15`);
}

/** Those in which the host has an address, from the output of `ip -j address`. */
export function subnetsOf(output: string): Set<number> {
  const devices = JSON.parse(output.trim() || '[]') as { addr_info?: { local?: string }[] }[];
  const locals = devices.flatMap(({ addr_info = [] }) => addr_info.map(({ local = '' }) => local));
  return new Set(
    locals.flatMap((local) => {
      const [, second, third] = /^198\.(18|19)\.(\d+)\./.exec(local) ?? [];
      return second ? [(Number(second) - 18) * 256 + Number(third)] : [];
    }),
  );
}
