/**
 * Pages that QEMU reads when it loads the devices of a VM: the rings of each queue of its virtio devices, the option ROM of
 * its interrupt controller, and where the id of its generation stands. In post-copy it would ask for one after the other, a
 * round trip for each, while the VM stands still.
 *
 * Source: QEMU's `virtio_load` (`hw/virtio/virtio.c`), `vmgenid_post_load` (`hw/acpi/vmgenid.c`) and `vapic_post_load`
 * (`hw/i386/vapic.c`); a QEMU 10.0 that had them asked for none while it loaded. What QEMU does not tell (before 7.2, or
 * when its experimental commands change) is not known, and then those pages take their time.
 */
import { AppError } from '../../model/errors.ts';
import { GiB, KiB } from '../../model/units.ts';
import type { QmpConnection } from '../../qmp/index.ts';
import { type BlockTable, pageBytes } from '../../stream/index.ts';
import type { MappedBlock } from './guest-memory.ts';

/** Guest-physical. */
interface Area {
  address: number;
  bytes: number;
}

/** Where memory lies that is in one piece for the guest: its address and that of the same byte in a block. */
interface Anchor {
  address: number;
  block: string;
  byte: number;
}

export interface DevicePages {
  areas: readonly Area[];
  anchors: readonly Anchor[];
}

/** Where the first option ROM of a PC lies: that of `kvmvapic`, since a VM of ours has no other. It has 9 KiB. */
const optionRom: Area = { address: 0xc_0000, bytes: 9 * KiB };
/** On a PC the memory of a guest has a hole that ends here, and is in one piece on either side of it. */
const holeEnd = 4 * GiB;
/** The fields of a section between its name and its content: its instance and its version. */
const versionBytes = 8;
/** As QEMU's sections begin with them: their length, and they. */
const generationName = Buffer.from('\x07vmgenid', 'latin1');

/** It takes some hundred questions, so it is asked while there is time. */
export async function findDevicePages(
  qmp: QmpConnection,
  mapped: readonly MappedBlock[],
): Promise<DevicePages> {
  try {
    const areas = await ringsOf(qmp);
    const sides = [areas.find(isLow), areas.find((area) => !isLow(area))];
    const anchors = await Promise.all(
      sides.flatMap((area) => (area ? [anchorOf(qmp, area.address, mapped)] : [])),
    );
    return { areas, anchors: anchors.flatMap((anchor) => anchor ?? []) };
  } catch (error) {
    if (!(error instanceof AppError)) throw error;
    return { areas: [], anchors: [] };
  }
}

/** Their numbers, each once. `tail`: the state of the devices, of which one has an address that only it knows. */
export function numbersOf({ areas, anchors }: DevicePages, table: BlockTable, tail: Buffer): number[] {
  const numbers = new Set<number>();
  for (const { address, bytes } of [...areas, optionRom, ...generationIn(tail)]) {
    const anchor = anchors.find((one) => isLow(one) === isLow({ address }));
    const block = table.blocks[table.indexOf(anchor?.block ?? '')];
    if (!anchor || !block) continue;
    const from = anchor.byte + address - anchor.address;
    if (from < 0 || from + bytes > block.sizeBytes) continue;
    for (let at = Math.floor(from / pageBytes); at * pageBytes < from + bytes; at++)
      numbers.add(block.firstPage + at);
  }
  return [...numbers];
}

/** Descriptors, and the rings of what is available and what was used. Sizes: virtio 1.2, section 2.7. */
async function ringsOf(qmp: QmpConnection): Promise<Area[]> {
  const areas: Area[] = [];
  for (const { path } of await qmp.execute('x-query-virtio')) {
    const { 'num-vqs': queues } = await qmp.execute('x-query-virtio-status', { path });
    for (let queue = 0; queue < queues; queue++) {
      const ring = await qmp.execute('x-query-virtio-queue-status', { path, queue });
      const size = ring['vring-num'];
      // One that the guest has not set up.
      if (ring['vring-desc'] === 0) continue;
      areas.push(
        { address: ring['vring-desc'], bytes: 16 * size },
        { address: ring['vring-avail'], bytes: 6 + 2 * size },
        { address: ring['vring-used'], bytes: 6 + 8 * size },
      );
    }
  }
  return areas;
}

async function anchorOf(
  qmp: QmpConnection,
  address: number,
  mapped: readonly MappedBlock[],
): Promise<Anchor | undefined> {
  const line = `gpa2hva 0x${address.toString(16)}`;
  const text = await qmp.execute('human-monitor-command', { 'command-line': line });
  const [, name, host] = /\((.+)\) is (0x[0-9a-f]+)/.exec(text) ?? [];
  const block = mapped.find((one) => one.name === name);
  return block && { address, block: block.name, byte: Number(host) - block.address };
}

/** The address is all that the section has: little-endian, as the guest wrote it; 0 where it has written none. */
function generationIn(tail: Buffer): Area[] {
  const at = tail.indexOf(generationName) + generationName.length + versionBytes;
  if (!tail.includes(generationName) || at + 8 > tail.length) return [];
  const address = Number(tail.readBigUInt64LE(at));
  return address === 0 ? [] : [{ address, bytes: 1 }];
}

const isLow = ({ address }: { address: number }): boolean => address < holeEnd;
