/**
 * What a QMP server can say, parsed from one JSON object.
 * Source: QEMU docs/interop/qmp-spec.rst, sections 'Server Greeting', 'Commands Responses', 'Asynchronous events'.
 */
import { isObject, type JsonObject } from './lines.ts';

export type QmpMessage =
  | { kind: 'greeting'; version: QemuVersion }
  | { kind: 'return'; id: unknown; value: unknown }
  | { kind: 'error'; id: unknown; qmpClass: string; description: string }
  | { kind: 'event'; name: string; data: JsonObject; timestampMs: number };

export interface QemuVersion {
  major: number;
  minor: number;
  micro: number;
  /** The distribution's own name of its build, or ''. */
  package: string;
}

/** `undefined` if the object is none of the four. */
export function parseMessage(message: JsonObject): QmpMessage | undefined {
  if (isObject(message.QMP)) {
    const version = parseVersion(message.QMP.version);
    return version && { kind: 'greeting', version };
  }
  if (typeof message.event === 'string') {
    const { timestamp, data } = message;
    return {
      kind: 'event',
      name: message.event,
      data: isObject(data) ? data : {},
      timestampMs: isObject(timestamp)
        ? Number(timestamp.seconds) * 1000 + Math.floor(Number(timestamp.microseconds) / 1000)
        : 0,
    };
  }
  if (isObject(message.error)) {
    const { class: qmpClass, desc } = message.error;
    if (typeof qmpClass !== 'string' || typeof desc !== 'string') return undefined;
    return { kind: 'error', id: message.id, qmpClass, description: desc };
  }
  if ('return' in message) return { kind: 'return', id: message.id, value: message.return };
  return undefined;
}

function parseVersion(version: unknown): QemuVersion | undefined {
  if (!isObject(version) || !isObject(version.qemu)) return undefined;
  const { major, minor, micro } = version.qemu;
  if (typeof major !== 'number' || typeof minor !== 'number' || typeof micro !== 'number') return undefined;
  return { major, minor, micro, package: typeof version.package === 'string' ? version.package.trim() : '' };
}
