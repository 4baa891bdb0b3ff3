/**
 * Your own API over the Viper library: an app that gives each of its users a desktop VM, without ever showing them
 * what a VM is. One process, no Viper daemon beside it; the guests outlive it all the same.
 *
 *   bin/viper init --state /var/lib/desktops --name desktops && bin/viper image import FILE --alias desktop …
 *   node examples/own-api.ts /var/lib/desktops
 *   curl -X PUT localhost:8080/desktops/ada ; curl localhost:8080/desktops/ada
 */
import Fastify from 'fastify';
import { AppError, Cloudlet } from 'viper';
import { viperHttp } from 'viper/http';

/** The app's own routes over an open cloudlet; a test calls it, too. */
export function desktopApi(cloudlet: Cloudlet) {
  const app = Fastify();

  // Library calls trust their caller, so what comes from outside is checked here.
  const schema = {
    params: { type: 'object', properties: { user: { type: 'string', pattern: '^[a-z0-9-]{1,40}$' } } },
  };

  app.put<{ Params: { user: string } }>('/desktops/:user', { schema }, async (request, reply) => {
    const name = `desktop-${request.params.user}`;
    const operation = await cloudlet.vms
      .create({ name, image: 'desktop', instanceType: 'tiny' })
      .catch((error) => {
        if (error instanceof AppError && error.code === 'name_taken') return undefined;
        throw error;
      });
    // The user has one already: asking again changes nothing.
    if (!operation) return { user: request.params.user, state: cloudlet.vms.view(name).state };
    const ended = await cloudlet.operations.wait(operation.id);
    return reply
      .code(ended.state === 'succeeded' ? 201 : 502)
      .send({ user: request.params.user, state: ended.state });
  });

  app.get<{ Params: { user: string } }>('/desktops/:user', { schema }, async (request) => {
    const { state } = cloudlet.vms.view(`desktop-${request.params.user}`);
    return { user: request.params.user, state };
  });

  app.delete<{ Params: { user: string } }>('/desktops/:user', { schema }, async (request, reply) => {
    const operation = cloudlet.vms.delete(`desktop-${request.params.user}`, { force: true });
    await cloudlet.operations.wait(operation.id);
    return reply.code(204).send();
  });

  app.setErrorHandler((error, _request, reply) => {
    if (error instanceof AppError && error.code === 'not_found')
      return reply.code(404).send({ message: 'no desktop' });
    return reply.send(error);
  });

  // Viper's own API beside it, under its usual paths, tokens and all.
  app.register(viperHttp, { cloudlet });
  return app;
}

if (import.meta.main) {
  const [directory] = process.argv.slice(2);
  if (!directory) throw new Error('usage: node examples/own-api.ts STATE_DIRECTORY');
  const cloudlet = await Cloudlet.open({ directory });
  const app = desktopApi(cloudlet);
  await app.listen({ port: 8080 });
  console.log('http://localhost:8080/desktops/NAME');
  process.once('SIGTERM', async () => {
    await app.close();
    await cloudlet.close();
  });
}
