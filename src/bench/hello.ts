/** What `bench:api` compares with: the least that Fastify can do over TLS, with the certificate of a cloudlet. */
import { readFileSync } from 'node:fs';
import path from 'node:path';
import Fastify from 'fastify';

const identity = (file: string): string =>
  readFileSync(path.join(process.argv[2]!, 'identity', file), 'utf8');
const app = Fastify({
  https: { key: identity('cloudlet.key'), cert: identity('cloudlet.crt'), minVersion: 'TLSv1.3' },
});
app.get('/', async () => ({ hello: 'world' }));
await app.listen({ host: '127.0.0.1', port: 0 });
process.send!({ port: (app.server.address() as { port: number }).port });
