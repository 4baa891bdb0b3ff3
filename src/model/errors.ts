/**
 * Every refusal and every expected failure has one of these codes; they are part of the API and never change
 * their meaning. `docs/errors.md` is written from this table (a test compares them). Bugs are not in it: they
 * surface as `internal`.
 */
interface ErrorKind {
  /** The HTTP status that carries it. */
  status: number;
  /** What it means, for the docs page. */
  meaning: string;
  /** What the caller can do about it. */
  remedy: string;
}

export const errorKinds = {
  invalid_request: {
    status: 400,
    meaning: 'A field of the request is missing, unknown or has a value that is not allowed.',
    remedy: '`details.problems` lists each field with its value and what was wanted.',
  },
  unauthenticated: {
    status: 401,
    meaning: 'No credential was shown, or it is unknown, expired or revoked.',
    remedy: 'Send `Authorization: Bearer TOKEN` or a registered client certificate.',
  },
  forbidden: {
    status: 403,
    meaning: 'The credential is good but lacks the scope that the route wants.',
    remedy: '`details.wanted` names the scope; ask an admin for a token that has it.',
  },
  not_found: {
    status: 404,
    meaning: 'There is no such route, VM, image, snapshot, operation, token or peer.',
    remedy: '`details.kind` and `details.name` say what was looked for.',
  },
  name_taken: {
    status: 409,
    meaning: 'Another object of this kind already has the name.',
    remedy: 'Choose another name or remove the other object.',
  },
  wrong_state: {
    status: 409,
    meaning: 'The object is in a state that does not allow the action.',
    remedy: '`details.state` is the state that was met, `details.allowed` what can be done in it.',
  },
  busy: {
    status: 409,
    meaning: 'Another operation is at work on the same VM.',
    remedy: 'Watch `details.operationId` and ask again when it has ended.',
  },
  in_use: {
    status: 409,
    meaning: 'The image or snapshot is still needed by others.',
    remedy: '`details.usedBy` lists them.',
  },
  migration_refused: {
    status: 409,
    meaning: 'The destination cannot take the VM, or the VM cannot leave.',
    remedy: '`details.problems` lists everything that does not fit, with the value and what was wanted.',
  },
  migration_failed: {
    status: 502,
    meaning: 'The migration ended without moving the VM, which is where it was.',
    remedy: '`details` says at which step and why; mend that and ask again.',
  },
  agent_unavailable: {
    status: 409,
    meaning: 'The guest agent in the VM did not answer in time.',
    remedy: 'Wait until the guest has booted; install qemu-guest-agent in the image.',
  },
  payload_too_large: {
    status: 413,
    meaning: 'The request body is larger than the route takes.',
    remedy: 'Send less.',
  },
  unsupported_media_type: {
    status: 415,
    meaning: 'The route does not take a body of this content type.',
    remedy: 'Use the content type that the API document names.',
  },
  image_corrupt: {
    status: 422,
    meaning: 'The image is not a whole, self-contained qcow2 or raw disk.',
    remedy: 'Check the file with `qemu-img check`; flatten images with a backing file by `qemu-img convert`.',
  },
  digest_mismatch: {
    status: 422,
    meaning: 'The bytes that arrived do not have the digest that was announced.',
    remedy: 'Send the file again.',
  },
  unsupported: {
    status: 422,
    meaning:
      'This host cannot do what was asked, for example an accelerator, machine type or network it lacks.',
    remedy: '`details` names what is missing; `GET /v1/cloudlet` shows what the host has.',
  },
  too_many: {
    status: 429,
    meaning: 'A bound of the daemon is reached: operations, event streams or consoles at one time.',
    remedy: 'Wait until some have ended.',
  },
  internal: {
    status: 500,
    meaning: 'A bug in Viper.',
    remedy: 'Report it with `requestId`; the daemon log has the cause under the same id.',
  },
  peer_unreachable: {
    status: 502,
    meaning: 'The other cloudlet does not answer.',
    remedy: 'Check its URL and that its daemon runs.',
  },
  peer_untrusted: {
    status: 502,
    meaning: 'The other cloudlet showed a certificate that is not the pinned one.',
    remedy: 'Compare the fingerprints by hand; make a new join token at the right cloudlet.',
  },
  qemu_failed: {
    status: 502,
    meaning: 'QEMU did not start, died, or refused a command.',
    remedy: '`details.output` has the last lines that QEMU wrote.',
  },
  interrupted: {
    status: 503,
    meaning: 'The daemon stopped while the operation was running.',
    remedy: 'Look at the state of the VM and ask again.',
  },
  cancelled: { status: 503, meaning: 'The operation was cancelled.', remedy: 'Nothing; it was asked for.' },
  timeout: {
    status: 504,
    meaning: 'Something outside the daemon (QEMU, the guest, a peer) took too long.',
    remedy: '`details` names what was waited for and how long.',
  },
  insufficient_space: {
    status: 507,
    meaning: 'The disk of the cloudlet has no room for what would be written.',
    remedy: '`details.wantedBytes` and `details.freeBytes`; remove images, snapshots or VMs.',
  },
  no_free_address: {
    status: 507,
    meaning: 'The network of the cloudlet has no free address for the VM.',
    remedy: '`details` names network and range; stop VMs or give the network a larger range.',
  },
  insufficient_memory: {
    status: 507,
    meaning: 'The host has not enough free memory for the VM.',
    remedy: '`details.wantedBytes` and `details.freeBytes`; stop VMs or take a smaller instance type.',
  },
  state_locked: {
    status: 503,
    meaning: 'Another daemon works on the same state directory.',
    remedy: 'Stop it, or give this one another directory.',
  },
  state_too_new: {
    status: 503,
    meaning: 'The state directory was written by a newer version of Viper.',
    remedy: 'Run that version; an older one must not touch the file.',
  },
  not_initialised: {
    status: 503,
    meaning: 'The state directory holds no cloudlet.',
    remedy: 'Make one with `viper init` or `viper join`.',
  },
} as const satisfies Record<string, ErrorKind>;

export type ErrorCode = keyof typeof errorKinds;
export const errorCodes = Object.keys(errorKinds) as ErrorCode[];

export const httpStatus = (code: ErrorCode): number => errorKinds[code].status;

/** Public facts about an error: plain JSON, no secrets. */
export type ErrorDetails = Record<string, unknown>;

/**
 * The one error class for expected failures. `message` names the failed action, the value it met and what was
 * wanted; `details` goes to the caller as it is; `cause` stays in the log.
 */
export class AppError extends Error {
  readonly code: ErrorCode;
  readonly details: ErrorDetails;

  constructor(
    code: ErrorCode,
    message: string,
    details: ErrorDetails = {},
    options: { cause?: unknown } = {},
  ) {
    super(message, options);
    this.name = 'AppError';
    this.code = code;
    this.details = details;
  }
}

/** The error itself if it is expected, else `internal` with the bug as its cause. */
export function asAppError(error: unknown): AppError {
  if (error instanceof AppError) return error;
  const message = error instanceof Error ? error.message : String(error);
  return new AppError('internal', `Unexpected failure: ${message}`, {}, { cause: error });
}
