/**
 * Requests of the contract that are nearly right: made from its own schemas, with here and there a value, a key, a
 * path, a header or a body that no schema allows. What it makes is deterministic by the seed of fast-check.
 */
import fc from 'fast-check';
import { endpoints, type OperationName, type Route, routes } from '../../src/contract/index.ts';
import { newId } from '../../src/model/ids.ts';

export interface Request {
  method: string;
  /** Path and query as they go over the wire. */
  path: string;
  headers: Record<string, string>;
  body: string | null;
}

/** The part of JSON Schema that the contract uses. */
interface Schema {
  type?: string;
  const?: unknown;
  enum?: unknown[];
  anyOf?: Schema[];
  pattern?: string;
  format?: string;
  minLength?: number;
  maxLength?: number;
  minimum?: number;
  maximum?: number;
  multipleOf?: number;
  properties?: Record<string, Schema>;
  required?: string[];
  items?: Schema;
  minItems?: number;
  maxItems?: number;
  uniqueItems?: boolean;
}

const longText = 'long'.repeat(5000);
/** Text that wants to be something else. */
const oddText = fc.oneof(
  fc.constantFrom(
    '',
    ' ',
    '.',
    '..',
    '../../../etc/passwd',
    '/',
    '\\',
    '\0',
    '\r\nx: y',
    'NaN',
    'Infinity',
    '-1',
  ),
  fc.constantFrom('1e999', '0x10', 'null', 'true', '[object Object]', '__proto__', 'constructor', 'toString'),
  fc.constantFrom(
    "' OR 1=1 --",
    '$(reboot)',
    '`reboot`',
    '%s%n',
    '{{7*7}}',
    '<script>',
    '😀',
    'ﷺ',
    '\u202e',
    '\ud800',
  ),
  fc.constant(longText),
  fc.string({ unit: 'binary', maxLength: 40 }),
);
const oddValue: fc.Arbitrary<unknown> = fc.oneof(
  fc.constantFrom(null, true, false, 0, -0, -1, 1.5, 1e-300, 1e308, -1e308, 2 ** 31, 2 ** 53, -(2 ** 63)),
  fc.constantFrom<unknown>([], {}, [[[[[[]]]]]], [null], [{}], { length: 1e9 }, { toString: 1 }),
  oddText,
  fc.jsonValue({ maxDepth: 3 }),
);

/** Values of the schema; with `odd`, at each of its places now and then one that is not. */
function valuesOf(schema: Schema, odd: boolean): fc.Arbitrary<unknown> {
  const good = goodValue(schema, odd);
  return odd ? fc.oneof({ weight: 12, arbitrary: good }, { weight: 1, arbitrary: oddValue }) : good;
}

function goodValue(schema: Schema, odd: boolean): fc.Arbitrary<unknown> {
  if (schema.anyOf) return fc.oneof(...schema.anyOf.map((each) => valuesOf(each, odd)));
  if ('const' in schema) return fc.constant(schema.const);
  if (schema.enum) return fc.constantFrom(...schema.enum);
  switch (schema.type) {
    case 'object':
      return objectOf(schema, odd);
    case 'array':
      return arrayOf(schema, odd);
    case 'string':
      return textOf(schema);
    case 'integer':
    case 'number':
      return numberOf(schema);
    case 'boolean':
      return fc.boolean();
    case 'null':
      return fc.constant(null);
    default:
      return fc.jsonValue({ maxDepth: 2 });
  }
}

function objectOf({ properties = {}, required = [] }: Schema, odd: boolean): fc.Arbitrary<unknown> {
  const values = Object.fromEntries(
    Object.entries(properties).map(([key, value]) => [key, valuesOf(value, odd)]),
  );
  const whole = fc.record(values, { requiredKeys: required });
  if (!odd) return whole;
  const extra = fc.dictionary(oddText, oddValue, { minKeys: 1, maxKeys: 2 });
  return fc.oneof(
    { weight: 12, arbitrary: whole },
    { weight: 1, arbitrary: fc.record(values, { requiredKeys: [] }) },
    { weight: 1, arbitrary: fc.tuple(whole, extra).map(([a, b]) => ({ ...a, ...b })) },
  );
}

