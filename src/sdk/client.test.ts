import assert from 'node:assert/strict';
import { test } from 'node:test';
import { endpoints } from '../contract/endpoints.ts';
import { connect, type Operation, ViperError } from './client.ts';
import { type Answer, fakeDaemon, refusal, reply } from './fake-daemon.ts';

const noReply: Answer = (_, response) => reply(response, 204);
const code = (wanted: string) => (error: unknown) => error instanceof ViperError && error.code === wanted;

test('there is a method for every operation of the contract', () => {
  const viper = connect({ url: 'http://127.0.0.1:1' });
  const missing = Object.keys(endpoints).filter((name) => !(name in viper));
  assert.deepEqual(missing, ['streamEvents', 'streamDeviceEvents']);
  assert.deepEqual([typeof viper.events, typeof viper.deviceEvents], ['function', 'function']);
});

test('a call sends method, path, query, token and body as the contract has them', async () => {
  await using daemon = await fakeDaemon((_, response) => reply(response, 202, { id: 'op' }));
  const viper = connect({ url: `${daemon.url}/`, token: 'secret' });
  const operation = await viper.createVm({ body: { name: 'web', image: 'debian' } });
  assert.equal(operation.id, 'op');
  await viper.deleteVm({ params: { vm: 'web' }, query: { force: true } });
  await viper.getVm({ params: { vm: 'web' } });
  const [create, remove, get] = daemon.requests;
  assert.equal(`${create?.method} ${create?.path}`, 'POST /v1/vms');
  assert.equal(create?.headers.authorization, 'Bearer secret');
  assert.equal(create?.headers['content-type'], 'application/json');
  assert.deepEqual(JSON.parse(create?.body ?? ''), { name: 'web', image: 'debian' });
  assert.equal(`${remove?.method} ${remove?.path}`, 'DELETE /v1/vms/web?force=true');
  assert.equal(remove?.headers['content-type'], undefined);
  assert.equal(`${get?.method} ${get?.path}`, 'GET /v1/vms/web');
});

test('path parameters stay in their segment', async () => {
  await using daemon = await fakeDaemon(noReply);
  const viper = connect({ url: daemon.url });
  await viper.removeImageAlias({ params: { image: 'sha256:ab/../cd?x#y', alias: 'a b' } });
  assert.equal(daemon.requests[0]?.path, '/v1/images/sha256%3Aab%2F..%2Fcd%3Fx%23y/aliases/a%20b');
  for (const vm of ['', '.', '..']) {
    await assert.rejects(viper.deleteVm({ params: { vm } }), code('invalid_request'));
  }
  await assert.rejects(viper.getVm({ params: {} } as never), /needs the path parameter 'vm'/);
  assert.equal(daemon.requests.length, 1);
});

test('text comes as text, and no content as undefined', async () => {
  await using daemon = await fakeDaemon(({ method }, response) => {
    if (method === 'DELETE') return reply(response, 204);
    response.writeHead(200, { 'content-type': 'text/plain' }).end('login: ');
  });
  const viper = connect({ url: daemon.url });
  assert.equal(await viper.getConsoleLog({ params: { vm: 'web' }, query: { tailBytes: 9 } }), 'login: ');
  assert.equal(daemon.requests[0]?.path, '/v1/vms/web/console/log?tailBytes=9');
  assert.equal(await viper.deleteImage({ params: { image: 'debian' } }), undefined);
});

test('a refusal is thrown with code, details and request id', async () => {
  await using daemon = await fakeDaemon((_, response) =>
    reply(response, 404, refusal('not_found', "There is no VM 'web'", { kind: 'vm', name: 'web' })),
  );
  const viper = connect({ url: daemon.url });
  await assert.rejects(viper.getVm({ params: { vm: 'web' } }), {
    name: 'ViperError',
    code: 'not_found',
    message: "There is no VM 'web'",
    status: 404,
    requestId: 'req-1',
    details: { kind: 'vm', name: 'web' },
  });
});

test('a reply that is garbage is a bad reply, not a crash', async () => {
  const garbage = ['', 'hello', '<html>', '[]', '"text"', 'null', '{"half":'];
  for (const text of garbage) {
    await using daemon = await fakeDaemon((_, response) => response.writeHead(200).end(text));
    await assert.rejects(connect({ url: daemon.url }).listVms(), code('bad_reply'), text);
  }
});

test('a redirect is not followed, so that no token leaks', async () => {
  await using daemon = await fakeDaemon((_, response) =>
    response.writeHead(302, { location: 'http://127.0.0.1:1/' }).end(),
  );
  await assert.rejects(connect({ url: daemon.url, token: 'secret' }).listVms(), code('unreachable'));
});

test('a daemon that is not there, and one that hangs up in its answer, are unreachable', async () => {
  const daemon = await fakeDaemon((_, response) => {
    response.writeHead(200, { 'content-length': '100' }).write('{"items":');
    setTimeout(() => response.destroy(), 20);
  });
  const viper = connect({ url: daemon.url });
  await assert.rejects(viper.listVms(), code('unreachable'));
  await daemon[Symbol.asyncDispose]();
  await assert.rejects(
    viper.listVms(),
    /listVms could not reach http.*refused\. Is the daemon running there\?/,
  );
});

