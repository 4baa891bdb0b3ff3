/**
 * Debian's Chromium without a window, for the tests of web pages. It runs in a home of its own, whose certificate
 * database trusts the CA of one fleet: certificates are judged as on the machine of a user who has trusted it.
 */
import { execFile } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { promisify } from 'node:util';
import { chromium, type Page } from 'playwright-core';

const [browser, certutil] = ['/usr/bin/chromium', '/usr/bin/certutil'];

/** Long enough for a machine that has much else to do; nothing waits so long unless it fails. */
const patienceMs = 100_000;

export interface OpenBrowser extends AsyncDisposable {
  /** An empty page that shares nothing with the other pages: no cookies, no cache. */
  newPage(): Promise<Page>;
}

/** `caFile`: the certificate of the fleet's CA, PEM. */
export async function openChromium(caFile: string): Promise<OpenBrowser> {
  const missing = [browser, certutil].filter((file) => !existsSync(file));
  if (missing.length > 0) {
    throw new Error(
      `${missing.join(' and ')} missing; install: apt-get install -y --no-install-recommends chromium libnss3-tools`,
    );
  }
  await using made = new AsyncDisposableStack();
  const home = await mkdtemp(path.join(tmpdir(), 'viper-browser-'));
  made.defer(() => rm(home, { recursive: true, force: true, maxRetries: 5 }));
  await trust(home, caFile);
  const opened = await chromium.launch({
    executablePath: browser,
    env: { PATH: process.env.PATH ?? '/usr/bin:/bin', HOME: home, TMPDIR: home },
    // As root, Chromium has no sandbox; it opens no pages but ours. The other flags keep it off the network.
    chromiumSandbox: false,
    args: ['--disable-gpu', '--disable-quic', '--disable-sync'],
    timeout: patienceMs,
  });
  made.defer(() => opened.close());
  const owned = made.move();
  return {
    async newPage() {
      const page = await opened.newPage();
      page.setDefaultTimeout(patienceMs);
      return page;
    },
    [Symbol.asyncDispose]: () => owned.disposeAsync(),
  };
}

/** Chromium on Linux reads the authorities that a user trusts from this database of NSS. */
async function trust(home: string, caFile: string): Promise<void> {
  const database = path.join(home, '.pki/nssdb');
  await mkdir(database, { recursive: true });
  const run = (...argv: string[]) => promisify(execFile)(certutil, ['-d', `sql:${database}`, ...argv]);
  await run('-N', '--empty-password');
  await run('-A', '-n', 'fleet', '-t', 'C,,', '-i', caFile);
}
