/**
 * The SDK in a real browser: a web page of another origin, which the cloudlet allows, works with a real daemon.
 * What stands in `page.evaluate` runs in that page; only plain values come back from there.
 */
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { after, before, test } from 'node:test';
import type { Page } from 'playwright-core';
import { type LabCloudlet, LabFleet } from '../../src/lab/fleet.ts';
import { MiB } from '../../src/model/units.ts';
import { type OpenBrowser, openChromium } from './chromium.ts';
import type {} from './page.ts';
import { bundlePage, type Site, serveSite } from './web-page.ts';

/**
 * A boot sector that answers each byte typed at the serial port with its case turned: no echo on the way could.
 * Ports of the 16550 at COM1: 3f8 data, 3fd line status, whose bit 0 says that a byte has come.
 */
const answerer = [
  ...[0xba, 0xfd, 0x03], // start: mov dx, 3fdh
  ...[0xec], //            wait:  in al, dx
  ...[0xa8, 0x01], //             test al, 1
  ...[0x74, 0xfb], //             jz wait
  ...[0xba, 0xf8, 0x03], //       mov dx, 3f8h
  ...[0xec], //                   in al, dx
  ...[0x34, 0x20], //             xor al, 20h
  ...[0xee], //                   out dx, al
  ...[0xeb, 0xef], //             jmp start
];

function bootDisk(): Uint8Array<ArrayBuffer> {
  const disk = new Uint8Array(MiB);
  disk.set(answerer);
  disk.set([0x55, 0xaa], 510);
  return disk;
}

const options = { timeout: 180_000 };
const resources = new AsyncDisposableStack();
let edge: LabCloudlet;
let browser: OpenBrowser;
let page: Page;
let stranger: Site;
const problems: string[] = [];

before(async () => {
  const script = await bundlePage();
  const site = resources.use(await serveSite(script));
  stranger = resources.use(await serveSite(script));
  const fleet = resources.use(await LabFleet.create());
  edge = await fleet.add('edge1', { corsOrigins: [site.origin] });
  browser = resources.use(await openChromium(edge.caFile));
  page = await browser.newPage();
  page.on('pageerror', (error) => problems.push(String(error)));
  await page.goto(site.origin);
  await page.waitForFunction(() => 'sdk' in window);
  await page.evaluate(
    ({ url, token }) => {
      window.viper = window.sdk.connect({ url, token });
    },
    { url: edge.url, token: edge.token },
  );
}, options);

after(() => resources.disposeAsync());

test('a page reads the cloudlet and its VMs', options, async () => {
  const [cloudlet, vms] = await page.evaluate(() =>
    Promise.all([window.viper.getCloudlet(), window.viper.listVms()]),
  );
  assert.deepEqual([cloudlet.id, cloudlet.name, cloudlet.url], [edge.id, 'edge1', edge.url]);
  assert.deepEqual(vms, { items: [], next: null });
});

test('a page imports an image from a Blob', options, async () => {
  const image = await page.evaluate(
    ({ code, size }) => {
      const disk = new Uint8Array(size);
      disk.set(code);
      disk.set([0x55, 0xaa], 510);
      return window.viper.importImage({ body: new Blob([disk]), query: { alias: 'answerer' } });
    },
    { code: answerer, size: MiB },
  );
  assert.equal(image.digest, `sha256:${createHash('sha256').update(bootDisk()).digest('hex')}`);
  assert.deepEqual([image.format, image.virtualBytes, image.aliases], ['raw', MiB, ['answerer']]);
});

