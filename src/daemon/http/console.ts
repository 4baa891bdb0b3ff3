/** The live serial console: one WebSocket, binary messages both ways, any number of watchers of one VM. */
import type { FastifyInstance } from 'fastify';
import type { WebSocket } from 'ws';
import { endpoints } from '../../contract/endpoints.ts';
import { routes } from '../../contract/routes.ts';
import type { Cloudlet } from '../cloudlet.ts';
import { authorize } from './access.ts';

/** Bytes that may wait in the socket of a watcher; one that reads more slowly misses some. */
const maxWaitingBytes = 1024 * 1024;

export function attachConsole(app: FastifyInstance, cloudlet: Cloudlet): void {
  const { path } = endpoints.attachConsole;
  app.get<{ Params: { vm: string } }>(
    path.replace('{vm}', ':vm'),
    {
      websocket: true,
      schema: { params: routes.attachConsole.params },
      onRequest: async (request) => authorize(cloudlet, routes.attachConsole.access, request),
      preHandler: async (request) => {
        cloudlet.vms.requireConsole(request.params.vm);
      },
    },
    (socket: WebSocket, request) => {
      const attachment = cloudlet.vms.requireConsole(request.params.vm).attach();
      socket.on('message', (data: Buffer) => attachment.write(data));
      socket.on('close', () => attachment.close());
      socket.on('error', () => attachment.close());
      void (async () => {
        for await (const bytes of attachment) {
          if (socket.bufferedAmount < maxWaitingBytes) socket.send(bytes, { binary: true });
        }
        socket.close(1000, 'the console has ended');
      })();
    },
  );
}
