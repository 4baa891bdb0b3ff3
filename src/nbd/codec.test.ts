import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { AppError } from '../model/errors.ts';
import { type Answer, type Command, NbdClientCodec } from './client-codec.ts';
import { commandFlag, type ExportInfo, maxPayloadBytes, optionMagic, transmissionFlag } from './protocol.ts';
import { type NbdRequest, NbdServerCodec } from './server-codec.ts';

const info: ExportInfo = {
  sizeBytes: 1_000_000,
  flags: transmissionFlag.hasFlags | transmissionFlag.sendFlush,
  minBlockBytes: 1,
  preferredBlockBytes: 4096,
  maxPayloadBytes: 100_000,
};
const isRefusal = (error: unknown): boolean => error instanceof AppError && error.code === 'qemu_failed';

/** Both codecs with what each has sent and not yet given to the other. */
class Pair {
  readonly toServer: Buffer[] = [];
  readonly toClient: Buffer[] = [];
  readonly requests: NbdRequest[] = [];
  readonly answers: Answer[] = [];
  ready: (ExportInfo & { hasAllocation: boolean }) | undefined;
  hasEnded = false;
  readonly server: NbdServerCodec;
  readonly client: NbdClientCodec;

  constructor(name = 'disk') {
    this.server = new NbdServerCodec(
      { name: 'disk', info },
      {
        send: (bytes) => this.toClient.push(bytes),
        request: (request) => this.requests.push(request),
        end: () => {
          this.hasEnded = true;
        },
      },
    );
    this.client = new NbdClientCodec(name, {
      send: (bytes) => this.toServer.push(bytes),
      ready: (each) => {
        this.ready = each;
      },
      answer: (answer) => this.answers.push(answer),
    });
  }

  /** Carries bytes in chunks of this size until there are none. */
  carry(chunkBytes: number): void {
    while (this.toServer.length > 0 || this.toClient.length > 0) {
      for (const chunk of chunks(this.toServer.splice(0), chunkBytes)) this.server.push(chunk);
      for (const chunk of chunks(this.toClient.splice(0), chunkBytes)) this.client.push(chunk);
    }
  }
}

function* chunks(parts: Buffer[], chunkBytes: number): Iterable<Buffer> {
  const all = Buffer.concat(parts);
  for (let at = 0; at < all.length; at += chunkBytes) yield all.subarray(at, at + chunkBytes);
}

const range = { offset: fc.nat({ max: 900_000 }), lengthBytes: fc.integer({ min: 1, max: 3000 }) };
const anyCommand: fc.Arbitrary<Command> = fc.oneof(
  fc.record({ command: fc.constantFrom('read' as const, 'trim' as const, 'blockStatus' as const), ...range }),
  fc.record({
    command: fc.constant('writeZeroes' as const),
    flags: fc.constantFrom(0, commandFlag.noHole | commandFlag.fastZero),
    ...range,
  }),
  fc.record({
    command: fc.constant('write' as const),
    flags: fc.constantFrom(0, commandFlag.fua),
    offset: range.offset,
    payload: fc.uint8Array({ minLength: 1, maxLength: 3000 }).map((bytes) => Buffer.from(bytes)),
  }),
  fc.constant({ command: 'flush' as const }),
);

test('both ends agree on an export and understand each other, however the bytes are cut', () => {
  const commands = fc.array(fc.record({ asked: anyCommand, fails: fc.boolean() }), { maxLength: 12 });
  fc.assert(
    fc.property(commands, fc.constantFrom(1, 2, 3, 7, 1000, 1e6), (script, chunkBytes) => {
      const pair = new Pair();
      pair.carry(chunkBytes);
      assert.deepEqual(pair.ready, { ...info, hasAllocation: true });
      const cookies = script.map(({ asked }) => {
        const { cookie, bytes } = pair.client.encode(asked);
        pair.toServer.push(...bytes);
        return cookie;
      });
      pair.carry(chunkBytes);
      assert.deepEqual(
        pair.requests.map(({ command, flags, offset, payload }) => ({ command, flags, offset, payload })),
        script.map(({ asked: { command, flags = 0, offset = 0, payload } }) => ({
          command,
          flags,
          offset,
          payload,
        })),
      );
      const data = (request: NbdRequest) => Buffer.alloc(request.lengthBytes, request.offset % 251);
      const extents = [
        { lengthBytes: 512, flags: 3 },
        { lengthBytes: 7, flags: 0 },
      ];
      // The answers come in another order than the requests.
      for (const [i, request] of [...pair.requests.entries()].reverse()) {
        if (script[i]!.fails) pair.toClient.push(pair.server.error(request, 'ENOSPC', 'it is full'));
        else if (request.command === 'read') pair.toClient.push(...pair.server.data(request, data(request)));
        else if (request.command === 'blockStatus') pair.toClient.push(pair.server.status(request, extents));
        else pair.toClient.push(pair.server.ok(request));
      }
      pair.carry(chunkBytes);
      assert.equal(pair.client.waiting, 0);
      for (const [i, { asked, fails }] of script.entries()) {
        const answer = pair.answers.find(({ cookie }) => cookie === cookies[i])!;
        if (answer.error) assert.deepEqual([fails, answer.error.nbdCode], [true, 'ENOSPC']);
        else {
          assert.equal(fails, false);
          if (asked.command === 'read') assert.deepEqual(answer.data, data(pair.requests[i]!));
          if (asked.command === 'blockStatus') assert.deepEqual(answer.extents, extents);
        }
      }
      pair.toServer.push(...pair.client.encode({ command: 'disconnect' }).bytes);
      pair.carry(chunkBytes);
      assert.ok(pair.hasEnded);
    }),
  );
});