test('a page creates a VM, waits for the operation and sees its events', options, async () => {
  const operation = await page.evaluate(async () => {
    window.seen = [];
    const connected = Promise.withResolvers<void>();
    void (async () => {
      const events = window.viper.events({ onConnected: connected.resolve });
      for await (const event of events) window.seen.push(event);
    })();
    await connected.promise;
    const hardware = { memoryBytes: 64 * 1024 * 1024 };
    const body = { name: 'web', image: 'answerer', instanceType: 'tiny', hardware, start: false };
    return window.viper.wait(await window.viper.createVm({ body }));
  });
  assert.deepEqual([operation.state, operation.kind], ['succeeded', 'vm.create']);
  const { vmId } = operation.subject;
  await page.waitForFunction(
    (id) =>
      window.seen.some(({ data }) => {
        const told = data.operation as typeof operation | undefined;
        return told?.id === id && told.state === 'succeeded';
      }),
    operation.id,
  );
  const kinds = await page.evaluate(
    (id) => window.seen.filter((event) => event.vmId === id).map(({ kind }) => kind),
    vmId,
  );
  for (const kind of ['vm.creating', 'vm.stopped']) assert.ok(kinds.includes(kind), kinds.join());
  const names = await page.evaluate(async () => {
    const all: string[] = [];
    for await (const { name } of window.viper.pages(window.viper.listVms, { limit: 1 })) all.push(name);
    return all;
  });
  assert.deepEqual(names, ['web']);
});

test('a refusal reaches the page as a ViperError with its code and details', options, async () => {
  const missing = await page.evaluate(() => window.refusal(window.viper.getVm({ params: { vm: 'nobody' } })));
  assert.deepEqual([missing.code, missing.status], ['not_found', 404]);
  assert.deepEqual(missing.details, { kind: 'vm', name: 'nobody' });
  assert.match(missing.requestId!, /^[0-9a-f-]{36}$/);
  const taken = await page.evaluate(() => {
    const body = { name: 'web', image: 'answerer', instanceType: 'tiny' };
    return window.refusal(window.viper.createVm({ body }));
  });
  assert.deepEqual([taken.code, taken.status], ['name_taken', 409]);
});

test('a wrong token is told as unauthenticated, by calls, events and the console', options, async () => {
  const refusals = await page.evaluate((url) => {
    const wrong = window.sdk.connect({ url, token: `vpr_${'x'.repeat(43)}` });
    const calls = [wrong.listVms(), wrong.events().next(), wrong.attachConsole({ params: { vm: 'web' } })];
    return Promise.all(calls.map(window.refusal));
  }, edge.url);
  assert.deepEqual(
    refusals.map(({ code, status }) => [code, status]),
    Array(3).fill(['unauthenticated', 401]),
  );
});

test('a call that is aborted rejects with the reason', options, async () => {
  const reason = await page.evaluate(() => {
    const abort = new AbortController();
    const call = window.viper
      .events({ signal: abort.signal, onConnected: () => abort.abort('enough') })
      .next();
    return call.catch((error) => error);
  });
  assert.equal(reason, 'enough');
});

test('the console of a stopped VM is refused with what to do', options, async () => {
  const refusal = await page.evaluate(() =>
    window.refusal(window.viper.attachConsole({ params: { vm: 'web' } })),
  );
  assert.equal(refusal.code, 'wrong_state');
  assert.match(refusal.message, /it is stopped\. Start it first/);
});

test('a page types at the console of a VM and the guest answers', options, async () => {
  const [answer, end] = await page.evaluate(async () => {
    const { viper } = window;
    await viper.wait(await viper.startVm({ params: { vm: 'web' } }));
    const session = await viper.attachConsole({ params: { vm: 'web' } });
    const writer = session.writable.getWriter();
    // The firmware forgets what is typed before it has booted the disk.
    const typing = setInterval(() => void writer.write(new TextEncoder().encode('viper')), 200);
    const reader = session.readable.getReader();
    const decoder = new TextDecoder();
    let text = '';
    while (!text.includes('VIPER')) {
      const { done, value } = await reader.read();
      if (done) break;
      text += decoder.decode(value, { stream: true });
    }
    clearInterval(typing);
    session.close();
    return [text, await session.closed] as const;
  });
  assert.match(answer, /VIPER/);
  assert.equal(end.code, 1000);
});