test('an aborted call rejects with the reason of its signal', async () => {
  await using daemon = await fakeDaemon(() => {});
  const stop = new AbortController();
  const reason = new Error('enough');
  setTimeout(() => stop.abort(reason), 20);
  const viper = connect({ url: daemon.url });
  await assert.rejects(viper.listVms({ signal: stop.signal }), reason);
  await assert.rejects(viper.wait('op', { signal: AbortSignal.abort(reason) }), reason);
});

test('pages gives the items of all pages', async () => {
  await using daemon = await fakeDaemon(({ path }, response) => {
    const after = Number(new URL(path, 'http://x').searchParams.get('after') ?? 0);
    reply(response, 200, {
      items: [{ id: after }, { id: after + 1 }],
      next: after < 4 ? `${after + 2}` : null,
    });
  });
  const viper = connect({ url: daemon.url });
  const ids: unknown[] = [];
  for await (const { id } of viper.pages(viper.listVms, { limit: 2 })) ids.push(id);
  assert.deepEqual(ids, [0, 1, 2, 3, 4, 5]);
  assert.equal(daemon.requests[1]?.path, '/v1/vms?limit=2&after=2');
});

test('pages ends with an error where a page names itself as the next', async () => {
  await using daemon = await fakeDaemon((_, response) => reply(response, 200, { items: [], next: 'again' }));
  const viper = connect({ url: daemon.url });
  await assert.rejects(
    (async () => {
      for await (const _ of viper.pages(viper.listImages));
    })(),
    code('bad_reply'),
  );
});

test('an image is sent as its bytes, with its size if that is known', async () => {
  await using daemon = await fakeDaemon((_, response) => reply(response, 201, { digest: 'sha256:1' }));
  const viper = connect({ url: daemon.url });
  const stream = () => new Blob(['one', 'two']).stream();
  await viper.importImage({ query: { alias: 'tiny' }, body: stream(), sizeBytes: 6 });
  await viper.importImage({ body: stream() });
  await viper.importImage({ body: new Blob(['onetwo']) });
  const [known, unknown, blob] = daemon.requests;
  assert.equal(known?.path, '/v1/images?alias=tiny');
  assert.equal(known?.headers['content-type'], 'application/octet-stream');
  assert.equal(known?.headers['content-length'], '6');
  assert.equal(unknown?.headers['transfer-encoding'], 'chunked');
  assert.equal(blob?.headers['content-length'], '6');
  for (const { body } of daemon.requests) assert.equal(body, 'onetwo');
});

test('a refusal that comes before the image was sent ends the sending and is told', async () => {
  await using daemon = await fakeDaemon(
    (_, response) => reply(response, 401, refusal('unauthenticated', 'No credential')),
    undefined,
    { hasty: true },
  );
  let pieces = 0;
  const body = new ReadableStream<Uint8Array>({
    pull(controller) {
      pieces += 1;
      if (pieces > 200) controller.close();
      else controller.enqueue(new Uint8Array(1024 * 1024));
    },
  });
  await assert.rejects(connect({ url: daemon.url }).importImage({ body }), code('unauthenticated'));
  assert.ok(pieces < 200);
});

const operation = (state: string, more: object = {}) => ({
  id: 'op1',
  kind: 'vm.create',
  subject: {},
  state,
  progress: null,
  createdAt: '2026-01-01T00:00:00Z',
  ...more,
});

test('wait polls until the operation has ended and tells of each state', async () => {
  const states = ['running', 'running', 'succeeded'];
  await using daemon = await fakeDaemon((_, response) =>
    reply(response, 200, operation(states.shift() ?? '')),
  );
  const seen: string[] = [];
  const onProgress = ({ state }: Operation) => seen.push(state);
  const ended = await connect({ url: daemon.url }).wait('op1', { onProgress });
  assert.equal(ended.state, 'succeeded');
  assert.deepEqual(seen, ['running', 'running', 'succeeded']);
  assert.equal(daemon.requests[0]?.path, '/v1/operations/op1?waitMs=500');
});

test('wait rejects with the error of the operation', async () => {
  const error = { code: 'qemu_failed', message: 'QEMU died', details: { output: ['no disk'] } };
  const viper = connect({ url: 'http://127.0.0.1:1' });
  await assert.rejects(viper.wait(operation('failed', { error }) as Operation), {
    code: 'qemu_failed',
    message: 'QEMU died',
    details: { output: ['no disk'] },
    operationId: 'op1',
    status: 502,
  });
  await assert.rejects(viper.wait(operation('cancelled') as Operation), code('cancelled'));
});

test('wait ends with a timeout when its time is over', async () => {
  await using daemon = await fakeDaemon((_, response) => reply(response, 200, operation('running')));
  await assert.rejects(connect({ url: daemon.url }).wait('op1', { timeoutMs: 50 }), {
    code: 'timeout',
    operationId: 'op1',
    message: 'Operation op1 has not ended within 50 ms; it goes on in the daemon',
  });
});

test('wait outlives a daemon that is away for a moment', async () => {
  let asked = 0;
  await using daemon = await fakeDaemon((_, response) => {
    asked += 1;
    if (asked === 1) return response.destroy();
    reply(response, 200, operation('succeeded'));
  });
  assert.equal((await connect({ url: daemon.url }).wait('op1')).state, 'succeeded');
});

test('a URL that leads nowhere is refused at once', () => {
  for (const url of ['', 'edge1:7443', 'ftp://edge1', 'https://user:pass@edge1', 'https://edge1/?x']) {
    assert.throws(() => connect({ url }), /is not the URL of a daemon; it should look like/, url);
  }
});
