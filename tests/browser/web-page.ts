/** A web site of one page, made from `page.ts` as a user's site would be: with a bundler. */
import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import path from 'node:path';
import { build } from 'esbuild';

const html = '<!doctype html><title>site</title><script type="module" src="/page.js"></script>';

export interface Site extends AsyncDisposable {
  origin: string;
}

/** The page's script with the SDK in it. Fails if any of it is not for browsers. */
export async function bundlePage(): Promise<string> {
  const { outputFiles, warnings } = await build({
    entryPoints: [path.join(import.meta.dirname, 'page.ts')],
    bundle: true,
    minify: true,
    format: 'esm',
    platform: 'browser',
    write: false,
  });
  if (warnings.length > 0) throw new Error(`the bundler warned: ${JSON.stringify(warnings)}`);
  return outputFiles[0]!.text;
}

export async function serveSite(script: string): Promise<Site> {
  const server = createServer((request, response) => {
    if (request.url === '/') response.setHeader('content-type', 'text/html').end(html);
    else if (request.url === '/page.js') response.setHeader('content-type', 'text/javascript').end(script);
    else response.writeHead(404).end();
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return {
    origin: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    async [Symbol.asyncDispose]() {
      server.close();
      server.closeAllConnections();
      await once(server, 'close');
    },
  };
}