function arrayOf(
  { items = {}, minItems = 0, maxItems = 5, uniqueItems }: Schema,
  odd: boolean,
): fc.Arbitrary<unknown> {
  const good = valuesOf(items, odd);
  const bounds = { minLength: minItems, maxLength: Math.min(maxItems, minItems + 3) };
  const array = uniqueItems
    ? fc.uniqueArray(good, { ...bounds, comparator: 'SameValueZero' })
    : fc.array(good, bounds);
  if (!odd) return array;
  const many = array.map((some) =>
    Array.from({ length: 300 }, (_, index) => some[index % (some.length || 1)] ?? null),
  );
  return fc.oneof({ weight: 15, arbitrary: array }, { weight: 1, arbitrary: many });
}

function textOf({ pattern, format, minLength = 0, maxLength = 200 }: Schema): fc.Arbitrary<string> {
  if (format === 'date-time') return fc.date({ noInvalidDate: true }).map((date) => date.toISOString());
  const bounds = { minLength, maxLength: Math.min(maxLength, minLength + 40) };
  if (pattern === undefined) return fc.string(bounds);
  return fc.stringMatching(new RegExp(pattern), { size: 'small' });
}

function numberOf({ minimum = -1e6, maximum = 1e6, multipleOf = 1 }: Schema): fc.Arbitrary<number> {
  const [low, high] = [Math.ceil(minimum / multipleOf), Math.floor(maximum / multipleOf)];
  return fc
    .oneof(fc.integer({ min: low, max: Math.min(high, low + 100) }), fc.constantFrom(low, high))
    .map((value) => value * multipleOf);
}

// --- the parts of a request

/** For a URL: odd text may be not even well-formed. */
const encode = (text: string): string => encodeURIComponent(text.toWellFormed());

const oddSegment = fc.oneof(
  fc.constantFrom(
    '%',
    '%zz',
    '%00',
    '%ff',
    '%c0%ae%c0%ae',
    '..',
    '%2e%2e',
    '..%2f..%2f..%2fetc%2fpasswd',
    '%2f',
    '',
  ),
  fc.constantFrom(
    'a%0d%0ax:y',
    '__proto__',
    'constructor',
    ';',
    ':',
    '*',
    '%252e',
    'a'.repeat(101),
    longText,
  ),
  oddText.map(encode),
);

function pathOf(name: OperationName): fc.Arbitrary<string> {
  const { params } = routes[name] as Route;
  const properties = (params as Schema | undefined)?.properties ?? {};
  const parts = endpoints[name].path.split(/\{(\w+)\}/);
  // Every second part is the name of a parameter.
  const segments = parts.map((part, index) =>
    index % 2 === 0
      ? fc.constant(part)
      : fc.oneof(
          {
            weight: 6,
            arbitrary: valuesOf(properties[part] ?? {}, false).map((value) => encode(String(value))),
          },
          { weight: 2, arbitrary: fc.constant(newId()) },
          { weight: 2, arbitrary: oddSegment },
        ),
  );
  const path = fc.tuple(...segments).map((all) => all.join(''));
  const oddPath = fc.tuple(path, oddSegment).map(([good, odd]) => `${good}/${odd}`);
  return fc.oneof({ weight: 15, arbitrary: path }, { weight: 1, arbitrary: oddPath });
}