test('a client that wants another export is refused by name', () => {
  const pair = new Pair('another');
  assert.throws(
    () => pair.carry(1000),
    (error) => isRefusal(error) && /another/.test((error as Error).message),
  );
});

const request = (command: number, lengthBytes: number, offset = 0n): Buffer => {
  const head = Buffer.alloc(28);
  head.writeUInt32BE(0x25609513, 0);
  head.writeUInt16BE(command, 6);
  head.writeBigUInt64BE(offset, 16);
  head.writeUInt32BE(lengthBytes, 24);
  return head;
};

test('what goes beyond the bounds ends the connection before its bytes are taken', () => {
  const option = Buffer.alloc(16);
  option.writeBigUInt64BE(optionMagic, 0);
  option.writeUInt32BE(6, 8);
  option.writeUInt32BE(2 ** 31, 12);
  const early = new NbdServerCodec({ name: 'disk', info }, { send() {}, request() {}, end() {} });
  assert.throws(() => early.push(Buffer.concat([Buffer.from([0, 0, 0, 3]), option])), isRefusal);
  const many = new NbdServerCodec({ name: 'disk', info }, { send() {}, request() {}, end() {} });
  option.writeUInt32BE(0, 12);
  many.push(Buffer.from([0, 0, 0, 3]));
  assert.throws(() => {
    for (let i = 0; i < 40; i += 1) many.push(option);
  }, isRefusal);
  for (const bad of [
    request(0, info.maxPayloadBytes + 1),
    request(1, maxPayloadBytes + 1),
    request(99, 0),
    request(0, 1, 2n ** 63n),
    Buffer.alloc(28),
  ]) {
    const pair = new Pair();
    pair.carry(1e6);
    assert.throws(() => pair.server.push(bad), isRefusal);
    assert.equal(pair.requests.length, 0);
  }
});

const seed = Number(process.env.SEED ?? Date.now() % 2 ** 31);

test('random bytes and flipped bits never do more than be refused, at either end', () => {
  console.log(`fuzz seed ${seed} (repeat with SEED=${seed})`);
  const flips = fc.array(fc.record({ at: fc.nat({ max: 5000 }), bit: fc.nat({ max: 7 }) }), { maxLength: 3 });
  const property = fc.property(
    flips,
    fc.uint8Array({ maxLength: 200 }),
    fc.boolean(),
    (bits, tail, isServer) => {
      // A whole conversation is recorded, then one side hears it changed.
      const pair = new Pair();
      const heard: Buffer[] = [];
      const record = (parts: Buffer[]) => {
        const bytes = Buffer.concat(parts.splice(0));
        if (bytes.length > 0) heard.push(Buffer.from(bytes));
        return bytes;
      };
      const carry = () => {
        while (pair.toServer.length + pair.toClient.length > 0) {
          pair.server.push(isServer ? record(pair.toServer) : Buffer.concat(pair.toServer.splice(0)));
          pair.client.push(isServer ? Buffer.concat(pair.toClient.splice(0)) : record(pair.toClient));
        }
      };
      carry();
      for (const command of ['read', 'write', 'blockStatus'] as const) {
        const payload = command === 'write' ? { payload: Buffer.alloc(600, 7) } : {};
        pair.toServer.push(
          ...pair.client.encode({ command, offset: 512, lengthBytes: 600, ...payload }).bytes,
        );
      }
      carry();
      for (const each of pair.requests.splice(0)) {
        if (each.command === 'read') pair.toClient.push(...pair.server.data(each, Buffer.alloc(600, 3)));
        else if (each.command === 'write') pair.toClient.push(pair.server.ok(each));
        else pair.toClient.push(pair.server.status(each, [{ lengthBytes: 600, flags: 0 }]));
      }
      carry();
      const bytes = Buffer.concat([...heard, tail]);
      for (const { at, bit } of bits) bytes[at % bytes.length]! ^= 1 << bit;
      const victim = new Pair();
      try {
        if (isServer) victim.server.push(bytes);
        else {
          for (const command of ['read', 'write', 'blockStatus'] as const)
            victim.client.encode({ command, offset: 512, lengthBytes: 600 });
          victim.client.push(bytes);
        }
      } catch (error) {
        assert.ok(isRefusal(error), String(error));
      }
      assert.ok(victim.server.heldBytes <= bytes.length);
    },
  );
  fc.assert(property, { seed, numRuns: 1500 });
});

test('a read whose parts do not cover it, overlap it or lie outside of it is refused', () => {
  const chunk = (at: number, bytes: number, isLast: boolean): Buffer => {
    const head = Buffer.alloc(28);
    head.writeUInt32BE(0x668e33ef, 0);
    head.writeUInt16BE(isLast ? 1 : 0, 4);
    head.writeUInt16BE(1, 6);
    head.writeBigUInt64BE(1n, 8);
    head.writeUInt32BE(8 + bytes, 16);
    head.writeBigUInt64BE(BigInt(at), 20);
    return Buffer.concat([head, Buffer.alloc(bytes, 9)]);
  };
  const read = (...parts: Buffer[]) => {
    const pair = new Pair();
    pair.carry(1e6);
    pair.client.encode({ command: 'read', offset: 1000, lengthBytes: 100 });
    pair.client.push(Buffer.concat(parts));
    return pair.answers;
  };
  assert.equal(read(chunk(1050, 50, false), chunk(1000, 50, true)).length, 1);
  for (const parts of [
    [chunk(1000, 50, true)],
    [chunk(1000, 60, false), chunk(1040, 60, true)],
    [chunk(999, 100, true)],
    [chunk(1050, 51, true)],
    [chunk(1000, 101, true)],
  ])
    assert.throws(() => read(...parts), isRefusal);
});
