/** What the kernel tells of MPTCP connections, as `ip -t mptcp monitor` prints it (iproute2 6.1), line by line. */

export interface MptcpEvent {
  /** `CREATED`, `ESTABLISHED`, `CLOSED`, `ANNOUNCED`, `REMOVED`, `SF_ESTABLISHED`, `SF_CLOSED`, `SF_PRIO`, ... */
  name: string;
  /** Of the connection, hexadecimal. */
  token: string;
  localAddress?: string;
  remoteAddress?: string;
}

const maxLineLength = 2000;
const line = /^(?:\[[^\]]*\]\s*)?\[?\s*([A-Z_]+)\s*\]? token=([0-9a-f]+)(.*)$/;

/** `undefined` for a line of another kind. */
export function parseMptcpEvent(text: string): MptcpEvent | undefined {
  const [, name, token, rest] = (text.length <= maxLineLength && line.exec(text.trim())) || [];
  if (name === undefined || token === undefined) return undefined;
  const fields = new Map([...rest!.matchAll(/(\w+)=(\S+)/g)].map(([, key, value]) => [key!, value!]));
  const localAddress = fields.get('saddr4') ?? fields.get('saddr6');
  const remoteAddress = fields.get('daddr4') ?? fields.get('daddr6');
  return {
    name,
    token,
    ...(localAddress === undefined ? {} : { localAddress }),
    ...(remoteAddress === undefined ? {} : { remoteAddress }),
  };
}
