/** Viper as a library: the example's own API over a cloudlet in the same process, with a guest that really runs. */
import assert from 'node:assert/strict';
import { openAsBlob } from 'node:fs';
import { mkdtemp, readdir, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { Cloudlet, createCloudlet } from 'viper';
import { desktopApi } from '../../examples/own-api.ts';
import { guestImage } from '../../src/lab/guests.ts';
import { findQemu, killProcess } from '../../src/vm/process.ts';
import { until } from './lab-vm.ts';

const options = { timeout: 600_000 };
const signal = AbortSignal.timeout(options.timeout);
let directory: string;
let cloudlet: Cloudlet;
let app: ReturnType<typeof desktopApi>;

before(async () => {
  directory = await mkdtemp(path.join(tmpdir(), 'viper-lib-'));
  await createCloudlet({ directory, name: 'desktops', url: 'https://127.0.0.1:7443' });
  await open();
});
after(async () => {
  await close();
  for (const id of await readdir(path.join(directory, 'vms')).catch(() => [])) {
    const left = await findQemu(id);
    if (left) await killProcess(left);
  }
  await rm(directory, { recursive: true });
});

async function open(): Promise<void> {
  cloudlet = await Cloudlet.open({ directory });
  app = desktopApi(cloudlet);
}

async function close(): Promise<void> {
  await app?.close();
  await cloudlet?.close();
}

async function call(method: 'GET' | 'PUT' | 'DELETE', url: string, token?: string) {
  const headers = token ? { authorization: `Bearer ${token}` } : {};
  const { statusCode, body } = await app.inject({ method, url, headers });
  return { status: statusCode, body: body === '' ? undefined : JSON.parse(body) };
}

test('without its image the app refuses, and makes nothing', options, async () => {
  assert.equal((await call('PUT', '/desktops/ada')).status, 404);
  assert.deepEqual(await call('GET', '/desktops/ada'), { status: 404, body: { message: 'no desktop' } });
});

test('a desktop comes by one call of the app, and runs', options, async () => {
  const image = await openAsBlob(guestImage('tiny'));
  await cloudlet.images.import(image.stream(), { alias: 'desktop' }, signal);
  assert.deepEqual(await call('PUT', '/desktops/ada'), {
    status: 201,
    body: { user: 'ada', state: 'succeeded' },
  });
  assert.deepEqual(await call('GET', '/desktops/ada'), {
    status: 200,
    body: { user: 'ada', state: 'running' },
  });
  const { hostname } = await until('the guest', () => cloudlet.vms.guest('desktop-ada'));
  assert.equal(hostname, 'desktop-ada');
});

test("Viper's own API stands beside the app's, with its tokens", options, async () => {
  const refused = await call('GET', '/v1/vms');
  assert.deepEqual([refused.status, refused.body.error.code], [401, 'unauthenticated']);
  const { secret } = cloudlet.credentials.create({ name: 'app', scopes: ['read'] });
  const { body } = await call('GET', '/v1/vms', secret);
  assert.deepEqual(
    body.items.map((vm: { name: string }) => vm.name),
    ['desktop-ada'],
  );
  assert.equal((await call('DELETE', '/v1/vms/desktop-ada', secret)).status, 403);
});

test('the desktop outlives the app, whose next process finds it', options, async () => {
  const { id, pid } = cloudlet.vms.view('desktop-ada');
  await close();
  assert.equal((await findQemu(id))?.pid, pid);
  await open();
  assert.deepEqual(await call('GET', '/desktops/ada'), {
    status: 200,
    body: { user: 'ada', state: 'running' },
  });
  const reply = await cloudlet.vms.exec('desktop-ada', { argv: ['hostname'] });
  assert.equal(reply.stdout, 'desktop-ada\n');
});

test('a desktop that is taken away leaves nothing', options, async () => {
  const { id } = cloudlet.vms.view('desktop-ada');
  assert.equal((await call('DELETE', '/desktops/ada')).status, 204);
  assert.equal((await call('GET', '/desktops/ada')).status, 404);
  assert.equal(await findQemu(id), null);
  assert.deepEqual(await readdir(path.join(directory, 'vms')), []);
});
