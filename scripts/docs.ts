/** Writes docs/api.md and docs/errors.md from the contract and the table of errors: `npm run docs`. */
import { writeFileSync } from 'node:fs';
import path from 'node:path';
import { endpoints, type OperationName, type Route, routes } from '../src/contract/index.ts';
import { errorKinds } from '../src/model/errors.ts';

const generated = '<!-- Written by `npm run docs`; edit the source instead. -->';

export function errorsPage(): string {
  const rows = Object.entries(errorKinds).map(
    ([code, { status, meaning, remedy }]) => `| \`${code}\` | ${status} | ${meaning} | ${remedy} |`,
  );
  return [
    '# Errors',
    '',
    generated,
    '',
    'Every refusal is `{ "error": { "code", "message", "details", "requestId" } }`. Codes are stable.',
    '',
    '| code | HTTP | meaning | what to do |',
    '|---|---|---|---|',
    ...rows,
    '',
  ].join('\n');
}

function parts(route: Route): string {
  const names = (schema: unknown): string[] =>
    Object.keys((schema as { properties?: object })?.properties ?? {});
  const takes = [
    ...names(route.query).map((name) => `?${name}`),
    ...(route.binaryBody ? ['the file as application/octet-stream'] : names(route.body)),
  ];
  return takes.length > 0 ? takes.join(', ') : '';
}

export function apiPage(): string {
  const rows = (Object.entries(routes) as [OperationName, Route][]).map(([name, route]) => {
    const { method, path: where } = endpoints[name];
    return `| \`${method} ${where}\` | ${route.access} | ${route.summary} | ${parts(route)} | ${route.status} |`;
  });
  return [
    '# REST API',
    '',
    generated,
    '',
    'One row for each endpoint; `GET /docs` of a daemon shows the schemas, `GET /v1/openapi.json` is the OpenAPI 3.1',
    'document. A 202 answers with an operation: `GET /v1/operations/ID?waitMs=60000` waits for its end. Lists are',
    'paged by `?limit=` and `?after=`. Sizes are bytes, times milliseconds. Errors: [errors.md](errors.md).',
    '',
    '| endpoint | needs | what | takes | answers |',
    '|---|---|---|---|---|',
    ...rows,
    '',
  ].join('\n');
}

if (import.meta.main) {
  const docs = path.resolve(import.meta.dirname, '../docs');
  writeFileSync(path.join(docs, 'errors.md'), errorsPage());
  writeFileSync(path.join(docs, 'api.md'), apiPage());
}
