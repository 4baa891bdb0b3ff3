/** Frames of the link: their kinds, layout and bounds. FORMAT.md explains them byte by byte. */
import { KiB } from '../model/units.ts';
import type { JsonObject } from './json.ts';

/** Why a server does not let a connection carry a session. */
export type RefuseReason = 'untrusted' | 'protocol' | 'unknown_session' | 'stale' | 'too_many' | 'rejected';

/** The first frame of a client: it opens a session or resumes one. */
export interface HelloFrame {
  type: 'hello';
  kind: 'open' | 'resume';
  /** Grows by at least one with each connection of the session, so that an old HELLO is worth nothing. */
  attempt: number;
  /** 32 hex digits. */
  sessionId: string;
  secret: Uint8Array;
  received: number;
  limit: number;
  /** What the session is about; empty when it resumes. */
  metadata: JsonObject;
}

export type Frame =
  | HelloFrame
  | { type: 'welcome'; received: number; limit: number }
  | { type: 'refuse'; reason: RefuseReason; code: string; message: string }
  | { type: 'data'; offset: number; bytes: Uint8Array }
  | { type: 'ack'; received: number; limit: number }
  | { type: 'ping'; token: number }
  | { type: 'pong'; token: number }
  | { type: 'end'; offset: number }
  | { type: 'reset'; code: string; message: string }
  | { type: 'done' };

export const maxDataBytes = 256 * KiB;
export const maxMetadataBytes = 8 * KiB;
export const maxReasonBytes = 2 * KiB;
export const sessionIdBytes = 16;
export const secretBytes = 32;

export const headerBytes = 4;
export const offsetBytes = 8;
/** In front of the bytes of DATA. */
export const dataHeaderBytes = headerBytes + offsetBytes;
export const helloFixedBytes = 1 + 4 + sessionIdBytes + secretBytes + 2 * offsetBytes;

export const frameTypes = [
  'hello',
  'welcome',
  'refuse',
  'data',
  'ack',
  'ping',
  'pong',
  'end',
  'reset',
  'done',
] as const;
export type FrameType = (typeof frameTypes)[number];
export const refuseReasons: readonly RefuseReason[] = [
  'untrusted',
  'protocol',
  'unknown_session',
  'stale',
  'too_many',
  'rejected',
];
export const helloKinds = ['open', 'resume'] as const;

/** The least and the most bytes of a body. */
export const bodyLengths: Record<FrameType, readonly [number, number]> = {
  hello: [helloFixedBytes + 2, helloFixedBytes + maxMetadataBytes],
  welcome: [2 * offsetBytes, 2 * offsetBytes],
  refuse: [3, 1 + maxReasonBytes],
  data: [offsetBytes + 1, offsetBytes + maxDataBytes],
  ack: [2 * offsetBytes, 2 * offsetBytes],
  ping: [4, 4],
  pong: [4, 4],
  end: [offsetBytes, offsetBytes],
  reset: [2, maxReasonBytes],
  done: [0, 0],
};

/** After these the sender says nothing more of the session. */
export type LastFrame = Extract<Frame, { type: 'reset' | 'done' }>;
