/** The docs page: Swagger UI from its npm package, over the document that this daemon answers with. */
import { createRequire } from 'node:module';
import path from 'node:path';
import fastifyStatic from '@fastify/static';
import type { FastifyInstance } from 'fastify';
import { endpoints, type OperationName } from '../../contract/endpoints.ts';
import { type Route, routes } from '../../contract/routes.ts';

const page = `<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <title>Viper API</title>
  <link rel="icon" href="/docs/favicon-32x32.png">
  <link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
  <div id="swagger-ui"></div>
  <script src="/docs/swagger-ui-bundle.js"></script>
  <script src="/docs/start.js"></script>
</body>
</html>
`;
/** What answers without an end, and the page would wait for it: these are shown, but cannot be tried out. */
const endless = (Object.entries(routes) as [OperationName, Route][])
  .filter(([, route]) => route.status === 101 || route.replyType === 'text/event-stream')
  .map(([name]) => endpoints[name].path);
const start = `const endless = ${JSON.stringify(endless)};
const onlyWhatEnds = () => ({
  statePlugins: { spec: { wrapSelectors: { allowTryItOutFor: () => (_state, path) => !endless.includes(path) } } },
});
SwaggerUIBundle({
  url: '/v1/openapi.json', dom_id: '#swagger-ui', deepLinking: true, persistAuthorization: false,
  plugins: [onlyWhatEnds],
});
`;
// Swagger UI sets inline styles; scripts come from here only, and no other page may frame this one: it holds a token.
const policy = [
  "default-src 'none'",
  "script-src 'self'",
  "style-src 'self' 'unsafe-inline'",
  "img-src 'self' data:",
  "connect-src 'self'",
  "base-uri 'none'",
  "form-action 'none'",
  "frame-ancestors 'none'",
].join('; ');

/** Adds `/docs`; the document itself is an endpoint of the contract. */
export async function registerDocs(app: FastifyInstance): Promise<void> {
  const assets = path.dirname(createRequire(import.meta.url).resolve('swagger-ui-dist/package.json'));
  app.get('/docs', async (_request, reply) => {
    reply.header('content-security-policy', policy);
    return reply.type('text/html; charset=utf-8').send(page);
  });
  app.get('/docs/start.js', async (_request, reply) => reply.type('text/javascript').send(start));
  await app.register(fastifyStatic, { root: assets, serve: false });
  for (const file of ['swagger-ui.css', 'swagger-ui-bundle.js', 'favicon-32x32.png'] as const) {
    app.get(`/docs/${file}`, (_request, reply) => reply.sendFile(file));
  }
}
