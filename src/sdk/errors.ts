/**
 * The one error that the client throws. `code` is either a code of the API (`model/errors.ts`) or one of the
 * two that only a client can meet: nobody answered, or what answered is not a Viper daemon. An aborted call
 * throws the reason of its signal instead, as `fetch` does.
 */
import type { ErrorCode, ErrorDetails } from '../model/errors.ts';

export type ClientErrorCode = 'unreachable' | 'bad_reply';
export type ViperErrorCode = ErrorCode | ClientErrorCode;

export interface ViperErrorFacts {
  details?: ErrorDetails;
  /** Status of the HTTP reply, 0 if there was none. */
  status?: number;
  /** Finds the request in the daemon's log. */
  requestId?: string;
  /** The operation that failed or was waited for. */
  operationId?: string;
  cause?: unknown;
}

export class ViperError extends Error {
  readonly code: ViperErrorCode;
  readonly details: ErrorDetails;
  readonly status: number;
  readonly requestId: string | undefined;
  readonly operationId: string | undefined;

  constructor(code: ViperErrorCode, message: string, facts: ViperErrorFacts = {}) {
    super(message, { cause: facts.cause });
    this.name = 'ViperError';
    this.code = code;
    this.details = facts.details ?? {};
    this.status = facts.status ?? 0;
    this.requestId = facts.requestId;
    this.operationId = facts.operationId;
  }
}

type Json = Record<string, unknown>;
export const isObject = (value: unknown): value is Json =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

/** The refusal that a reply carries, or `bad_reply` if its body is not one of the API's errors. */
export function errorFromReply(action: string, status: number, text: string): ViperError {
  const error = errorOf(text);
  if (!error) {
    const start = text.trim().slice(0, 200);
    return new ViperError(
      'bad_reply',
      `${action} failed with HTTP status ${status} and no Viper error in the reply` +
        `${start ? `: ${start}` : ''}. Does the URL lead to a Viper daemon?`,
      { status },
    );
  }
  // A code of a newer daemon is passed on as it is: `message` and `status` still say enough.
  return new ViperError(error.code as ErrorCode, error.message, {
    status,
    details: isObject(error.details) ? error.details : {},
    ...(typeof error.requestId === 'string' ? { requestId: error.requestId } : {}),
  });
}

function errorOf(text: string): (Json & { code: string; message: string }) | undefined {
  try {
    const body: unknown = JSON.parse(text);
    const error = isObject(body) ? body.error : undefined;
    if (!isObject(error) || typeof error.code !== 'string' || typeof error.message !== 'string') return;
    return { ...error, code: error.code, message: error.message };
  } catch {
    return undefined;
  }
}

const untrusted = 'its certificate is not signed by the CA that this client trusts; pass the CA of its fleet';
/** What to do about a failed connection, by the code that Node gives. Browsers tell no reason at all. */
const mending: Record<string, string> = {
  ECONNREFUSED: 'the connection was refused. Is the daemon running there?',
  ECONNRESET: 'the connection was cut. Did the daemon stop?',
  UND_ERR_SOCKET: 'the connection was cut. Did the daemon stop?',
  EPIPE: 'the connection was cut while the request was sent. Did the daemon stop?',
  ENOTFOUND: 'the host name is not known. Is it spelt right?',
  EAI_AGAIN: 'the host name could not be looked up. Does DNS work here?',
  EHOSTUNREACH: 'there is no route to the host. Check the address and the network.',
  ENETUNREACH: 'there is no route to the network. Check the address and the network.',
  ETIMEDOUT: 'nothing answered in time. Check the address, the port and the firewall.',
  UND_ERR_CONNECT_TIMEOUT: 'nothing answered in time. Check the address, the port and the firewall.',
  UND_ERR_HEADERS_TIMEOUT: 'the daemon accepted the request and never answered. See its log.',
  UND_ERR_BODY_TIMEOUT: 'the daemon stopped in the middle of its answer. See its log.',
  SELF_SIGNED_CERT_IN_CHAIN: untrusted,
  DEPTH_ZERO_SELF_SIGNED_CERT: untrusted,
  UNABLE_TO_VERIFY_LEAF_SIGNATURE: untrusted,
  UNABLE_TO_GET_ISSUER_CERT_LOCALLY: untrusted,
  CERT_SIGNATURE_FAILURE: untrusted,
  CERT_HAS_EXPIRED: 'its certificate has expired. Renew it, and compare the clocks of both machines.',
  CERT_NOT_YET_VALID: 'its certificate is not valid yet. Compare the clocks of both machines.',
  ERR_TLS_CERT_ALTNAME_INVALID:
    'its certificate is for another name. Use the URL under which the cloudlet was made.',
  ERR_SSL_WRONG_VERSION_NUMBER:
    'it does not speak TLS. Should the URL begin with http://, or is the port wrong?',
  ERR_SSL_PACKET_LENGTH_TOO_LONG: 'it does not speak TLS. Is the port wrong?',
  ERR_SSL_TLSV13_ALERT_CERTIFICATE_REQUIRED: 'it wants a client certificate.',
  ERR_SSL_TLSV1_ALERT_UNKNOWN_CA: 'it does not trust the client certificate.',
  FINGERPRINT_MISMATCH:
    'it showed another certificate than the pinned one. Compare the fingerprints by hand.',
};

/** No reply came: `url` is the daemon's. */
export function unreachable(action: string, url: string, cause: unknown): ViperError {
  const reason = causes(cause).find(({ code }) => code !== undefined && code in mending);
  const deepest = causes(cause).at(-1);
  const said = reason
    ? mending[reason.code as string]
    : `${deepest?.message ?? 'no reason was given'}. Is the daemon running there, and is its certificate trusted?`;
  return new ViperError('unreachable', `${action} could not reach ${url}: ${said}`, {
    cause,
    details: { url, ...(reason?.code ? { reason: reason.code } : {}) },
  });
}

/** The error, what caused it and, of an address tried several ways, each attempt. */
function causes(error: unknown, depth = 0): { code?: string; message: string }[] {
  if (!(error instanceof Error) || depth > 5) return [];
  const code = (error as { code?: unknown }).code;
  const parts = error instanceof AggregateError ? error.errors : [];
  return [
    { message: error.message, ...(typeof code === 'string' ? { code } : {}) },
    ...parts.flatMap((part) => causes(part, depth + 1)),
    ...causes(error.cause, depth + 1),
  ];
}
