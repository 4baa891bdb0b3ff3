/** From anything thrown to the one JSON shape of errors. */
import type { IncomingMessage, ServerResponse } from 'node:http';
import type { Socket } from 'node:net';
import type { FastifyError, FastifyReply, FastifyRequest } from 'fastify';
import { AppError, asAppError, type ErrorCode, httpStatus } from '../../model/errors.ts';
import { newId } from '../../model/ids.ts';
import { invalidRequest, problemsOf } from './validation.ts';

const fromFramework: Record<string, ErrorCode> = {
  FST_ERR_CTP_INVALID_MEDIA_TYPE: 'unsupported_media_type',
  FST_ERR_CTP_BODY_TOO_LARGE: 'payload_too_large',
};

function toAppError(error: FastifyError | AppError): AppError {
  if (error instanceof AppError) return error;
  if (error.validation) {
    return invalidRequest(problemsOf(error.validation as never, error.validationContext ?? 'request'));
  }
  const known = fromFramework[error.code];
  if (known) return new AppError(known, `The request was refused: ${error.message}`);
  if (error.statusCode && error.statusCode >= 400 && error.statusCode < 500) {
    return new AppError('invalid_request', `The request was refused: ${error.message}`, { problems: [] });
  }
  return asAppError(error);
}

export const errorBody = (error: AppError, requestId: string) => ({
  error: { code: error.code, message: error.message, details: error.details, requestId },
});

/** Fastify's error handler: answers by code, logs what the caller may not see. */
export function answerError(
  thrown: FastifyError | AppError,
  request: FastifyRequest,
  reply: FastifyReply,
): void {
  const error = toAppError(thrown);
  const status = httpStatus(error.code);
  if (status >= 500)
    request.log.error({ err: thrown, code: error.code, requestId: request.id }, 'request failed');
  // The cause of a bug stays in the log: it may quote what belongs to somebody else.
  const shown =
    error.code === 'internal'
      ? new AppError('internal', 'Unexpected failure; see the log by request id')
      : error;
  if (status === 401) reply.header('www-authenticate', 'Bearer realm="viper"');
  reply.code(status).send(errorBody(shown, request.id));
}

/** Answers bytes that are no request at all, by hand, and ends the connection: nobody knows where the next begins. */
export function answerClientError(error: Error & { code?: string }, socket: Socket): void {
  if (!socket.writable || error.code === 'ECONNRESET') {
    socket.destroy();
    return;
  }
  const refusal = new AppError(
    'invalid_request',
    `The request is not HTTP as it is read here: ${error.code}`,
    {
      problems: [],
    },
  );
  const body = JSON.stringify(errorBody(refusal, newId()));
  // By hand: there is no response object for what was no request.
  socket.end(
    [
      'HTTP/1.1 400 Bad Request',
      'content-type: application/json; charset=utf-8',
      `content-length: ${Buffer.byteLength(body)}`,
      'connection: close',
      '',
      body,
    ].join('\r\n'),
  );
}

/** Node would answer an expectation that nobody has heard of without a body. */
export function answerExpectation(request: IncomingMessage, response: ServerResponse): void {
  const wanted = '100-continue';
  const refusal = new AppError(
    'invalid_request',
    `The request expects ${request.headers.expect}, wanted ${wanted} or nothing`,
    { problems: [{ field: 'headers.expect', value: request.headers.expect, wanted }] },
  );
  response.writeHead(400, { 'content-type': 'application/json; charset=utf-8', connection: 'close' });
  response.end(JSON.stringify(errorBody(refusal, newId())));
}

/** HTTP/1.1 wants it, and Node would refuse its absence without a body. */
export function requireHost({ headers }: FastifyRequest): void {
  if (headers.host !== undefined || headers[':authority'] !== undefined) return;
  throw new AppError('invalid_request', 'The request has no host header', {
    problems: [{ field: 'headers.host', wanted: 'the host that is asked' }],
  });
}
