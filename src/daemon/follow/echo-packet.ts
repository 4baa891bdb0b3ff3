/**
 * The datagrams by which two cloudlets measure the round trip between them: a nonce goes there and comes back, each
 * way with a MAC by the key of the pair. Who does not have the nonce cannot answer before it has come, so nobody can
 * look nearer than it is; who does not have the key gets no answer, so the echo cannot be used against others. An
 * answer is as long as its question. No I/O here.
 *
 *   0  4 bytes   "VPR1"
 *   4  1 byte    1 question, 2 answer
 *   5  16 bytes  id of the cloudlet that asks
 *  21  16 bytes  nonce
 *  37  16 bytes  HMAC-SHA-256 over bytes 0 to 36, first half
 */
import { createHmac, timingSafeEqual } from 'node:crypto';
import { isUuid, type Uuid } from '../../model/ids.ts';

export const packetBytes = 53;
const magic = Buffer.from('VPR1');
const signedBytes = 37;
const kinds = { question: 1, answer: 2 } as const;

export interface EchoPacket {
  kind: keyof typeof kinds;
  askerId: Uuid;
  /** Hex. */
  nonce: string;
}

export function encodePacket({ kind, askerId, nonce }: EchoPacket, key: Buffer): Buffer {
  const packet = Buffer.alloc(packetBytes);
  magic.copy(packet);
  packet[4] = kinds[kind];
  packet.write(askerId.replaceAll('-', ''), 5, 'hex');
  packet.write(nonce, 21, 'hex');
  macOf(packet, key).copy(packet, signedBytes);
  return packet;
}

/**
 * The packet if it is one and bears the MAC of the key that `keyOf` knows for the asker; undefined for anything else,
 * which deserves no answer.
 */
export function decodePacket(
  bytes: Buffer,
  keyOf: (askerId: Uuid, kind: EchoPacket['kind']) => Buffer | undefined,
): EchoPacket | undefined {
  if (bytes.length !== packetBytes || !bytes.subarray(0, 4).equals(magic)) return undefined;
  const kind = bytes[4] === kinds.question ? 'question' : bytes[4] === kinds.answer ? 'answer' : undefined;
  const askerId = uuidOf(bytes.subarray(5, 21));
  const key = kind && isUuid(askerId) ? keyOf(askerId, kind) : undefined;
  if (!kind || !key || !timingSafeEqual(macOf(bytes, key), bytes.subarray(signedBytes))) return undefined;
  return { kind, askerId, nonce: bytes.toString('hex', 21, signedBytes) };
}

/** The key of a pair, which the cloudlet that answers makes anew from its own secret: it keeps no table. */
export const keyFor = (secret: Buffer, askerId: Uuid): Buffer =>
  createHmac('sha256', secret).update(`viper-echo ${askerId}`).digest();

const macOf = (packet: Buffer, key: Buffer): Buffer =>
  createHmac('sha256', key).update(packet.subarray(0, signedBytes)).digest().subarray(0, 16);

const uuidOf = (bytes: Buffer): string =>
  bytes.toString('hex').replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, '$1-$2-$3-$4-$5');