test('the console may be the first that a browser asks of a cloudlet', options, async () => {
  await using fresh = await openChromium(edge.caFile);
  const first = await fresh.newPage();
  await first.goto(page.url());
  await first.waitForFunction(() => 'sdk' in window);
  const end = await first.evaluate(
    async (options) => {
      const session = await window.sdk.connect(options).attachConsole({ params: { vm: 'web' } });
      session.close();
      return session.closed;
    },
    { url: edge.url, token: edge.token },
  );
  assert.equal(end.code, 1000);
});

test('the events of a page go on after a restart of the daemon', options, async () => {
  const before = await page.evaluate(() => window.seen.at(-1)!.id);
  await edge.stop();
  await edge.start();
  await page.evaluate(async () => {
    const { viper } = window;
    await viper.wait(await viper.deleteVm({ params: { vm: 'web' }, query: { force: true } }));
    await viper.deleteImage({ params: { image: 'answerer' } });
  });
  await page.waitForFunction(() => window.seen.at(-1)!.kind === 'image.deleted');
  const seen = await page.evaluate(() => window.seen.map(({ id, kind }) => ({ id, kind })));
  const ids = seen.map(({ id }) => id);
  assert.deepEqual(
    ids,
    [...new Set(ids)].sort((a, b) => a - b),
  );
  const news = seen.filter(({ id }) => id > before).map(({ kind }) => kind);
  assert.ok(news.includes('vm.deleted') && !news.includes('gap'), news.join());
  assert.deepEqual((await edge.viper.listVms()).items, []);
  assert.deepEqual((await edge.viper.listImages()).items, []);
});

test('a page of an origin that the cloudlet does not allow reaches nothing', options, async () => {
  const other = await browser.newPage();
  const console: string[] = [];
  other.on('console', (message) => console.push(message.text()));
  await other.goto(stranger.origin);
  await other.waitForFunction(() => 'sdk' in window);
  const refusals = await other.evaluate(
    (options) => {
      const viper = window.sdk.connect(options);
      const calls = [
        viper.getHealth(),
        viper.listVms(),
        viper.events().next(),
        viper.createJoinToken({ body: {} }),
      ];
      return Promise.all(calls.map(window.refusal));
    },
    { url: edge.url, token: edge.token },
  );
  for (const { code, message } of refusals) assert.equal(code, 'unreachable', message);
  const blocked = console.filter((text) => text.includes('blocked by CORS policy'));
  assert.equal(blocked.length, refusals.length, console.join('\n'));
  await other.close();
});

test(
  'such a page gets no console either, though browsers open WebSockets for any page',
  options,
  async () => {
    const body = {
      name: 'web',
      image: 'answerer',
      instanceType: 'tiny',
      hardware: { memoryBytes: 64 * MiB },
    };
    await edge.viper.importImage({ body: new Blob([bootDisk()]), query: { alias: 'answerer' } });
    await edge.viper.wait(await edge.viper.createVm({ body }));
    const other = await browser.newPage();
    await other.goto(stranger.origin);
    await other.waitForFunction(() => 'sdk' in window);
    const opened = await other.evaluate(
      async ({ url, token }) => {
        const viper = window.sdk.connect({ url, token });
        // A fetch goes before, so that it is not the question for a certificate that keeps the WebSocket shut.
        await window.refusal(viper.getHealth());
        const address = `${url.replace('https', 'wss')}/v1/vms/web/console`;
        const socket = new WebSocket(address, ['viper.console', `bearer.${token}`]);
        return new Promise<boolean>((resolve) => {
          socket.onopen = () => resolve(true);
          socket.onclose = () => resolve(false);
        });
      },
      { url: edge.url, token: edge.token },
    );
    assert.equal(opened, false);
    await other.close();
  },
);

test('no error stayed uncaught in the page', () => {
  assert.deepEqual(problems, []);
});