function queryOf(name: OperationName): fc.Arbitrary<string> {
  const { query } = routes[name] as Route;
  const properties = (query as Schema | undefined)?.properties ?? {};
  const known = Object.entries(properties).map(([key, schema]) =>
    fc.option(
      fc
        .oneof(
          { weight: 3, arbitrary: valuesOf(schema, false).map(String) },
          { weight: 1, arbitrary: oddText },
        )
        .map((value) => `${key}=${encode(value)}`),
      { nil: '' },
    ),
  );
  const odd = fc.oneof(
    fc.constantFrom(
      'limit=1&limit=2',
      'limit[]=1',
      'limit[a]=1',
      'after=%',
      '=',
      '&&&&',
      '?',
      'a',
      `q=${longText}`,
    ),
    fc.tuple(oddText, oddText).map(([key, value]) => `${encode(key)}=${encode(value)}`),
  );
  const extra = fc.oneof({ weight: 8, arbitrary: fc.constant('') }, { weight: 1, arbitrary: odd });
  return fc.tuple(...known, extra).map((pairs) => {
    const text = pairs.filter((pair) => pair !== '').join('&');
    return text === '' ? '' : `?${text}`;
  });
}

const maxBodyLength = 200_000;
const oddJson = fc.oneof(
  fc.constantFrom(
    '',
    ' ',
    'null',
    '[]',
    '""',
    '0',
    '{',
    '}',
    '{"a":}',
    "{'a':1}",
    '{"a":1}{"b":2}',
    '\ufeff{}',
    '\0',
  ),
  fc.constantFrom(
    '{"__proto__":{"admin":true}}',
    '{"constructor":{"prototype":{"admin":true}}}',
    '{"name":1e999}',
  ),
  fc.constantFrom(
    '['.repeat(20_000),
    `${'['.repeat(5000)}${']'.repeat(5000)}`,
    `{"name":"${longText}"}`,
    '{"a":"\ud800"}',
  ),
  fc.string({ unit: 'binary', maxLength: 100 }),
);
const oddTypes = [
  'text/plain',
  'application/x-www-form-urlencoded',
  'multipart/form-data; boundary=x',
  'text/json',
];
const contentType = fc.oneof(
  { weight: 12, arbitrary: fc.constantFrom('application/json', 'application/json; charset=utf-8') },
  {
    weight: 1,
    arbitrary: fc.constantFrom(...oddTypes, 'application/octet-stream', 'x', ';;;', 'application/json;'),
  },
);

/** Bodies of the route with their headers. No image is made of the bytes for one: they are fewer than a sector. */
function bodyOf(name: OperationName): fc.Arbitrary<Pick<Request, 'headers' | 'body'>> {
  const { body: schema, binaryBody } = routes[name] as Route;
  if (binaryBody) {
    const type = fc.constantFrom(
      'application/octet-stream',
      'application/octet-stream',
      'application/json',
      'x/y',
    );
    const bytes = fc.string({ unit: 'binary', maxLength: 100 });
    return fc.tuple(type, bytes).map(([type, body]) => ({ headers: { 'content-type': type }, body }));
  }
  const none = fc.constant({ headers: {}, body: null });
  const odd = fc
    .tuple(contentType, oddJson)
    .map(([type, body]) => ({ headers: { 'content-type': type }, body }));
  if (!schema) return fc.oneof({ weight: 6, arbitrary: none }, { weight: 1, arbitrary: odd });
  const near = fc.tuple(contentType, valuesOf(schema as Schema, true)).map(([type, value]) => ({
    headers: { 'content-type': type },
    // One that is too large may be refused before it is all sent, which is another test.
    body: JSON.stringify(value).slice(0, maxBodyLength),
  }));
  return fc.oneof(
    { weight: 12, arbitrary: near },
    { weight: 2, arbitrary: odd },
    { weight: 1, arbitrary: none },
  );
}

const oddHeaders = fc.oneof(
  { weight: 12, arbitrary: fc.constant({}) },
  {
    weight: 1,
    arbitrary: fc.constantFrom<Record<string, string>>(
      { 'last-event-id': 'NaN' },
      { 'last-event-id': '-1' },
      { 'last-event-id': '9'.repeat(30) },
      { 'content-encoding': 'gzip' },
      { 'accept-encoding': '*;q=0', accept: 'text/html' },
      { 'x-http-method-override': 'DELETE' },
      { 'if-match': '*', range: 'bytes=0-0' },
      { origin: 'https://elsewhere.example', 'access-control-request-method': 'DELETE' },
      { 'sec-websocket-protocol': 'viper.console, bearer.' },
      { cookie: longText },
      { 'x-odd': 'é'.repeat(3000) },
      { authorization: `Bearer ${longText}` },
      { authorization: 'Bearer' },
      { authorization: 'Basic YTpi' },
    ),
  },
);

