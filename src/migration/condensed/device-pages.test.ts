import assert from 'node:assert/strict';
import { test } from 'node:test';
import { AppError } from '../../model/errors.ts';
import { GiB, MiB } from '../../model/units.ts';
import type { QmpConnection } from '../../qmp/index.ts';
import { BlockTable, pageBytes } from '../../stream/index.ts';
import { findDevicePages, numbersOf } from './device-pages.ts';

const ramAddress = 0x7f70_0000_0000;
const mapped = [
  { name: 'pc.bios', sizeBytes: MiB, address: 0x7f60_0000_0000 },
  { name: 'pc.ram', sizeBytes: 5 * GiB, address: ramAddress },
];
const table = new BlockTable(mapped);
/** Where this guest has its hole; above it memory goes on at 4 GiB. */
const lowBytes = 2 * GiB;
const first = MiB / pageBytes;
const optionRom = [0xc0, 0xc1, 0xc2].map((page) => first + page);

interface Ring {
  'vring-num': number;
  'vring-desc': number;
  'vring-avail': number;
  'vring-used': number;
}
/** Replies as QEMU 10.0 gives them. */
function answering(devices: Record<string, Ring[]>): QmpConnection {
  const execute = async (command: string, args: { path: string; queue: number; 'command-line': string }) => {
    if (command === 'x-query-virtio') return Object.keys(devices).map((path) => ({ path, name: path }));
    if (command === 'x-query-virtio-status') return { 'num-vqs': devices[args.path]!.length };
    if (command === 'x-query-virtio-queue-status') return devices[args.path]![args.queue];
    const address = Number(args['command-line'].split(' ')[1]);
    const byte = address < lowBytes ? address : address - 4 * GiB + lowBytes;
    return `Host virtual address for 0x${address.toString(16)} (pc.ram) is 0x${(ramAddress + byte).toString(16)}\r\n`;
  };
  return { execute } as unknown as QmpConnection;
}
const ring = (num: number, desc: number, avail: number, used: number): Ring => ({
  'vring-num': num,
  'vring-desc': desc,
  'vring-avail': avail,
  'vring-used': used,
});
/** As QEMU writes it: between two other sections. */
const generation = (address: number): Buffer => {
  const head = Buffer.from('0400000027', 'hex');
  const fields = Buffer.alloc(16);
  fields.writeUInt32BE(1, 4);
  fields.writeBigUInt64LE(BigInt(address), 8);
  return Buffer.concat([head, Buffer.from('\x07vmgenid'), fields, Buffer.from('7e00000027', 'hex')]);
};

test('the pages are those of all rings that the guest has set up, on both sides of the hole', async () => {
  const qmp = answering({
    blk: [ring(256, 0x5a7c000, 0x5a7d000, 0x5a7d240)],
    serial: [ring(128, 0x563c800, 0x563d000, 0x563dff0), ring(128, 0, 0, 0)],
    net: [ring(256, 4 * GiB + 0x3000, 4 * GiB + 0x4000, 4 * GiB + 0x4240)],
  });
  const found = await findDevicePages(qmp, mapped);
  const high = lowBytes / pageBytes;
  // One of them has a used ring of 1030 bytes that begins 16 bytes before the end of a page.
  const wanted = [0x563c, 0x563d, 0x563e, 0x5a7c, 0x5a7d, high + 3, high + 4].map((page) => first + page);
  assert.deepEqual(numbersOf(found, table, Buffer.alloc(0)).sort(byNumber), [...optionRom, ...wanted]);
});

test('the tail has the address of the generation, if the guest has given it one', async () => {
  const found = await findDevicePages(answering({ rng: [ring(8, 0x5000, 0x5080, 0x50c0)] }), mapped);
  const numbers = (tail: Buffer) => numbersOf(found, table, tail).sort(byNumber);
  const without = [first + 5, ...optionRom];
  assert.deepEqual(numbers(generation(0x7fff028)), [...without, first + 0x7fff]);
  assert.deepEqual(numbers(generation(0)), without);
  assert.deepEqual(numbers(generation(2 ** 52)), without, 'an address outside of all memory');
  assert.deepEqual(numbers(generation(0x7fff028).subarray(0, 20)), without, 'a tail that is cut short');
});

test('of a QEMU that does not know the commands nothing is known', async () => {
  const execute = async () => {
    throw new AppError('qemu_failed', 'The command x-query-virtio has not been found', {
      qmpClass: 'CommandNotFound',
    });
  };
  const found = await findDevicePages({ execute } as unknown as QmpConnection, mapped);
  assert.deepEqual(numbersOf(found, table, generation(0x7fff028)), []);
});

const byNumber = (a: number, b: number): number => a - b;
