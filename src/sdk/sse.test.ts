import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { ViperError } from './errors.ts';
import { EventStreamParser, type StreamMessage } from './sse.ts';

const encode = (text: string) => new TextEncoder().encode(text);

function parse(bytes: Uint8Array, cuts: number[] = []): StreamMessage[] {
  const parser = new EventStreamParser();
  const ends = [...cuts, bytes.length].sort((a, b) => a - b);
  let start = 0;
  return ends.flatMap((end) => {
    const piece = bytes.subarray(start, end);
    start = end;
    return parser.push(piece);
  });
}

const stream =
  '\uFEFF: viper\n\nid: 7\nevent: vm.started\ndata: {"name":"größe"}\n\n' +
  'retry: 1500\r\nid:8\r\ndata: one\r\ndata:  two\r\n\r\n: alive\r\rdata\rid\r\runknown: x\nevent: lost\n\n' +
  'data: three\n\ndata: never ended';
const messages: StreamMessage[] = [
  { id: '7', event: 'vm.started', data: '{"name":"größe"}' },
  { id: '8', event: 'message', data: 'one\n two' },
  { id: '', event: 'message', data: '' },
  { id: '', event: 'message', data: 'three' },
];

test('a stream gives its messages whatever line ends it uses', () => {
  assert.deepEqual(parse(encode(stream)), messages);
});

test('every way to cut a stream in two gives the same messages', () => {
  const bytes = encode(stream);
  for (let cut = 0; cut <= bytes.length; cut += 1) assert.deepEqual(parse(bytes, [cut]), messages);
});

test('a stream byte by byte, with empty pieces between, gives the same messages', () => {
  const bytes = encode(stream);
  const cuts = Array.from(bytes, (_, index) => [index, index]).flat();
  assert.deepEqual(parse(bytes, cuts), messages);
});

test('any text in any pieces gives what it gives in one piece', () => {
  const lines = fc.constantFrom(
    'id: 1',
    'data: a',
    'data',
    'event: e',
    ':',
    'retry: 5',
    'x',
    '',
    'ü€😀',
    ' : ',
  );
  const ends = fc.constantFrom('\n', '\r', '\r\n');
  const texts = fc.array(fc.tuple(lines, ends), { maxLength: 12 }).map((all) => all.flat().join(''));
  fc.assert(
    fc.property(texts, fc.array(fc.nat(100), { maxLength: 8 }), (text, cuts) => {
      const bytes = encode(text);
      const inside = cuts.filter((cut) => cut <= bytes.length);
      assert.deepEqual(parse(bytes, inside), parse(bytes));
    }),
  );
});

test('the wait that the server asks for and the last id are known', () => {
  const parser = new EventStreamParser();
  parser.push(encode('retry: 250\nid: 12\n\nretry: soon\n\n'));
  assert.equal(parser.retryMs, 250);
  assert.equal(parser.lastId, '12');
});

test('a line or a message beyond the bound is refused', () => {
  const tooLong = (text: string) => () => new EventStreamParser({ maxLength: 20 }).push(encode(text));
  const refused = (error: unknown) => error instanceof ViperError && error.code === 'bad_reply';
  assert.throws(tooLong('data: aaaaaaaaaaaaaaaaaaaaaaaaaaaa'), refused);
  assert.throws(tooLong('data: aaaaaaaaaa\ndata: aaaaaaaaaa\ndata: a\n'), refused);
  assert.doesNotThrow(tooLong('data: aaaaaaaa\n\ndata: aaaaaaaa\n\n'));
});

test('the id of a message that is cut off does not count', () => {
  const parser = new EventStreamParser();
  parser.push(encode('id: 4\ndata: whole\n\nid: 5\ndata: ha'));
  assert.equal(parser.lastId, '4');
});
