/** The end of labs, by name alone: it works also for what is left of a lab whose maker was killed. */
import { listLinksCommand, parseLinks } from '../network/index.ts';
import { prefix } from './layout.ts';
import { isLeftBehind, listLabs, readRecord, removeDirectory } from './record.ts';
import { endProcessesIn, execute, namespacesOf } from './runner.ts';

/** Takes away every lab that was left behind. One that resists, or that another sweep is at, is in nobody's way here. */
export async function sweep(): Promise<void> {
  for (const name of await listLabs())
    if (await isLeftBehind(await readRecord(name))) await takeDown(name).catch(() => {});
}

/** All that is left of a lab, whoever made it; gives whether there was something. */
export async function takeDown(name: string): Promise<boolean> {
  const found = await removeNamed(name);
  const existed = (await readRecord(name).catch(() => undefined)) !== undefined;
  await removeDirectory(name);
  return found || existed;
}

/** Processes, namespaces and the host's device of a lab, by its name alone. */
export async function removeNamed(name: string): Promise<boolean> {
  const namespaces = await namespacesOf(`${prefix}${name}-`);
  await endProcessesIn(namespaces);
  for (const namespace of namespaces) await execute(['ip', 'netns', 'delete', namespace]);
  // Gone with the namespace of its other end, a moment later.
  const host = `${prefix}${name}`;
  const links = parseLinks(await execute(listLinksCommand));
  const isThere = links.some((link) => link.name === host && link.kind === 'veth');
  if (isThere) await execute(['ip', 'link', 'delete', 'dev', host]).catch(() => {});
  return namespaces.length > 0 || isThere;
}
