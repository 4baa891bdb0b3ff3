/**
 * Makes the golden captures of `src/stream/fixtures`: real migration streams between two stock QEMUs, taken by a proxy
 * in between. The machine has 8 MiB of RAM and no firmware of note, and its CPU never runs, so captures are small.
 *
 *   node scripts/capture-streams.ts NAME QEMU_BINARY [DATA_DIRECTORY]     NAME such as 10.0
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { createConnection, createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { constants, zstdCompressSync } from 'node:zlib';
import { type MigrationCapability, QmpConnection } from '../src/qmp/index.ts';

type Mode = 'precopy' | 'postcopy' | 'hybrid';

const fixtures = path.resolve(import.meta.dirname, '../src/stream/fixtures');
const dataAddress = 0x10_0000;

async function launch(binary: string, data: string | undefined, directory: string, name: string) {
  const socket = path.join(directory, `${name}.qmp`);
  const argv = [
    ...(data ? ['-L', data] : []),
    ...['-no-user-config', '-nodefaults', '-display', 'none', '-S'],
    ...['-machine', 'pc-q35-7.2,usb=off,vmport=off,smm=off,sata=off', '-accel', 'tcg,tb-size=16', '-m', '8'],
    ...['-bios', path.join(directory, 'firmware')],
    ...['-device', `loader,file=${path.join(directory, 'content')},addr=${dataAddress},force-raw=on`],
    ...['-qmp', `unix:${socket},server=on,wait=off`],
    ...(name === 'destination' ? ['-incoming', 'defer'] : []),
  ];
  const qemu = spawn(binary, argv, { stdio: ['ignore', 'inherit', 'inherit'] });
  for (let tries = 0; ; tries++) {
    try {
      return { qemu, qmp: await QmpConnection.connect(socket) };
    } catch (error) {
      if (tries > 100) throw error;
      await sleep(50);
    }
  }
}

async function capture(mode: Mode, name: string, binary: string, data: string | undefined): Promise<void> {
  const directory = await mkdtemp(path.join(tmpdir(), 'viper-capture-'));
  await writeFile(path.join(directory, 'firmware'), Buffer.alloc(65_536, 'firmware'));
  const content = Buffer.alloc(64 * 4096);
  for (let page = 0; page < 64; page++)
    content.fill(`page ${page} of the capture, `, page * 4096, (page + 1) * 4096);
  await writeFile(path.join(directory, 'content'), content);
  const out: Buffer[] = [];
  const back: Buffer[] = [];
  const sides: Socket[] = [];
  const incoming = path.join(directory, 'incoming');
  const outgoing = path.join(directory, 'outgoing');
  const server = createServer({ allowHalfOpen: true }, (source) => {
    const destination = createConnection({ path: incoming, allowHalfOpen: true });
    sides.push(source, destination);
    source.on('data', (bytes: Buffer) => {
      out.push(bytes);
      destination.write(bytes);
    });
    source.on('end', () => destination.end());
    destination.on('data', (bytes: Buffer) => {
      back.push(bytes);
      source.write(bytes);
    });
    destination.on('end', () => source.end());
    for (const side of [source, destination]) side.on('error', () => {});
  });
  server.listen(outgoing);
  await once(server, 'listening');
  const source = await launch(binary, data, directory, 'source');
  const destination = await launch(binary, data, directory, 'destination');
  const on: MigrationCapability[] =
    mode === 'precopy' ? ['events'] : ['events', 'postcopy-ram', 'return-path'];
  const capabilities = on.map((capability) => ({ capability, state: true }));
  for (const { qmp } of [source, destination])
    await qmp.execute('migrate-set-capabilities', { capabilities });
  await destination.qmp.execute('migrate-incoming', { uri: `unix:${incoming}` });
  // Slow enough for a switch to post-copy in the middle of the first round.
  if (mode !== 'precopy')
    await source.qmp.execute('migrate-set-parameters', { 'max-bandwidth': 150_000, 'downtime-limit': 1 });
  await source.qmp.execute('migrate', { uri: `unix:${outgoing}` });
  if (mode !== 'precopy') {
    while (mode === 'hybrid' && Buffer.concat(out).length < 100_000) await sleep(5);
    while ((await source.qmp.execute('query-migrate')).status === 'setup') await sleep(1);
    await source.qmp.execute('migrate-start-postcopy');
  }
  for (;;) {
    const { status } = await source.qmp.execute('query-migrate');
    if (status === 'completed') break;
    if (status === 'failed') throw new Error(`${mode} failed`);
    await sleep(10);
  }
  while ((await destination.qmp.execute('query-migrate')).status !== 'completed') await sleep(10);
  for (const { qemu } of [source, destination]) {
    qemu.kill();
    await once(qemu, 'exit');
  }
  server.close();
  for (const side of sides) side.destroy();
  const params = { [constants.ZSTD_c_compressionLevel]: 19 };
  for (const [direction, pieces] of [['out', out] as const, ['back', back] as const]) {
    const bytes = Buffer.concat(pieces);
    if (bytes.length === 0) continue;
    const packed = zstdCompressSync(bytes, { params });
    await writeFile(path.join(fixtures, `${name}-${mode}.${direction}.zst`), packed);
    console.log(name, mode, direction, bytes.length, packed.length);
  }
  await rm(directory, { recursive: true, force: true });
}

const [name, binary, data] = process.argv.slice(2);
if (!name || !binary) throw new Error('wanted: NAME QEMU_BINARY [DATA_DIRECTORY]');
for (const mode of ['precopy', 'postcopy', 'hybrid'] as const) await capture(mode, name, binary, data);
