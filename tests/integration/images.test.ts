/** The image store and the disks against the real qemu-img, with images of a few MB. */
import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { createReadStream, existsSync } from 'node:fs';
import {
  appendFile,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  rename,
  rm,
  stat,
  truncate,
  writeFile,
} from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { after, before, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { AppError } from '../../src/model/errors.ts';
import { copyDisk, createDisk, deleteDisk, diskUsage } from '../../src/vm/disks.ts';
import {
  cleanLeftovers,
  type ImportOptions,
  imageFile,
  importImage,
  listImages,
  removeImage,
  verifyImage,
} from '../../src/vm/images.ts';

const MiB = 1024 * 1024;
const { signal } = new AbortController();
let work = '';
let sources = '';
/** A disk with random content, holes and an MBR. */
let rawSource = '';
let qcow2Source = '';

const shell = (command: string) => execFileSync('sh', ['-ec', command], { cwd: sources, encoding: 'utf8' });
const digestOf = async (file: string) =>
  `sha256:${createHash('sha256')
    .update(await readFile(file))
    .digest('hex')}`;
const read = (file: string) => createReadStream(file);
async function* bytes(...chunks: (string | Uint8Array)[]) {
  for (const chunk of chunks) yield Buffer.from(chunk);
}
const newDirectory = () => mkdtemp(join(work, 'case-'));
const importFrom = (root: string, file: string, options: Partial<ImportOptions> = {}) =>
  importImage(root, { source: read(file), signal, reserveBytes: 0, ...options });

/** Nothing of a refused import may stay, neither an image nor a half-written file. */
async function refuses(file: string, wanted: object, options: Partial<ImportOptions> = {}) {
  const root = await newDirectory();
  await assert.rejects(importFrom(root, file, options), wanted);
  assert.deepEqual(await listImages(root), []);
  const left = await readdir(join(root, 'tmp')).catch(() => []);
  assert.deepEqual(left, []);
}

before(async () => {
  work = await mkdtemp(join(tmpdir(), 'viper-images-'));
  sources = join(work, 'sources');
  await mkdir(sources);
  rawSource = join(sources, 'disk.raw');
  qcow2Source = join(sources, 'disk.qcow2');
  shell(`truncate -s 8M disk.raw
    printf '\\125\\252' | dd of=disk.raw bs=1 seek=510 conv=notrunc status=none
    head -c 3000000 /dev/urandom | dd of=disk.raw bs=4096 seek=256 conv=notrunc status=none
    qemu-img convert -f raw -O qcow2 disk.raw disk.qcow2`);
});

after(() => rm(work, { recursive: true, force: true }));

test('an image is stored read-only under the digest of its bytes', async () => {
  for (const [file, format] of [
    [rawSource, 'raw'],
    [qcow2Source, 'qcow2'],
  ] as const) {
    const root = await newDirectory();
    const progress: number[] = [];
    const digest = await digestOf(file);
    const { size } = await stat(file);
    const image = await importFrom(root, file, {
      sizeBytes: size,
      expectedDigest: digest,
      onProgress: (received) => progress.push(received),
    });
    assert.deepEqual(image, { digest, format, fileBytes: size, virtualBytes: 8 * MiB });
    assert.equal(progress.at(-1), size);
    const stored = imageFile(root, digest, format);
    assert.equal(stored, join(root, digest.replace(':', '-'), `disk.${format}`));
    assert.equal((await stat(stored)).mode & 0o777, 0o440);
    assert.equal(await digestOf(stored), digest);
    assert.deepEqual(await listImages(root), [{ digest, format }]);
    assert.deepEqual(await readdir(join(root, 'tmp')), []);
    await verifyImage(root, digest, format, signal);
  }
});

test('a raw image stays sparse', async () => {
  const root = await newDirectory();
  const { digest } = await importFrom(root, rawSource);
  const { blocks } = await stat(imageFile(root, digest, 'raw'));
  assert.ok(blocks * 512 < 4 * MiB, `${blocks * 512} bytes allocated`);
});

test('the same bytes again, one after the other or at once, give one image', async () => {
  const root = await newDirectory();
  const all = await Promise.all([1, 2, 3].map(() => importFrom(root, qcow2Source)));
  all.push(await importFrom(root, qcow2Source));
  assert.equal(new Set(all.map(({ digest }) => digest)).size, 1);
  assert.deepEqual(await listImages(root), [{ digest: all[0]?.digest, format: 'qcow2' }]);
  assert.deepEqual(await readdir(join(root, 'tmp')), []);
});

test('an image whose stored bytes decayed is found, and mended by importing it again', async () => {
  const root = await newDirectory();
  const { digest } = await importFrom(root, rawSource);
  await truncate(imageFile(root, digest, 'raw'), 4096);
  await assert.rejects(verifyImage(root, digest, 'raw', signal), { code: 'image_corrupt' });
  await importFrom(root, rawSource);
  await verifyImage(root, digest, 'raw', signal);
});

test('a removed image is gone, and removing it again is no error', async () => {
  const root = await newDirectory();
  const { digest } = await importFrom(root, rawSource);
  await removeImage(root, digest);
  await removeImage(root, digest);
  assert.deepEqual(await listImages(root), []);
  await assert.rejects(verifyImage(root, digest, 'raw', signal), { code: 'not_found' });
  await assert.rejects(removeImage(root, '../../etc'), { code: 'invalid_request' });
});

test('what announces itself wrongly is refused', async () => {
  const { size } = await stat(rawSource);
  await refuses(
    rawSource,
    { code: 'image_corrupt', message: /more than 8388607 bytes/ },
    { sizeBytes: size - 1 },
  );
  await refuses(
    rawSource,
    { code: 'image_corrupt', message: /8388608 bytes arrived/ },
    { sizeBytes: size + 1 },
  );
  await refuses(rawSource, { code: 'digest_mismatch' }, { expectedDigest: `sha256:${'0'.repeat(64)}` });
  await refuses(
    rawSource,
    { code: 'image_corrupt', message: /is raw, wanted the stated qcow2/ },
    { format: 'qcow2' },
  );
  await refuses(
    qcow2Source,
    { code: 'image_corrupt', message: /is qcow2, wanted the stated raw/ },
    { format: 'raw' },
  );
});

test('a sender that sends too much is stopped at once', async () => {
  let sent = 0;
  async function* endless() {
    for (;;) {
      sent += 65536;
      yield Buffer.alloc(65536, 1);
    }
  }
  await refuses(rawSource, { code: 'image_corrupt' }, { source: endless(), sizeBytes: MiB });
  assert.ok(sent <= 2 * MiB, `${sent} bytes were taken`);
});

test('files that are no disks are refused', async () => {
  const none = { code: 'image_corrupt', message: /no partition table/ };
  await refuses(rawSource, none, { source: bytes('hello\n'.repeat(1024)) });
  await refuses(rawSource, { code: 'image_corrupt', message: /0 bytes/ }, { source: bytes() });
  await refuses(rawSource, { code: 'image_corrupt' }, { source: bytes('QFI\xfb') });
  await refuses(
    rawSource,
    { code: 'image_corrupt' },
    { source: bytes(Buffer.from([0x51, 0x46, 0x49, 0xfb, 0, 0, 0, 3])) },
  );
});

test('qcow2 files that reach for other files or are encrypted are refused', async () => {
  shell(`qemu-img create -q -f qcow2 -F raw -b disk.raw backed.qcow2
    qemu-img create -q -f qcow2 -o data_file=data.bin,data_file_raw=on external.qcow2 1M
    qemu-img create -q -f qcow2 --object secret,id=s,data=abc -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 locked.qcow2 1M`);
  await refuses(join(sources, 'backed.qcow2'), { code: 'image_corrupt', message: /backing file 'disk.raw'/ });
  await refuses(join(sources, 'external.qcow2'), { code: 'image_corrupt', message: /another file/ });
  await refuses(join(sources, 'locked.qcow2'), { code: 'image_corrupt', message: /encrypted/ });
});

test('honest qcow2 variants are taken', async () => {
  const root = await newDirectory();
  const variants = [
    '-c',
    '-c -o compression_type=zstd',
    '-o compat=0.10',
    '-o extended_l2=on',
    '-o cluster_size=512',
    '-o cluster_size=2M',
    '-o preallocation=metadata',
    '-o lazy_refcounts=on',
    '-o refcount_bits=1',
  ];
  for (const [i, variant] of variants.entries()) {
    const file = join(sources, `variant${i}.qcow2`);
    shell(`qemu-img convert -f raw -O qcow2 ${variant} disk.raw ${file}`);
    const { virtualBytes } = await importFrom(root, file);
    assert.equal(virtualBytes, 8 * MiB, variant);
  }
  const odd = join(sources, 'odd.qcow2');
  shell(`qemu-img create -q -f qcow2 ${odd} 1049088
    qemu-io -f qcow2 -c 'write -P 1 1048576 512' ${odd} >/dev/null
    qemu-img snapshot -c first ${odd}
    qemu-io -f qcow2 -c 'write -P 2 4096 512' ${odd} >/dev/null`);
  assert.equal((await importFrom(root, odd)).virtualBytes, 1_049_088);
  shell('qemu-img create -q -f qcow2 empty.qcow2 1T');
  assert.equal((await importFrom(root, join(sources, 'empty.qcow2'))).virtualBytes, MiB * MiB);
});

test('a download that lost its end is refused, be it by one sector', async () => {
  shell('qemu-img convert -f raw -c -O qcow2 disk.raw packed.qcow2');
  for (const name of ['disk.qcow2', 'packed.qcow2'])
    for (const lostBytes of [512, 4096, 70_000, 1_000_000]) {
      const file = join(sources, `cut-${lostBytes}-${name}`);
      shell(`cp ${name} ${file}; truncate -s -${lostBytes} ${file}`);
      await refuses(file, { code: 'image_corrupt' });
    }
});

test('damaged tables are refused', async () => {
  const { virtualBytes } = await importFrom(await newDirectory(), qcow2Source);
  assert.equal(virtualBytes, 8 * MiB);
  const whole = await readFile(qcow2Source);
  const l1Offset = Number(whole.readBigUInt64BE(40));
  const damaged = Buffer.from(whole);
  damaged.writeBigUInt64BE(0x7fff_ffff_ffff_0000n, l1Offset);
  await refuses(qcow2Source, { code: 'image_corrupt' }, { source: bytes(damaged) });
  const refcountless = Buffer.from(whole);
  refcountless.fill(0, 65536, 65536 + 8);
  await refuses(qcow2Source, { code: 'image_corrupt' }, { source: bytes(refcountless) });
});

test('flipped bits in the tables are refused or harmless, never a crash', async () => {
  const whole = await readFile(qcow2Source);
  const root = await newDirectory();
  let seed = 42;
  for (let i = 0; i < 20; i += 1) {
    seed = (seed * 1_103_515_245 + 12_345) % 2 ** 31;
    const flipped = Buffer.from(whole);
    const at = seed % (5 * 65536);
    flipped[at] = (flipped[at] ?? 0) ^ (1 << (i % 8));
    await importFrom(root, qcow2Source, { source: bytes(flipped) }).catch((error: unknown) => {
      assert.ok(error instanceof AppError && error.code === 'image_corrupt', `byte ${at}: ${error}`);
    });
  }
});

test('an import is cancelled at any time, also while its sender is silent', async () => {
  async function* silent() {
    yield Buffer.alloc(MiB, 1);
    await new Promise(() => {});
  }
  await refuses(rawSource, { code: 'cancelled' }, { source: silent(), signal: AbortSignal.timeout(50) });
  await refuses(rawSource, { code: 'cancelled' }, { signal: AbortSignal.abort() });
  async function* broken() {
    yield Buffer.alloc(MiB, 1);
    throw new Error('aborted');
  }
  await refuses(rawSource, { code: 'cancelled', message: /the sender broke off/ }, { source: broken() });
});

test('too little space is told before the first byte', async () => {
  let asked = false;
  async function* watched() {
    asked = true;
    yield Buffer.alloc(512);
  }
  const wanted = { code: 'insufficient_space' };
  await refuses(rawSource, wanted, { source: watched(), sizeBytes: 2 ** 50 });
  await refuses(rawSource, wanted, { source: watched(), reserveBytes: 2 ** 50 });
  assert.equal(asked, false);
});

test('what a killed import left is cleaned at the next start', async () => {
  const root = await newDirectory();
  const module = new URL('../../src/vm/images.ts', import.meta.url).href;
  const script = `
    import { importImage } from '${module}';
    async function* endless() { for (;;) { yield Buffer.alloc(65536, 1); await new Promise((r) => setTimeout(r, 5)); } }
    await importImage('${root}', { source: endless(), signal: new AbortController().signal });`;
  const child = spawn(process.execPath, ['--input-type=module-typescript', '-e', script], {
    stdio: 'inherit',
  });
  const ended = new Promise((resolve) => child.once('exit', resolve));
  const half = async () => {
    const [name] = await readdir(join(root, 'tmp')).catch(() => []);
    return (
      name !== undefined && (await stat(join(root, 'tmp', name, 'disk')).catch(() => ({ size: 0 }))).size > 0
    );
  };
  while (!(await half())) {
    assert.equal(child.exitCode, null);
    await sleep(20);
  }
  child.kill('SIGKILL');
  await ended;
  assert.equal(await cleanLeftovers(root), 1);
  assert.equal(await cleanLeftovers(root), 0);
  assert.deepEqual(await readdir(join(root, 'tmp')), []);
  assert.equal(await cleanLeftovers(join(root, 'nowhere')), 0);
});

/** A state directory with both images and a directory for one VM. */
async function newState() {
  const state = await newDirectory();
  const root = join(state, 'images');
  await mkdir(join(state, 'vms', 'a'), { recursive: true });
  await mkdir(join(state, 'vms', 'b'), { recursive: true });
  const images = [await importFrom(root, rawSource), await importFrom(root, qcow2Source)];
  return { state, root, images, disk: (vm: string) => join(state, 'vms', vm, 'disk.qcow2') };
}

const qemuIo = (file: string, ...commands: string[]) =>
  execFileSync('qemu-io', ['-f', 'qcow2', ...commands.flatMap((command) => ['-c', command]), file], {
    encoding: 'utf8',
  });
const sameContent = (a: string, formatA: string, b: string, formatB: string) =>
  execFileSync('qemu-img', ['compare', '-f', formatA, '-F', formatB, a, b], { encoding: 'utf8' });

test('a disk shows its image, is larger if asked, and moves with the state directory', async () => {
  const { state, root, images, disk } = await newState();
  for (const { digest, format } of images) {
    const file = disk('a');
    await createDisk({
      file,
      imageFile: imageFile(root, digest, format),
      imageFormat: format,
      sizeBytes: 16 * MiB,
      signal,
    });
    assert.match(sameContent(file, 'qcow2', rawSource, 'raw'), /identical/);
    const usage = await diskUsage(file);
    assert.equal(usage.virtualBytes, 16 * MiB);
    assert.ok(usage.allocatedBytes < MiB);
    const { 'backing-filename': backing, 'backing-filename-format': backingFormat } = JSON.parse(
      execFileSync('qemu-img', ['info', '--output=json', file], { encoding: 'utf8' }),
    );
    assert.equal(backing, `../../images/${digest.replace(':', '-')}/disk.${format}`);
    assert.equal(backingFormat, format);
  }
  const moved = `${state}-moved`;
  await rename(state, moved);
  assert.match(sameContent(join(moved, 'vms', 'a', 'disk.qcow2'), 'qcow2', rawSource, 'raw'), /identical/);
});

test('a disk smaller than its image is refused by field, value and what was wanted', async () => {
  const { root, images, disk } = await newState();
  for (const { digest, format } of images)
    for (const sizeBytes of [8 * MiB - 512, 8 * MiB + 1, Number.NaN, -512]) {
      const options = { file: disk('a'), imageFile: imageFile(root, digest, format), imageFormat: format };
      await assert.rejects(createDisk({ ...options, sizeBytes, signal }), {
        code: 'invalid_request',
        message: /disk\.sizeBytes is .*, wanted a multiple of 512, at least the 8388608 bytes of the image/,
      });
    }
  assert.equal(existsSync(disk('a')), false);
});

test('a copied disk has the content of its own, wherever it lies', async () => {
  const { state, root, images, disk } = await newState();
  const deep = join(state, 'snapshots', 'deep', 'er', 'disk.qcow2');
  await mkdir(dirname(deep), { recursive: true });
  for (const { digest, format } of images) {
    const from = disk('a');
    await createDisk({
      file: from,
      imageFile: imageFile(root, digest, format),
      imageFormat: format,
      sizeBytes: 8 * MiB,
      signal,
    });
    qemuIo(from, 'write -P 7 1M 1M');
    for (const to of [disk('b'), deep]) {
      await copyDisk({ from, to, signal });
      assert.match(sameContent(from, 'qcow2', to, 'qcow2'), /identical/);
      qemuIo(to, 'write -P 9 1M 64k');
      assert.match(qemuIo(from, 'read -P 7 1M 1M'), /read 1048576/);
      await deleteDisk(to);
      await deleteDisk(to);
      assert.equal(existsSync(to), false);
    }
  }
});

test('names that QEMU could take for a protocol or options are taken as names', async () => {
  const { root, images, state } = await newState();
  const image = images[1]!;
  const directory = join(state, 'vms', 'nbd:x,file=y json:{} %s');
  await mkdir(directory);
  const file = join(directory, 'disk.qcow2');
  await createDisk({
    file,
    imageFile: imageFile(root, image.digest, 'qcow2'),
    imageFormat: 'qcow2',
    sizeBytes: 8 * MiB,
    signal,
  });
  const beside = join(directory, 'nbd:odd.qcow2');
  await copyDisk({ from: file, to: beside, signal });
  assert.match(sameContent(beside, 'qcow2', rawSource, 'raw'), /identical/);
  const onOdd = join(directory, 'upper.qcow2');
  await createDisk({ file: onOdd, imageFile: beside, imageFormat: 'qcow2', sizeBytes: 8 * MiB, signal });
  assert.match(sameContent(onOdd, 'qcow2', rawSource, 'raw'), /identical/);
});

test('a reserve that is not free is told before anything is made', async () => {
  const { root, images, disk } = await newState();
  const image = images[0]!;
  const options = {
    imageFile: imageFile(root, image.digest, 'raw'),
    imageFormat: 'raw',
    sizeBytes: 8 * MiB,
  } as const;
  const wanted = { code: 'insufficient_space', message: /Create disk: .* are free, wanted/ };
  await assert.rejects(createDisk({ file: disk('a'), ...options, reserveBytes: 2 ** 50, signal }), wanted);
  await createDisk({ file: disk('a'), ...options, signal });
  await assert.rejects(copyDisk({ from: disk('a'), to: disk('b'), reserveBytes: 2 ** 50, signal }), {
    code: 'insufficient_space',
  });
  assert.deepEqual(await readdir(dirname(disk('b'))), []);
});

test('a disk that fills up on the way gives insufficient_space and leaves nothing', async (t) => {
  if (process.getuid?.() !== 0) return t.skip('mounting a small file system needs root');
  const full = await newDirectory();
  execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=4m', 'viper-test', full]);
  try {
    const noSpace = { code: 'insufficient_space' };
    const random = execFileSync('head', ['-c', String(6 * MiB), '/dev/urandom'], { maxBuffer: 8 * MiB });
    await assert.rejects(importImage(full, { source: bytes(random), signal, reserveBytes: 0 }), noSpace);
    assert.deepEqual(await readdir(join(full, 'tmp')), []);

    const { root, images, disk } = await newState();
    const image = images[0]!;
    const imagePath = imageFile(root, image.digest, 'raw');
    await createDisk({
      file: disk('a'),
      imageFile: imagePath,
      imageFormat: 'raw',
      sizeBytes: 8 * MiB,
      signal,
    });
    qemuIo(disk('a'), 'write -P 7 0 6M');
    await assert.rejects(
      copyDisk({ from: disk('a'), to: join(full, 'b.qcow2'), reserveBytes: 0, signal }),
      noSpace,
    );

    // Enough free by the first look, gone by the time of the write.
    await assert.rejects(
      copyDisk({ from: disk('a'), to: join(full, 'b.qcow2'), reserveBytes: -64 * MiB, signal }),
      noSpace,
    );
    await writeFile(join(full, 'filler'), random).catch(() => {});
    await appendFile(join(full, 'filler'), Buffer.alloc(4096)).catch(() => {});
    const into = {
      file: join(full, 'c.qcow2'),
      imageFile: imagePath,
      imageFormat: 'raw',
      sizeBytes: 8 * MiB,
    } as const;
    await assert.rejects(createDisk({ ...into, reserveBytes: -64 * MiB, signal }), noSpace);
    assert.deepEqual((await readdir(full)).sort(), ['filler', 'tmp']);
  } finally {
    execFileSync('umount', [full]);
  }
});
