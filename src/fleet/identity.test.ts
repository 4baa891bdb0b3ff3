import assert from 'node:assert/strict';
import { X509Certificate } from 'node:crypto';
import { chmod, mkdir, readdir, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { signRenewal } from './admission.ts';
import { readMember } from './certificates.ts';
import { startMs, testDirectory, testFounder, testMember } from './fixtures.ts';
import { createCloudlet } from './founding.ts';
import { certificateExpiresInDays, loadCloudlet, replaceCertificate } from './identity.ts';
import { renewCertificate } from './renewal.ts';

const url = 'https://edge-1.example:7443';

describe('a new cloudlet', () => {
  test('is read back as it was made', async () => {
    await using directory = await testDirectory();
    const made = await createCloudlet({ directory: directory.path, name: 'edge-1', url: `${url}/` });
    assert.deepEqual(await loadCloudlet(directory.path), made);
    assert.equal(made.url, url);
    assert.deepEqual(await readdir(directory.path), ['identity']);
  });

  test('has a certificate of its own CA that names its id, its host and both uses', async () => {
    await using directory = await testDirectory();
    const made = await createCloudlet({ directory: directory.path, name: 'edge-1', url, now: () => startMs });
    const certificate = new X509Certificate(made.certificate);
    const ca = new X509Certificate(made.caCertificate);
    assert.equal(certificate.subject, 'CN=edge-1');
    assert.equal(
      certificate.subjectAltName,
      `URI:urn:viper:cloudlet:${made.id}, URI:urn:viper:founder:${made.fleetId}, DNS:localhost, DNS:edge-1.example, IP Address:127.0.0.1`,
    );
    assert.deepEqual(certificate.keyUsage, ['1.3.6.1.5.5.7.3.1', '1.3.6.1.5.5.7.3.2']);
    assert.deepEqual([certificate.ca, ca.ca], [false, true]);
    assert.equal(readMember(certificate, ca)!.cloudletId, made.id);
    assert.equal(Math.round(certificateExpiresInDays(made, startMs)), 365);
  });

  test('whose URL has an address gets it as an address', async () => {
    for (const [address, shown] of [
      ['https://10.1.2.3:7443', '10.1.2.3'],
      ['https://[fd00::1]:7443', 'FD00:0:0:0:0:0:0:1'],
    ] as const) {
      await using directory = await testDirectory();
      const made = await createCloudlet({ directory: directory.path, name: 'a', url: address });
      const names = new X509Certificate(made.certificate).subjectAltName!;
      assert.ok(names.endsWith(`DNS:localhost, IP Address:127.0.0.1, IP Address:${shown}`), names);
    }
  });

  test('keeps its keys to itself', async () => {
    await using founder = await testFounder();
    const identity = join(founder.identity.directory, 'identity');
    assert.equal((await stat(identity)).mode & 0o777, 0o700);
    for (const file of ['cloudlet.key', 'ca.key']) {
      assert.equal((await stat(join(identity, file))).mode & 0o777, 0o600, file);
    }
  });

  test('is refused where one is, and what is there stays', async () => {
    await using founder = await testFounder();
    const { directory } = founder.identity;
    await assert.rejects(createCloudlet({ directory, name: 'other', url }), { code: 'name_taken' });
    assert.equal((await loadCloudlet(directory)).name, 'founder');
    assert.deepEqual(await readdir(directory), ['identity']);
  });

  test('wins alone when several are made at once, and the others leave nothing', async () => {
    await using directory = await testDirectory();
    const made = await Promise.allSettled(
      ['a', 'b', 'c'].map((name) => createCloudlet({ directory: directory.path, name, url })),
    );
    assert.equal(made.filter(({ status }) => status === 'fulfilled').length, 1);
    for (const each of made) if (each.status === 'rejected') assert.equal(each.reason.code, 'name_taken');
    assert.deepEqual(await readdir(directory.path), ['identity']);
  });

  test('with a bad name or URL is refused and leaves no directory', async () => {
    await using parent = await testDirectory();
    const directory = join(parent.path, 'a', 'b');
    const bad = [
      ['Edge_1', url],
      ['edge-1', 'http://edge-1.example'],
      ['edge-1', 'https://edge-1.example/path'],
      ['edge-1', 'https://user@edge-1.example'],
      ['edge-1', 'edge-1.example:7443'],
      ['edge-1', `https://${'a'.repeat(300)}.example`],
    ] as const;
    for (const [name, badUrl] of bad) {
      await assert.rejects(
        createCloudlet({ directory, name, url: badUrl }),
        { code: 'invalid_request' },
        badUrl,
      );
    }
    assert.deepEqual(await readdir(parent.path), []);
  });
});

describe('loading', () => {
  test('an empty directory says that there is no cloudlet', async () => {
    await using directory = await testDirectory();
    await assert.rejects(loadCloudlet(directory.path), { code: 'not_initialised' });
    await mkdir(join(directory.path, 'identity'));
    await assert.rejects(loadCloudlet(directory.path), { code: 'not_initialised' });
  });

  test('refuses a key that others can read, and says what to do', async () => {
    await using founder = await testFounder();
    const { directory } = founder.identity;
    for (const file of ['cloudlet.key', 'ca.key']) {
      const path = join(directory, 'identity', file);
      await chmod(path, 0o640);
      await assert.rejects(loadCloudlet(directory), {
        code: 'wrong_state',
        message: `Others can read the key ${path}. Run: chmod 600 ${path}`,
      });
      await chmod(path, 0o600);
    }
    await loadCloudlet(directory);
  });

  test('refuses files that do not belong together', async () => {
    await using other = await testFounder('other');
    const cases: [string, string][] = [
      ['cloudlet.json', '{'],
      ['cloudlet.json', '{"id":"x"}'],
      ['cloudlet.key', other.identity.key],
      ['cloudlet.key', 'no key'],
      ['cloudlet.crt', other.identity.certificate],
      ['cloudlet.crt', ''],
      ['ca.crt', other.identity.caCertificate],
      ['ca.key', other.identity.caKey!],
    ];
    for (const [file, content] of cases) {
      await using founder = await testFounder();
      const { directory } = founder.identity;
      await writeFile(join(directory, 'identity', file), content);
      await assert.rejects(loadCloudlet(directory), { code: 'wrong_state' }, file);
    }
  });

  test('lets an expired certificate through, so that it can be renewed', async () => {
    await using founder = await testFounder('founder', () => startMs - 800 * 24 * 3_600_000);
    const loaded = await loadCloudlet(founder.identity.directory);
    assert.ok(certificateExpiresInDays(loaded, startMs) < 0);
  });
});

describe('renewing', () => {
  test('keeps id, key and names, and moves the end', async () => {
    await using founder = await testFounder('founder', () => startMs);
    const later = startMs + 300 * 24 * 3_600_000;
    const renewed = await renewCertificate(founder.identity, { now: () => later });
    assert.deepEqual(await loadCloudlet(founder.identity.directory), renewed);
    assert.equal(Math.round(certificateExpiresInDays(renewed, later)), 365);
    const names = [founder.identity, renewed].map(
      (each) => new X509Certificate(each.certificate).subjectAltName,
    );
    assert.equal(names[0], names[1]);
    assert.equal(renewed.key, founder.identity.key);
  });

  test('a member wants somebody who signs', async () => {
    await using founder = await testFounder();
    await using member = await testMember(founder, 'member');
    await assert.rejects(renewCertificate(member.identity), { code: 'unsupported' });
    const cloudletId = member.identity.id;
    const renewed = await renewCertificate(member.identity, {
      sign: (csr) => signRenewal(founder, { cloudletId, csr }),
    });
    assert.notEqual(renewed.certificate, member.identity.certificate);
    assert.deepEqual(await loadCloudlet(member.identity.directory), renewed);
  });

  test('keeps the old certificate when what comes back is not good', async () => {
    await using founder = await testFounder();
    const { identity } = founder;
    await using other = await testFounder('other');
    const wrong = ['', other.identity.certificate];
    for (const certificate of wrong) {
      const renewal = renewCertificate(identity, { sign: async () => certificate });
      await assert.rejects(renewal, { code: 'peer_untrusted' });
    }
    assert.deepEqual(await loadCloudlet(identity.directory), identity);
  });

  test('leaves no other file behind', async () => {
    await using founder = await testFounder();
    const directory = join(founder.identity.directory, 'identity');
    const before = await readdir(directory);
    await replaceCertificate(founder.identity, founder.identity.certificate);
    assert.deepEqual(await readdir(directory), before);
  });
});
