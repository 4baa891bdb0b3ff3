/** The two halves of a session against a model, without sockets. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { fuzz } from './fuzz.ts';
import { Incoming } from './incoming.ts';
import { Outgoing } from './outgoing.ts';

/** What lies on a connection, in order. */
type Packet =
  | { type: 'data'; offset: number; bytes: Uint8Array }
  | { type: 'end'; offset: number }
  | { type: 'ack'; received: number; limit: number };

type Step =
  | { do: 'write'; lengthBytes: number }
  | { do: 'send'; maxBytes: number }
  | { do: 'deliver' | 'acknowledge' | 'cut' | 'repeat' | 'end' }
  | { do: 'read'; lengthBytes: number; windowBytes: number };

const maxWindowBytes = 3000;
const maxInFlightBytes = 2000;

const anyStep: fc.Arbitrary<Step> = fc.oneof(
  {
    weight: 4,
    arbitrary: fc.record({
      do: fc.constant('write' as const),
      lengthBytes: fc.integer({ min: 1, max: 3000 }),
    }),
  },
  {
    weight: 8,
    arbitrary: fc.record({ do: fc.constant('send' as const), maxBytes: fc.integer({ min: 1, max: 1500 }) }),
  },
  { weight: 10, arbitrary: fc.constant({ do: 'deliver' as const }) },
  { weight: 4, arbitrary: fc.constant({ do: 'acknowledge' as const }) },
  { weight: 2, arbitrary: fc.constant({ do: 'cut' as const }) },
  { weight: 2, arbitrary: fc.constant({ do: 'repeat' as const }) },
  { weight: 1, arbitrary: fc.constant({ do: 'end' as const }) },
  {
    weight: 6,
    arbitrary: fc.record({
      do: fc.constant('read' as const),
      lengthBytes: fc.nat(2000),
      windowBytes: fc.integer({ min: 1, max: maxWindowBytes }),
    }),
  },
);

/** Byte n of the stream. */
const byteAt = (offset: number): number => (offset * 31 + (offset >> 8)) & 0xff;

/** One sender and one receiver, with a connection in each direction that can be cut. */
class World {
  readonly outgoing = new Outgoing(maxInFlightBytes);
  readonly incoming = new Incoming();
  forth: Packet[] = [];
  back: Packet[] = [];
  lastDelivered: Packet | undefined;
  written = 0;
  ended = false;
  received = 0;
  unread = 0;

  constructor() {
    this.incoming.grant(1000);
    this.cut();
  }

  run(step: Step): void {
    switch (step.do) {
      case 'write':
        if (!this.ended) this.write(step.lengthBytes);
        break;
      case 'send':
        this.send(step.maxBytes);
        break;
      case 'deliver':
        this.deliver(this.forth.shift());
        this.deliver(this.back.shift());
        break;
      case 'acknowledge':
        this.acknowledge();
        break;
      case 'cut':
        this.cut();
        break;
      case 'repeat':
        if (this.lastDelivered && this.lastDelivered.type !== 'ack') this.deliver(this.lastDelivered);
        break;
      case 'end':
        this.ended = true;
        this.outgoing.end();
        break;
      case 'read':
        this.read(step.lengthBytes, step.windowBytes);
        break;
    }
    this.check();
  }

  write(lengthBytes: number): void {
    const bytes = Uint8Array.from({ length: lengthBytes }, (_, index) => byteAt(this.written + index));
    this.outgoing.write(bytes);
    this.written += lengthBytes;
  }

  send(maxBytes: number): void {
    const run = this.outgoing.take(maxBytes);
    if (run) {
      // A copy, as on a connection: blocks are used again.
      this.forth.push({ type: 'data', offset: run.offset, bytes: Uint8Array.from(run.bytes) });
    } else if (this.outgoing.endDue) {
      this.forth.push({ type: 'end', offset: this.outgoing.takeEnd() });
    }
  }

  deliver(packet: Packet | undefined): void {
    if (!packet) return;
    this.lastDelivered = packet;
    if (packet.type === 'ack') {
      assert.equal(this.outgoing.acknowledge(packet.received, packet.limit), undefined);
    } else if (packet.type === 'end') {
      assert.equal(this.incoming.end(packet.offset), undefined);
    } else {
      const fresh = this.incoming.take(packet.offset, packet.bytes);
      assert.ok(typeof fresh !== 'string', String(fresh));
      // Exactly once and in order, whatever was sent again.
      for (const byte of fresh) assert.equal(byte, byteAt(this.received++));
      this.unread += fresh.length;
    }
  }

