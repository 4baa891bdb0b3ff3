/** What the agents agree on before the first page. Parsed strictly: it comes from another cloudlet. */
import { isSetName, type SetName } from '../../pages/index.ts';
import { BlockTable, pageBytes } from '../../stream/index.ts';
import { agentError, protocolVersion } from './frames.ts';

/** `resume`: a post-copy goes on, for which the destination says what is missing. */
export type AgentMode = 'precopy' | 'postcopy' | 'resume';

/** The first word of the destination. */
export interface Offer {
  version: number;
  /** Reference sets that it holds. */
  sets: SetName[];
  /** It can read what its QEMU has got, so a page may be a copy of another, or a change of itself. */
  reads: boolean;
}

/** The first word of the source, which has seen the offer. */
export interface Hello {
  version: number;
  mode: AgentMode;
  /** Those of the offer that it has an index of; batches name them by their place here. */
  sets: SetName[];
  /** It will keep the memory of the VM, so that the way back is cheap for one who remembers what was in it. */
  keeps: boolean;
}

const maxSets = 32;

export function parseOffer(body: Buffer): Offer {
  const { version, sets, reads } = parse(body);
  if (version !== protocolVersion || typeof reads !== 'boolean')
    throw agentError('an offer of another version');
  return { version, sets: parseSets(sets), reads };
}

export function parseHello(body: Buffer): Hello {
  const { version, mode, sets, keeps } = parse(body);
  const isMode = mode === 'precopy' || mode === 'postcopy' || mode === 'resume';
  if (version !== protocolVersion || !isMode || typeof keeps !== 'boolean')
    throw agentError('a hello of another version');
  return { version, mode, sets: parseSets(sets), keeps };
}

/** The section of RAM in the source's stream, and its blocks. */
export interface Layout {
  sectionId: number;
  table: BlockTable;
}

export function parseLayout(body: Buffer): Layout {
  const { sectionId, blocks } = parse(body);
  const isList = Array.isArray(blocks) && blocks.length > 0 && blocks.length <= 256;
  if (!isList || !Number.isInteger(sectionId)) throw agentError('a layout that is none');
  const sizes = blocks.map(({ name, sizeBytes }) => {
    const isSound =
      typeof name === 'string' && name.length > 0 && name.length < 256 && Number.isSafeInteger(sizeBytes);
    if (!isSound || sizeBytes <= 0 || sizeBytes % pageBytes !== 0 || sizeBytes > 2 ** 42)
      throw agentError(`a block ${String(name).slice(0, 80)} of ${sizeBytes} bytes`);
    return { name, sizeBytes };
  });
  const table = new BlockTable(sizes);
  if (table.pages > 2 ** 30) throw agentError(`a layout of ${table.pages} pages`);
  return { sectionId: sectionId as number, table };
}

function parse(body: Buffer): Record<string, unknown> {
  try {
    const value = JSON.parse(body.toString('utf8'));
    if (typeof value === 'object' && value !== null) return value;
  } catch {
    // Told below.
  }
  throw agentError('what is no JSON object');
}

function parseSets(sets: unknown): SetName[] {
  const isList = Array.isArray(sets) && sets.length <= maxSets;
  if (!isList || !sets.every((name) => typeof name === 'string' && isSetName(name)))
    throw agentError('names of sets that are none');
  return sets;
}