/** Requests of one route. */
export function requestOf(name: OperationName): fc.Arbitrary<Request> {
  const { method } = endpoints[name];
  const methods = fc.oneof(
    { weight: 30, arbitrary: fc.constant(method as string) },
    {
      weight: 1,
      arbitrary: fc.constantFrom(
        'GET',
        'HEAD',
        'POST',
        'PUT',
        'PATCH',
        'DELETE',
        'OPTIONS',
        'TRACE',
        'PROPFIND',
      ),
    },
  );
  return fc
    .tuple(methods, pathOf(name), queryOf(name), bodyOf(name), oddHeaders)
    .map(([method, path, query, { headers, body }, odd]) => ({
      method,
      path: path + query,
      headers: { ...headers, ...odd },
      body,
    }));
}

// --- bytes that are no HTTP, or nearly

const good =
  'POST /v1/vms HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}';
const nearlyHttp = [
  '\r\n\r\n\r\n',
  'GET\r\n\r\n',
  'GET / HTTP/9.9\r\n\r\n',
  'get /v1/vms HTTP/1.1\r\nhost: x\r\n\r\n',
  'GET /v1/vms HTTP/1.1\r\n\r\n',
  'GET /v1/vms HTTP/1.0\r\n\r\n',
  'GET http://elsewhere/v1/vms HTTP/1.1\r\nhost: x\r\n\r\n',
  'OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n',
  'CONNECT elsewhere:443 HTTP/1.1\r\nhost: elsewhere:443\r\n\r\n',
  'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n',
  'GET /v1/vms HTTP/1.1\r\nhost: x\r\nno colon here\r\n\r\n',
  'GET /v1/vms HTTP/1.1\r\nhost: x\r\nx: a\0b\r\n\r\n',
  `GET /v1/vms HTTP/1.1\r\nhost: x\r\nx: ${'y'.repeat(100_000)}\r\n\r\n`,
  `GET /${'y'.repeat(100_000)} HTTP/1.1\r\nhost: x\r\n\r\n`,
  `GET /v1/vms HTTP/1.1\r\nhost: x\r\n${'x: y\r\n'.repeat(3000)}\r\n`,
  'POST /v1/vms HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n',
  'POST /v1/vms HTTP/1.1\r\nhost: x\r\ncontent-length: 1e9\r\n\r\n',
  'POST /v1/vms HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n{}',
  'POST /v1/vms HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n',
  'POST /v1/vms HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n',
  'POST /v1/vms HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: gzip\r\n\r\n',
  'POST /v1/vms HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n{}',
  'POST /v1/vms HTTP/1.1\r\nhost: x\r\nexpect: something-else\r\ncontent-length: 2\r\n\r\n{}',
  'GET /v1/vms HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n',
  'GET /v1/vms/x/console HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n',
  'GET /v1/vms/x/console HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: !\r\nsec-websocket-version: 99\r\n\r\n',
  'GET /v1/vms HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n\r\n',
  `${good}${good}${good}`,
];

/** What a client that is broken or hostile may write once TLS stands. */
export const garbage: fc.Arbitrary<Buffer> = fc.oneof(
  fc.constantFrom(...nearlyHttp).map((text) => Buffer.from(text, 'latin1')),
  fc.uint8Array({ minLength: 1, maxLength: 300 }).map((bytes) => Buffer.from(bytes)),
  // A good request with a few bytes changed, or cut off.
  fc
    .tuple(
      fc.array(fc.tuple(fc.nat(good.length - 1), fc.nat(255)), { minLength: 1, maxLength: 4 }),
      fc.option(fc.nat(good.length), { nil: good.length }),
    )
    .map(([changes, length]) => {
      const bytes = Buffer.from(good, 'latin1');
      for (const [at, value] of changes) bytes[at] = value;
      return bytes.subarray(0, length);
    }),
);