  acknowledge(): void {
    this.back.push({ type: 'ack', received: this.incoming.acknowledgement, limit: this.incoming.limit });
  }

  read(lengthBytes: number, windowBytes: number): void {
    const taken = Math.min(lengthBytes, this.unread);
    this.unread -= taken;
    this.incoming.consume(taken);
    this.incoming.grant(windowBytes);
  }

  /** What is on its way is lost; the handshake of the next connection tells where the receiver is. */
  cut(): void {
    this.forth = [];
    this.back = [];
    this.lastDelivered = undefined;
    assert.equal(this.outgoing.resume(this.incoming.acknowledgement, this.incoming.limit), undefined);
  }

  check(): void {
    assert.ok(
      this.outgoing.unacknowledgedBytes <= maxInFlightBytes,
      'the sender keeps no more than its bound',
    );
    assert.ok(this.unread <= maxWindowBytes, 'the receiver holds no more than the largest window');
    assert.ok(this.received <= this.written);
  }
}

test('bytes arrive exactly once and in order, whatever is cut, late or repeated, and memory is bounded', () => {
  fuzz(
    fc.property(fc.array(anyStep, { maxLength: 300 }), (steps) => {
      const world = new World();
      for (const step of steps) world.run(step);
      // Then the path is good for a while.
      world.run({ do: 'cut' });
      if (!world.ended) world.run({ do: 'end' });
      for (let round = 0; !world.outgoing.endAcknowledged; round += 1) {
        assert.ok(round < 10_000, 'the stream comes to its end');
        for (const each of ['send', 'deliver', 'read', 'acknowledge', 'deliver'] as const) {
          world.run({ do: each, maxBytes: 700, lengthBytes: 5000, windowBytes: 1000 } as Step);
        }
      }
      assert.equal(world.received, world.written);
      assert.equal(world.outgoing.sentBytes, world.written);
      assert.ok(world.incoming.ended);
    }),
    400,
  );
});

test('a receiver that grants without end and never acknowledges gets no more than the bound', () => {
  const outgoing = new Outgoing(1000);
  outgoing.resume(0, Number.MAX_SAFE_INTEGER);
  outgoing.write(Buffer.alloc(5000));
  assert.equal(outgoing.take(5000)?.bytes.length, 1000);
  assert.equal(outgoing.sendableBytes(), 0);
});

test('an acknowledgement of what was not sent, or one that goes back, is refused', () => {
  const outgoing = new Outgoing(1000);
  outgoing.resume(0, 1000);
  outgoing.write(Buffer.alloc(100));
  outgoing.take(60);
  assert.equal(outgoing.acknowledge(61, 1000), 'ack_beyond_sent');
  assert.equal(outgoing.acknowledge(60, 1000), undefined);
  assert.equal(outgoing.acknowledge(59, 1000), 'ack_backwards');
  assert.equal(outgoing.resume(10, 1000), 'ack_backwards');
});

test('what the sender must not send is refused by its name', () => {
  const fresh = () => {
    const incoming = new Incoming();
    incoming.grant(100);
    incoming.take(0, Buffer.alloc(50));
    return incoming;
  };
  assert.equal(fresh().take(51, Buffer.alloc(1)), 'gap');
  assert.equal(fresh().take(50, Buffer.alloc(51)), 'beyond_window');
  assert.equal(fresh().end(51), 'gap');
  assert.equal(fresh().end(49), 'end_before_data');
  const ended = fresh();
  assert.equal(ended.end(50), undefined);
  assert.equal(ended.end(50), undefined);
  assert.equal(ended.end(51), 'end_moved');
  assert.equal(ended.take(50, Buffer.alloc(1)), 'beyond_end');
});

test('of bytes that overlap with known ones only the new part is taken', () => {
  const incoming = new Incoming();
  incoming.grant(100);
  incoming.take(0, Buffer.from('abc'));
  assert.equal(String(incoming.take(1, Buffer.from('bcde'))), 'de');
  assert.equal(String(incoming.take(0, Buffer.from('abcde'))), '');
  assert.equal(incoming.receivedBytes, 5);
});
