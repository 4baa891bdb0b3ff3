/** The live serial console: one WebSocket, binary messages both ways, any number of watchers of one VM. */
import type { FastifyInstance } from 'fastify';
import type { WebSocket } from 'ws';
import { endpoints } from '../../contract/endpoints.ts';
import { routes } from '../../contract/routes.ts';
import { AppError, asAppError } from '../../model/errors.ts';
import type { Cloudlet } from '../cloudlet.ts';
import { authorize } from './access.ts';

/** Bytes that may wait in the socket of a watcher; one that reads more slowly misses some. */
const maxWaitingBytes = 1024 * 1024;
/** RFC 6455, section 5.5: a control frame carries at most 125 bytes, two of them the code. */
const maxReasonLength = 100;

export function attachConsole(app: FastifyInstance, cloudlet: Cloudlet): void {
  const { path } = endpoints.attachConsole;
  app.route<{ Params: { vm: string } }>({
    method: 'GET',
    url: path.replace('{vm}', ':vm'),
    schema: { params: routes.attachConsole.params },
    onRequest: async (request) => authorize(cloudlet, routes.attachConsole.access, request),
    preHandler: async (request) => {
      // Before the upgrade, while there is an answer to give.
      cloudlet.vms.requireConsole(request.params.vm).requireRoom();
    },
    handler: () => {
      throw new AppError('invalid_request', 'A console is a WebSocket, and the request asks for none', {
        problems: [{ field: 'headers.upgrade', wanted: 'websocket' }],
      });
    },
    wsHandler: (socket: WebSocket, request) => {
      const attachment = cloudlet.vms.requireConsole(request.params.vm).attach();
      socket.on('message', (data: Buffer) => {
        try {
          attachment.write(data);
        } catch (error) {
          // The VM has just ended, or its guest takes no more.
          socket.close(1013, asAppError(error).message.slice(0, maxReasonLength));
        }
      });
      socket.on('close', () => attachment.close());
      socket.on('error', () => attachment.close());
      void (async () => {
        for await (const bytes of attachment) {
          if (socket.bufferedAmount < maxWaitingBytes) socket.send(bytes, { binary: true });
        }
        socket.close(1000, 'the console has ended');
      })();
    },
  });
}
