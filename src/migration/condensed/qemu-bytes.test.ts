import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { createConnection, createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { type TestContext, test } from 'node:test';
import { MiB } from '../../model/units.ts';
import { bytesFrom } from './qemu-bytes.ts';

/** A socket as a door gives it, and QEMU's end of it. */
async function socketPair(context: TestContext): Promise<{ door: Socket; qemu: Socket }> {
  const directory = await mkdtemp(path.join(tmpdir(), 'viper-bytes-'));
  const server = createServer({ allowHalfOpen: true, pauseOnConnect: true });
  server.listen(path.join(directory, 'qemu.sock'));
  await once(server, 'listening');
  const qemu = createConnection({ path: path.join(directory, 'qemu.sock') });
  const [door] = (await once(server, 'connection')) as [Socket];
  context.after(async () => {
    for (const each of [door, qemu, server])
      if (each === server) server.close();
      else (each as Socket).destroy();
    await rm(directory, { recursive: true });
  });
  return { door, qemu };
}

test('what QEMU writes comes whole and in order, however slowly it is taken', async (context) => {
  const { door, qemu } = await socketPair(context);
  const sent = randomBytes(3 * MiB);
  qemu.end(sent);
  const came: Buffer[] = [];
  for await (const bytes of bytesFrom(door)) {
    const piece = Buffer.from(bytes);
    await new Promise(setImmediate);
    assert.ok(piece.equals(bytes), 'a piece stays as it is until the next one is asked for');
    came.push(piece);
  }
  assert.ok(Buffer.concat(came).equals(sent));
});

test('a stream that breaks throws, and what came before it is given', async (context) => {
  const { door, qemu } = await socketPair(context);
  qemu.write('some');
  const pieces = bytesFrom(door);
  assert.equal(Buffer.from((await pieces.next()).value!).toString(), 'some');
  door.destroy(new Error('cut'));
  await assert.rejects(pieces.next(), /cut/);
  await assert.rejects(bytesFrom(door).next(), /QEMU closed its stream/);
});
