/** What the shapes of every resource are made of. */
import { type TSchema, Type } from 'typebox';
import { errorCodes } from '../../model/errors.ts';
import { digestPattern, macPattern, namePattern, uuidPattern } from '../../model/ids.ts';

/** A JSON object with exactly these properties: unknown ones are refused, so that a typing slip is told. */
export const Exact = <T extends Record<string, TSchema>>(properties: T) =>
  Type.Object(properties, { additionalProperties: false });

/** The body of a request, with an example that the docs page offers to send. */
export const Body = <T extends Record<string, TSchema>>(example: Record<string, unknown>, properties: T) =>
  Type.Object(properties, { additionalProperties: false, examples: [example] });

/**
 * A string enumeration that stays readable in the document: `enum` instead of `anyOf` of constants.
 */
export const OneOf = <const T extends readonly string[]>(values: T, description?: string) =>
  Type.Unsafe<T[number]>({ type: 'string', enum: [...values], ...(description ? { description } : {}) });

export const Uuid = Type.String({ pattern: uuidPattern, description: 'A UUID in lower case.' });
export const Digest = Type.String({
  pattern: digestPattern,
  description: 'SHA-256 of the bytes of the file.',
});
export const Name = Type.String({
  pattern: namePattern,
  description: 'A host name label: a-z, 0-9 and hyphens, at most 63 characters.',
});
/** What a path takes where an object has both a name and an id. */
export const Reference = Type.String({
  pattern: '^[a-z0-9][a-z0-9.:_-]{0,127}$',
  description: 'The id, digest, name or alias of the object.',
});
export const Mac = Type.String({
  pattern: macPattern,
  description: 'A MAC address in lower case with colons.',
});
export const Time = Type.String({ format: 'date-time' });
export const Bytes = Type.Integer({ minimum: 0 });
export const Fingerprint = Type.String({
  pattern: '^[0-9a-f]{64}$',
  description: 'SHA-256 of the certificate, hex.',
});
export const HttpsUrl = Type.String({ pattern: '^https://[^\\s/?#@]{1,253}/?$', maxLength: 300 });

/** What a limit of bits per second can be. */
export const BandwidthBps = Type.Integer({ minimum: 1_000_000, maximum: 1_000_000_000_000 });

export const ErrorReply = Exact({
  error: Exact({
    code: OneOf(errorCodes),
    message: Type.String(),
    details: Type.Record(Type.String(), Type.Unknown()),
    requestId: Type.String(),
  }),
});

/** A page of a list: `next` goes into `after` of the following request; null ends the list. */
export const Page = <T extends TSchema>(item: T) =>
  Exact({ items: Type.Array(item), next: Type.Union([Type.String(), Type.Null()]) });

export const PageQuery = {
  limit: Type.Optional(Type.Integer({ minimum: 1, maximum: 200, default: 50 })),
  after: Type.Optional(Type.String({ maxLength: 200, description: '`next` of the page before.' })),
};
export const PlainText = (maxLength: number) => Type.String({ maxLength, pattern: '^[^\\u0000-\\u001f]*$' });
