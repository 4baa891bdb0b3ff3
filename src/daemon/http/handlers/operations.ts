import { AppError } from '../../../model/errors.ts';
import type { Cloudlet } from '../../cloudlet.ts';
import { streamEvents } from '../event-stream.ts';
import type { Handlers } from '../server.ts';

type Names =
  | 'listOperations'
  | 'getOperation'
  | 'cancelOperation'
  | 'streamEvents'
  | 'listTokens'
  | 'createToken'
  | 'revokeToken';

/** Operations, the event stream and credentials. */
export const operationHandlers = (cloudlet: Cloudlet): Handlers<Names> => ({
  listOperations: ({ query }) => cloudlet.operations.list(query),
  getOperation: async ({ params, query }) => {
    return cloudlet.operations.wait(params.operation, { signal: AbortSignal.timeout(query.waitMs ?? 0) });
  },
  cancelOperation: ({ params }) => cloudlet.operations.cancel(params.operation),
  streamEvents: async ({ query, request, reply }) => {
    const resumed = request.headers['last-event-id'];
    const afterId = resumed === undefined ? query.after : Number(resumed);
    if (afterId !== undefined && !(Number.isSafeInteger(afterId) && afterId >= 0)) {
      throw new AppError(
        'invalid_request',
        `Last-Event-ID is ${String(resumed).slice(0, 50)}, wanted an event id`,
        {
          problems: [],
        },
      );
    }
    await streamEvents(cloudlet, afterId, request, reply);
    return undefined;
  },

  listTokens: ({ query }) => cloudlet.credentials.list(query),
  createToken: ({ body }) => cloudlet.credentials.create(body),
  revokeToken: ({ params }) => {
    cloudlet.credentials.revoke(params.token);
    return undefined;
  },
});
