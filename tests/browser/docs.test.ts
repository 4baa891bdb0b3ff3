/** The docs page in a real browser: it shows the whole contract, and what it offers to try out works. */
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import type { Page } from 'playwright-core';
import { endpoints } from '../../src/contract/endpoints.ts';
import { type LabCloudlet, LabFleet } from '../../src/lab/fleet.ts';
import { openChromium } from './chromium.ts';

const options = { timeout: 180_000 };
const resources = new AsyncDisposableStack();
let edge: LabCloudlet;
let page: Page;
/** What the browser complained about: failed scripts, missing files, breaches of the content security policy. */
const complaints: string[] = [];
/** Every host that the page asked for something. */
const origins = new Set<string>();

before(async () => {
  const fleet = resources.use(await LabFleet.create());
  edge = await fleet.add('edge1');
  page = await resources.use(await openChromium(edge.caFile)).newPage();
  page.on('pageerror', (error) => complaints.push(String(error)));
  page.on('console', (message) => {
    if (['error', 'warning'].includes(message.type()))
      complaints.push(`${message.text()} ${message.location().url}`);
  });
  page.on('request', (request) => origins.add(new URL(request.url()).origin));
  await page.goto(`${edge.url}/docs`);
  await page.locator('.opblock').first().waitFor();
}, options);

after(() => resources.disposeAsync());

const operation = (id: string) => page.locator(`.opblock[id$="-${id}"]`);

test('the page shows every operation of the contract', options, async () => {
  const shown = await page.locator('.opblock').evaluateAll((blocks) =>
    blocks.map((block) => {
      const text = (part: string) => block.querySelector(part)?.textContent?.replaceAll('\u200b', '');
      return `${text('.opblock-summary-method')} ${text('.opblock-summary-path')}`;
    }),
  );
  const wanted = Object.values(endpoints).map(({ method, path }) => `${method} ${path}`);
  assert.deepEqual(shown.toSorted(), wanted.toSorted());
});

test('with a token, a call that is tried out is answered', options, async () => {
  const listVms = operation('listVms');
  await listVms.locator('.opblock-summary-control').click();
  await listVms.getByRole('button', { name: 'Try it out' }).click();
  const execute = async (): Promise<string> => {
    await listVms.getByRole('button', { name: 'Execute' }).click();
    const status = listVms.locator('.live-responses-table .response-col_status').last();
    await status.waitFor();
    return ((await status.textContent()) ?? '').trim();
  };
  assert.match(await execute(), /^401/);
  await listVms.getByRole('button', { name: 'Clear' }).click();
  // The browser reports a refused call on its console too; this one was meant.
  assert.match(complaints.splice(0).join('\n'), /^[^\n]* 401 [^\n]*\/v1\/vms\?limit=50$/);

  await page.locator('.auth-wrapper .authorize').click();
  const dialog = page.locator('.dialog-ux');
  await dialog.locator('input').fill(edge.token);
  await dialog.locator('button.authorize').click();
  await dialog.locator('button.btn-done').click();
  assert.match(await execute(), /^200/);
  const body = await listVms.locator('.live-responses-table .highlight-code code').textContent();
  assert.deepEqual(JSON.parse(body!), { items: [], next: null });
});

test('what would never end cannot be tried out', options, async () => {
  for (const name of ['streamEvents', 'attachConsole']) {
    await operation(name).locator('.opblock-summary-control').click();
    await operation(name).locator('.opblock-body').waitFor();
    assert.equal(await operation(name).getByRole('button', { name: 'Try it out' }).count(), 0, name);
  }
});

test('the page needs nothing but the daemon, and the browser has nothing to complain about', () => {
  assert.deepEqual([...origins], [edge.url]);
  assert.deepEqual(complaints, []);
});
