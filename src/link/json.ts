/** JSON objects from bytes of a stranger: a reason instead of an exception. */
export type JsonObject = Record<string, unknown>;

export type JsonRefusal = 'not_utf8' | 'not_json' | 'not_an_object';

/** The object that the bytes are the JSON text of. */
export function parseJson(bytes: Uint8Array): JsonObject | JsonRefusal {
  let text: string;
  try {
    text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return 'not_utf8';
  }
  try {
    const value: unknown = JSON.parse(text);
    const isObject = typeof value === 'object' && value !== null && !Array.isArray(value);
    return isObject ? (value as JsonObject) : 'not_an_object';
  } catch {
    return 'not_json';
  }
}
