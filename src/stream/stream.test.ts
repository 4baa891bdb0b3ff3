import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import type { AppError } from '../model/errors.ts';
import { golden, modes, Rewriter, versions } from './golden.ts';
import {
  AnswerParser,
  BlockTable,
  beginSection,
  commandBytes,
  devicesOf,
  encodeAnswer,
  eof,
  PageWriter,
  pageBytes,
  type Refusal,
  refusals,
  StreamParser,
  sectionEnd,
  startSection,
} from './index.ts';

const captures = versions.flatMap((version) => modes.map((mode) => ({ version, mode })));

/** What is read of the pieces, written again. */
function rewritten(pieces: Iterable<Uint8Array>): Buffer {
  const rewriter = new Rewriter();
  const parser = new StreamParser(rewriter);
  for (const piece of pieces) parser.push(piece);
  parser.end();
  return rewriter.bytes;
}

const reasonOf = (act: () => void): Refusal | undefined => {
  try {
    act();
    return undefined;
  } catch (error) {
    const reason = (error as AppError).details?.reason as Refusal;
    assert.ok(reason in refusals, `not a refusal: ${error}`);
    return reason;
  }
};

for (const { version, mode } of captures) {
  test(`a ${mode} of QEMU ${version} is read and written again byte by byte`, () => {
    const stream = golden(version, mode);
    assert.ok(rewritten([stream]).equals(stream));
  });
}

test('however a stream is cut into pieces, the same is read', () => {
  for (const mode of modes) {
    const stream = golden('10.0', mode);
    fc.assert(
      fc.property(fc.array(fc.integer({ min: 1, max: 9000 }), { minLength: 1, maxLength: 20 }), (sizes) => {
        const pieces: Buffer[] = [];
        for (let at = 0, turn = 0; at < stream.length; turn++) {
          const size = sizes[turn % sizes.length]!;
          pieces.push(stream.subarray(at, at + size));
          at += size;
        }
        assert.ok(rewritten(pieces).equals(stream));
      }),
      { numRuns: 20 },
    );
  }
});

test('fed with single bytes, a stream is the same, and no end before its tail is taken for a good one', () => {
  for (const mode of ['precopy', 'postcopy']) {
    const stream = golden('10.0', mode);
    const rewriter = new Rewriter();
    const parser = new StreamParser(rewriter);
    let goodEnds = 0;
    for (let at = 0; at < stream.length; at++) {
      parser.push(stream.subarray(at, at + 1));
      if (reasonOf(() => parser.end()) === undefined) goodEnds++;
      else assert.equal(goodEnds, 0);
    }
    assert.ok(goodEnds >= 1);
    assert.ok(rewriter.bytes.equals(stream));
  }
});

test('the devices of a pre-copy lie between its pages and its description, and a cut tail has none', () => {
  for (const version of versions) {
    const tail: Buffer[] = [];
    const parser = new StreamParser({ tail: (bytes) => tail.push(Buffer.from(bytes)) });
    parser.push(golden(version, 'precopy'));
    const whole = Buffer.concat(tail);
    const devices = devicesOf(whole);
    assert.equal(devices[0], 4);
    assert.equal(whole[devices.length], 0);
    for (let length = 0; length < whole.length; length += 97)
      assert.equal(
        reasonOf(() => devicesOf(whole.subarray(0, length))),
        'truncated',
      );
  }
});

test('a flipped bit is refused, or changes nothing but what it says', () => {
  const stream = golden('10.0', 'postcopy').subarray(0, 60_000);
  fc.assert(
    fc.property(fc.nat(stream.length - 1), fc.nat(7), (at, bit) => {
      const changed = Buffer.from(stream);
      changed[at]! ^= 1 << bit;
      const rewriter = new Rewriter();
      const parser = new StreamParser(rewriter);
      // A name of the machine, say, may be anything.
      const reason = reasonOf(() => parser.push(changed));
      const written = rewriter.bytes;
      if (reason === undefined) return;
      assert.ok(written.length <= changed.length + 16);
    }),
    { numRuns: 2000 },
  );
});

test('any bytes are refused or waited for, but never break the parser', () => {
  const head = golden('10.0', 'precopy').subarray(0, 200);
  fc.assert(
    fc.property(
      fc.nat(head.length),
      fc.array(
        fc.oneof(
          fc.uint8Array({ maxLength: 40 }),
          fc.constantFrom(Uint8Array.of(1), Uint8Array.of(2, 0, 0, 0, 2), Uint8Array.of(8, 0, 7)),
        ),
        { maxLength: 20 },
      ),
      (kept, pieces) => {
        const parser = new StreamParser(new Rewriter());
        reasonOf(() => {
          parser.push(head.subarray(0, kept));
          for (const piece of pieces) parser.push(piece);
        });
      },
    ),
    { numRuns: 2000 },
  );
});

const table = new BlockTable([
  { name: 'pc.ram', sizeBytes: 16 * pageBytes },
  { name: 'pc.rom', sizeBytes: 4 * pageBytes },
]);
const opening = Buffer.from('5145564d00000003', 'hex');

/** A stream up to just behind its table of blocks. */
function begun(): { parser: StreamParser; rewriter: Rewriter } {
  const rewriter = new Rewriter();
  const parser = new StreamParser(rewriter);
  parser.push(opening);
  parser.push(startSection(2, table));
  return { parser, rewriter };
}

