import assert from 'node:assert/strict';
import type { ServerResponse } from 'node:http';
import { test } from 'node:test';
import { connect, ViperError, type ViperEvent } from './client.ts';
import { type FakeRequest, fakeDaemon, refusal, reply } from './fake-daemon.ts';

const event = (id: number, kind = 'vm.started', data: Record<string, unknown> = {}): ViperEvent => ({
  id,
  at: '2026-01-01T00:00:00Z',
  kind,
  data,
});

function begin(response: ServerResponse): void {
  response.writeHead(200, { 'content-type': 'text/event-stream' });
  response.write(': viper\n\n');
}
const send = (response: ServerResponse, value: ViperEvent) =>
  response.write(`id: ${value.id}\nevent: ${value.kind}\ndata: ${JSON.stringify(value)}\n\n`);

async function take(count: number, stream: AsyncGenerator<ViperEvent>): Promise<ViperEvent[]> {
  const events: ViperEvent[] = [];
  for await (const each of stream) {
    events.push(each);
    if (events.length === count) break;
  }
  return events;
}

/** A daemon whose nth connection is answered by the nth handler, the last one for all that follow. */
const daemonWith = (...handlers: ((response: ServerResponse, request: FakeRequest) => void)[]) => {
  let connection = 0;
  return fakeDaemon((request, response) => {
    const handler = handlers[Math.min(connection, handlers.length - 1)];
    connection += 1;
    handler?.(response, request);
  });
};

test('events come in order, and leaving the loop closes the connection', async () => {
  const closed = Promise.withResolvers<void>();
  await using daemon = await daemonWith((response) => {
    response.on('close', closed.resolve);
    begin(response);
    for (const id of [1, 2, 3]) send(response, event(id));
  });
  const events = await take(2, connect({ url: daemon.url, token: 't' }).events({ after: 0 }));
  assert.deepEqual(events, [event(1), event(2)]);
  assert.equal(daemon.requests[0]?.path, '/v1/events?after=0');
  assert.equal(daemon.requests[0]?.headers.accept, 'text/event-stream');
  assert.equal(daemon.requests[0]?.headers.authorization, 'Bearer t');
  await closed.promise;
});

test('after a cut in the middle of an event, the stream goes on after the last whole one', async () => {
  await using daemon = await daemonWith(
    (response) => {
      begin(response);
      send(response, event(4));
      response.write('id: 5\ndata: {"id":5,');
      setTimeout(() => response.destroy(), 20);
    },
    (response) => {
      begin(response);
      send(response, event(5));
    },
  );
  let connected = 0;
  const onConnected = () => {
    connected += 1;
  };
  const events = await take(2, connect({ url: daemon.url }).events({ after: 3, onConnected }));
  assert.deepEqual(
    events.map(({ id }) => id),
    [4, 5],
  );
  assert.equal(connected, 2);
  assert.equal(daemon.requests[1]?.path, '/v1/events');
  assert.equal(daemon.requests[1]?.headers['last-event-id'], '4');
});

test('the end that a closing daemon tells and its 503 after it are waited out; a gap is told', async () => {
  await using daemon = await daemonWith(
    (response) => {
      begin(response);
      send(response, event(4));
      send(response, event(4, 'end', { reason: 'closing' }));
      response.end();
    },
    (response) => reply(response, 503, refusal('interrupted', 'closing')),
    (response) => {
      begin(response);
      send(response, event(9, 'gap', { afterId: 4 }));
      send(response, event(10));
    },
  );
  const events = await take(3, connect({ url: daemon.url }).events());
  assert.deepEqual(
    events.map(({ id, kind }) => `${id} ${kind}`),
    ['4 vm.started', '9 gap', '10 vm.started'],
  );
});

test('a connection that is silent for too long counts as cut', async () => {
  await using daemon = await daemonWith(
    (response) => {
      begin(response);
      send(response, event(1));
    },
    (response) => {
      begin(response);
      send(response, event(2));
    },
  );
  const events = await take(2, connect({ url: daemon.url }).events({ silenceMs: 50 }));
  assert.deepEqual(events, [event(1), event(2)]);
});

test('a first connection that fails, and a refusal for good, end the stream with their error', async () => {
  const code = (wanted: string) => (error: unknown) => error instanceof ViperError && error.code === wanted;
  await assert.rejects(take(1, connect({ url: 'http://127.0.0.1:1' }).events()), code('unreachable'));
  await using daemon = await daemonWith(
    (response) => {
      begin(response);
      send(response, event(1));
      response.end();
    },
    (response) => reply(response, 401, refusal('unauthenticated', 'The token was revoked')),
  );
  await assert.rejects(take(2, connect({ url: daemon.url }).events()), code('unauthenticated'));
});

test('a stream that stays away for too long ends with its error', async () => {
  await using daemon = await daemonWith(
    (response) => {
      begin(response);
      send(response, event(1));
      response.end();
    },
    (response) => response.destroy(),
  );
  await assert.rejects(take(2, connect({ url: daemon.url }).events({ reconnectMs: 100 })), {
    code: 'unreachable',
  });
});

test('what is no event stream, and what is no event, is a bad reply', async () => {
  await using page = await daemonWith((response) => reply(response, 200, { items: [] }));
  await assert.rejects(take(1, connect({ url: page.url }).events()), { code: 'bad_reply' });
  for (const data of ['hello', '[]', '{"id":"x","kind":1}']) {
    await using daemon = await daemonWith((response) => {
      begin(response);
      response.write(`data: ${data}\n\n`);
    });
    await assert.rejects(take(1, connect({ url: daemon.url }).events()), { code: 'bad_reply' }, data);
  }
});

test('an abort ends the stream with its reason, also while it waits to connect again', async () => {
  await using daemon = await daemonWith((response) => {
    begin(response);
    response.end('retry: 20000\n\n');
  });
  const reason = new Error('enough');
  const stop = new AbortController();
  const { events } = connect({ url: daemon.url });
  await assert.rejects(
    take(1, events({ signal: stop.signal, onConnected: () => setTimeout(() => stop.abort(reason), 50) })),
    reason,
  );
});
