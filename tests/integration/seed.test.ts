/** Seed disks as a guest sees them: written by the real xorriso and read back from the ISO. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdir, mkdtemp, open, readdir, readFile, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type { SeedSpec } from '../../src/model/vm.ts';
import { createSeed } from '../../src/vm/seed.ts';
import { seedFiles } from '../../src/vm/seed-files.ts';

const { signal } = new AbortController();
const instanceId = '7b0c1c1e-8a54-4d0a-9f0c-2f4a39f0a001';
const mac = '02:00:00:00:00:01';
const spec: SeedSpec = {
  hostname: 'guest-1',
  sshKeys: ["ssh-ed25519 AAAA Bob's laptop", 'ssh-rsa BBBB größe'],
  addresses: [{ mac, address: '10.0.0.2/24', gateway: '10.0.0.1' }],
};
let work = '';

before(async () => {
  work = await mkdtemp(join(tmpdir(), 'viper-seed-'));
});
after(() => rm(work, { recursive: true, force: true }));

async function readBack(iso: string): Promise<Record<string, string>> {
  const tree = await mkdtemp(join(work, 'tree-'));
  execFileSync('xorriso', ['-no_rc', '-osirrox', 'on', '-indev', iso, '-extract', '/', tree], {
    stdio: 'ignore',
  });
  const files: Record<string, string> = {};
  for (const name of await readdir(tree)) files[name] = await readFile(join(tree, name), 'utf8');
  execFileSync('chmod', ['-R', 'u+w', tree]);
  return files;
}

/** The volume label stands in the primary volume descriptor: sector 16, bytes 40 to 71 (ECMA-119, 8.4). */
async function label(iso: string): Promise<string> {
  await using handle = await open(iso);
  const { buffer } = await handle.read(Buffer.alloc(32), 0, 32, 16 * 2048 + 40);
  return buffer.toString('latin1').trim();
}

test('the disk has the label that cloud-init looks for, and every file with its whole name', async () => {
  const file = join(work, 'seed.iso');
  const facts = { spec, instanceId, macs: [mac, '02:00:00:00:00:02'] };
  await createSeed({ file, ...facts, signal });
  assert.equal(await label(file), 'cidata');
  const files = await readBack(file);
  assert.deepEqual(Object.keys(files).sort(), ['meta-data', 'network-config', 'user-data', 'viper.env']);
  assert.deepEqual(files, seedFiles(facts));
  assert.equal((await stat(file)).mode & 0o777, 0o640);
});

test('the same facts give the same bytes, at another time and in another place', async () => {
  const [one, two] = [join(work, 'one.iso'), join(work, 'other', 'two.iso')];
  await mkdir(join(work, 'other'));
  await createSeed({ file: one, spec, instanceId, signal });
  // Dates on the disk count seconds: without this both might be made in the same one.
  await sleep(1100);
  await createSeed({ file: two, spec, instanceId, signal });
  assert.ok((await readFile(one)).equals(await readFile(two)));
});

test('a new seed takes the place of the old one, and a failed one leaves it', async () => {
  const directory = await mkdtemp(join(work, 'again-'));
  const file = join(directory, 'seed.iso');
  await createSeed({ file, spec, instanceId, signal });
  const userData = '#!/bin/sh\necho "hello"\n';
  await createSeed({ file, spec: { ...spec, userData }, instanceId, signal });
  assert.equal((await readBack(file))['user-data'], userData);
  const cancelled = AbortSignal.abort();
  await assert.rejects(createSeed({ file, spec, instanceId, signal: cancelled }), { code: 'cancelled' });
  await assert.rejects(createSeed({ file, spec: { ...spec, hostname: "x'" }, instanceId, signal }), {
    code: 'invalid_request',
  });
  assert.equal((await readBack(file))['user-data'], userData);
  assert.deepEqual(await readdir(directory), ['seed.iso']);
});

test('cloud-init reads what is meant for it', async (t) => {
  const file = join(work, 'yaml.iso');
  await createSeed({ file, spec, instanceId, signal });
  const files = await readBack(file);
  const script = 'import json, sys, yaml; print(json.dumps(yaml.safe_load(sys.stdin.read())))';
  const parse = (text = '') =>
    JSON.parse(execFileSync('python3', ['-c', script], { input: text, encoding: 'utf8' }));
  try {
    parse('{}');
  } catch {
    return t.skip('PyYAML, which cloud-init reads with, is not installed');
  }
  assert.deepEqual(parse(files['user-data']).ssh_authorized_keys, spec.sshKeys);
  assert.deepEqual(parse(files['meta-data']), { 'instance-id': instanceId, 'local-hostname': 'guest-1' });
  assert.equal(parse(files['network-config']).ethernets.nic0.match.macaddress, mac);
});