const record = (offset: bigint, rest: number[]): Buffer => {
  const head = Buffer.alloc(8);
  head.writeBigUInt64BE(offset);
  return Buffer.concat([head, Buffer.from(rest)]);
};

test('each reason to refuse a stream is met', () => {
  const met = new Map<Refusal, string>();
  const refuse = (what: string, bytes: Buffer, parser = new StreamParser({})): void => {
    const reason = reasonOf(() => parser.push(bytes));
    assert.ok(reason, what);
    met.set(reason, what);
  };
  const after = (bytes: Buffer) => [bytes, begun().parser] as const;
  refuse('another magic', Buffer.from('5145564e0000000300', 'hex'));
  refuse('kind 9', ...after(Buffer.of(9)));
  refuse('a second ram', ...after(startSection(3, table)));
  const other = Buffer.from(startSection(2, table));
  other[16] = 5;
  refuse('ram version', Buffer.concat([opening, other]));
  refuse('section id', ...after(beginSection('part', 7)));
  const part = beginSection('part', 2);
  refuse('xbzrle', ...after(Buffer.concat([part, record(0x40n, [])])));
  refuse('a page of no block', ...after(Buffer.concat([part, record(0x28n, [])])));
  refuse(
    'beyond the block',
    ...after(Buffer.concat([part, record(0x10002n, [6, ...Buffer.from('pc.ram'), 0])])),
  );
  refuse('command 99', ...after(commandBytes(99)));
  refuse('package', ...after(commandBytes(7, Buffer.of(255, 255, 255, 255))));
  const odd = Buffer.from(startSection(2, table));
  odd[odd.indexOf('pc.rom') + 13] = 1;
  refuse('a block of 1 byte more', Buffer.concat([opening, odd]));
  met.set(reasonOf(() => begun().parser.end())!, 'end');
  met.set(reasonOf(() => new AnswerParser(1).push(Buffer.of(0, 9, 0, 0)))!, 'answer');
  assert.deepEqual([...met.keys()].sort(), Object.keys(refusals).sort());
});

test('after a refusal nothing is taken any more', () => {
  const { parser } = begun();
  assert.equal(
    reasonOf(() => parser.push(Buffer.of(9))),
    'section',
  );
  assert.equal(
    reasonOf(() => parser.push(eof())),
    'section',
  );
});

test('pages that are written are the pages that are read, in any order', () => {
  const page = fc.record({ page: fc.nat(table.pages - 1), fill: fc.nat(255) }, { noNullPrototype: true });
  fc.assert(
    fc.property(fc.array(page, { maxLength: 40 }), (pages) => {
      const read: { page: number; fill: number }[] = [];
      const parser = new StreamParser({
        page: (number, buffer, at) => read.push({ page: number, fill: buffer[at + pageBytes - 1]! }),
        zeroPage: (number) => read.push({ page: number, fill: 0 }),
      });
      const writer = new PageWriter(table);
      const to = Buffer.alloc(PageWriter.maxBytes);
      parser.push(opening);
      parser.push(startSection(2, table));
      parser.push(beginSection('part', 2));
      for (const { page, fill } of pages) {
        const content = Buffer.alloc(pageBytes, fill);
        const end = fill === 0 ? writer.zeroPage(to, 0, page) : writer.page(to, 0, page, content, 0);
        parser.push(to.subarray(0, end));
      }
      parser.push(sectionEnd(2));
      assert.deepEqual(read, pages);
    }),
  );
});

test('what goes back from a destination is read and written again', () => {
  for (const version of versions)
    for (const mode of ['postcopy', 'hybrid']) {
      const stream = golden(version, mode, 'back');
      const answers = new AnswerParser(4096).push(stream);
      assert.deepEqual(answers.at(-1), { name: 'shut', value: 0 });
      assert.ok(Buffer.concat(answers.map(encodeAnswer)).equals(stream));
    }
});

test('answers are the same in whatever pieces they come, bitmaps too', () => {
  const answers = [
    { name: 'pong', value: 7 },
    { name: 'request-pages', startByte: 2 ** 33, bytes: 4096, blockName: 'pc.ram' },
    { name: 'request-pages', startByte: 8192, bytes: 4096 },
    { name: 'received-bitmap', blockName: 'pc.ram', bits: Buffer.from('0102030405060708', 'hex') },
    { name: 'resume-ack', value: 1 },
    { name: 'switchover-ack' },
  ] as const;
  const bytes = Buffer.concat(answers.map(encodeAnswer));
  const parser = new AnswerParser(64);
  const read = [...bytes].flatMap((byte) => parser.push(Uint8Array.of(byte)));
  assert.deepEqual(read, answers);
});

test('a bitmap larger than any block, or without its end mark, is refused', () => {
  const bytes = encodeAnswer({ name: 'received-bitmap', blockName: 'r', bits: Buffer.alloc(64) });
  assert.equal(
    reasonOf(() => new AnswerParser(64).push(bytes)),
    'length',
  );
  bytes[bytes.length - 1]! ^= 1;
  assert.equal(
    reasonOf(() => new AnswerParser(512).push(bytes)),
    'answer',
  );
});
