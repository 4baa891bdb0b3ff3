import 'reflect-metadata';
import assert from 'node:assert/strict';
import { createPrivateKey, X509Certificate } from 'node:crypto';
import { describe, test } from 'node:test';
import * as x509 from '@peculiar/x509';
import fc from 'fast-check';
import { newId } from '../model/ids.ts';
import { admitMember, type JoinRequest, signRenewal } from './admission.ts';
import { createKey, createSigningRequest, readMember, signMember } from './certificates.ts';
import { joinRequest, startMs, type TestCloudlet, testFounder, testMember } from './fixtures.ts';
import { createJoinToken } from './join-token.ts';

const hourMs = 3_600_000;
const key = await createKey();
const token = (founder: TestCloudlet, expiresInS?: number) =>
  createJoinToken(founder.state, founder.identity, { expiresInS, now: () => startMs }).token;

/** Asks to be admitted at a time. */
const admit = (founder: TestCloudlet, request: JoinRequest, nowMs = startMs) =>
  admitMember({ ...founder, now: () => nowMs }, request);

describe('a join token', () => {
  test('admits one cloudlet; who replays it gets nothing', async () => {
    await using founder = await testFounder('founder', () => startMs);
    const request = await joinRequest(token(founder), key);
    await admit(founder, request);
    await assert.rejects(admit(founder, request), { code: 'unauthenticated' });
    await assert.rejects(admit(founder, { ...request, id: newId(), name: 'second' }), {
      code: 'unauthenticated',
    });
    assert.equal(founder.peers.list().length, 1);
  });

  test('admits one of those who bring it at the same time', async () => {
    await using founder = await testFounder('founder', () => startMs);
    const shared = token(founder);
    const requests = await Promise.all(['a', 'b', 'c'].map((name) => joinRequest(shared, key, { name })));
    const outcomes = await Promise.allSettled(requests.map((request) => admit(founder, request)));
    assert.deepEqual(outcomes.map(({ status }) => status).sort(), ['fulfilled', 'rejected', 'rejected']);
    assert.equal(founder.peers.list().length, 1);
  });

  test('is good until it expires', async () => {
    await using founder = await testFounder('founder', () => startMs);
    const request = await joinRequest(token(founder), key);
    await assert.rejects(admit(founder, request, startMs + hourMs), { code: 'unauthenticated' });
    await admit(founder, request, startMs + hourMs - 1);
  });

  test('is not used up by a request that is refused', async () => {
    await using founder = await testFounder('founder', () => startMs);
    const request = await joinRequest(token(founder), key);
    await assert.rejects(admit(founder, { ...request, name: 'founder' }), { code: 'name_taken' });
    await assert.rejects(admit(founder, { ...request, csr: 'none' }), { code: 'invalid_request' });
    await admit(founder, request);
  });

  test('is made by the founder alone, for 30 days at most', async () => {
    await using founder = await testFounder();
    await using member = await testMember(founder, 'member');
    assert.throws(() => createJoinToken(member.state, member.identity), { code: 'unsupported' });
    for (const expiresInS of [0, -1, 30 * 24 * 3600 + 1, Number.NaN]) {
      assert.throws(() => token(founder, expiresInS), { code: 'invalid_request' });
    }
    const { expiresAt } = createJoinToken(founder.state, founder.identity, { now: () => startMs });
    assert.equal(expiresAt, '2026-01-01T01:00:00.000Z');
  });

  test('that is damaged anywhere is refused', async () => {
    await using founder = await testFounder('founder', () => startMs);
    const good = token(founder);
    const request = await joinRequest(good, key);
    await fc.assert(
      fc.asyncProperty(fc.nat(46), fc.constantFrom('A', 'z', '.', ' '), async (at, other) => {
        fc.pre(good[at] !== other);
        const bad = good.slice(0, at) + other + good.slice(at + 1);
        await assert.rejects(admit(founder, { ...request, token: bad }), /token/);
      }),
    );
    assert.equal(founder.peers.list().length, 0);
  });
});

describe('a member', () => {
  test('cannot take an id or a name that the fleet has', async () => {
    await using founder = await testFounder('founder', () => startMs);
    const first = await joinRequest(token(founder), key, { name: 'first' });
    await admit(founder, first);
    for (const clash of [
      { name: 'first' },
      { id: first.id },
      { id: founder.identity.id },
      { name: 'founder' },
    ]) {
      const request = await joinRequest(token(founder), key, { name: 'second', ...clash });
      await assert.rejects(admit(founder, request), { code: 'name_taken' }, JSON.stringify(clash));
    }
  });

  test('needs a good id, name and URL', async () => {
    await using founder = await testFounder('founder', () => startMs);
    const bad = [
      { id: 'x' },
      { name: 'No' },
      { url: 'https://a/b' },
      { url: 'https://a b' },
      { name: 'a, CN=founder' },
    ];
    for (const each of bad) {
      const request = await joinRequest(token(founder), key, each);
      await assert.rejects(admit(founder, request), { code: 'invalid_request' }, JSON.stringify(each));
    }
  });

  test('that was removed can be admitted again', async () => {
    await using founder = await testFounder('founder', () => startMs);
    const request = await joinRequest(token(founder), key);
    await admit(founder, request);
    founder.peers.remove(request.id, startMs);
    await admit(founder, { ...request, token: token(founder) });
    assert.equal(founder.peers.isRemoved(request.id), false);
  });

  test('is certified as what it was admitted as, not as what its request says', async () => {
    await using founder = await testFounder('founder', () => startMs);
    const csr = await createSigningRequest('founder', key);
    const request = await joinRequest(token(founder), key, { csr });
    const { certificate } = await admit(founder, request);
    const ca = new X509Certificate(founder.identity.caCertificate);
    const member = readMember(new X509Certificate(certificate), ca)!;
    assert.deepEqual([member.cloudletId, member.name, member.founderOf], [request.id, 'member', undefined]);
  });

  test('is asked to join elsewhere by a cloudlet that is not the founder', async () => {
    await using founder = await testFounder();
    await using member = await testMember(founder, 'member');
    const request = await joinRequest(token(founder), key);
    await assert.rejects(admitMember(member, request), { code: 'unsupported' });
  });

  test('is renewed by the founder, unless it was removed', async () => {
    await using founder = await testFounder();
    await using member = await testMember(founder, 'member');
    const cloudletId = member.identity.id;
    const csr = await createSigningRequest('member', member.identity.key);
    const renewed = new X509Certificate(await signRenewal(founder, { cloudletId, csr }));
    assert.equal(renewed.subjectAltName, new X509Certificate(member.identity.certificate).subjectAltName);
    founder.peers.remove(cloudletId, startMs);
    await assert.rejects(signRenewal(founder, { cloudletId, csr }), { code: 'not_found' });
  });
});

describe('a certificate request', () => {
  test('with any byte changed is refused, or it was a byte of the wrapping and the same key is signed', async () => {
    await using founder = await testFounder();
    const ca = { certificate: founder.identity.caCertificate, key: founder.identity.caKey! };
    const member = { id: newId(), name: 'member', url: 'https://member.example' };
    const good = Buffer.from(
      new x509.Pkcs10CertificateRequest(await createSigningRequest('member', key)).rawData,
    );
    // Behind the outer length stands what is signed; the subject and the key are in its first 115 bytes.
    const isSigned = (at: number) => at >= 3 && at < 118;
    await fc.assert(
      fc.asyncProperty(fc.nat(good.length - 1), fc.integer({ min: 1, max: 255 }), async (at, flip) => {
        const bytes = Buffer.from(good);
        bytes[at]! ^= flip;
        const csr = x509.PemConverter.encode(bytes, 'CERTIFICATE REQUEST');
        const signing = signMember(ca, csr, member, startMs);
        if (isSigned(at)) return assert.rejects(signing, { code: 'invalid_request' });
        const signed = await signing.catch(({ code }) => assert.equal(code, 'invalid_request'));
        if (signed) assert.ok(new X509Certificate(signed).checkPrivateKey(createPrivateKey(key)));
      }),
      { numRuns: 300 },
    );
  });

  test('with a key of another kind is refused', async () => {
    await using founder = await testFounder('founder', () => startMs);
    const kinds = [
      { name: 'ECDSA', namedCurve: 'P-384', hash: 'SHA-256' },
      {
        name: 'RSASSA-PKCS1-v1_5',
        hash: 'SHA-256',
        publicExponent: new Uint8Array([1, 0, 1]),
        modulusLength: 2048,
      },
    ];
    for (const algorithm of kinds) {
      const keys = await crypto.subtle.generateKey(algorithm, false, ['sign', 'verify']);
      const made = await x509.Pkcs10CertificateRequestGenerator.create({
        name: 'CN=member',
        keys: keys as CryptoKeyPair,
        signingAlgorithm: algorithm,
      });
      const request = await joinRequest(token(founder), key, { csr: made.toString('pem') });
      await assert.rejects(admit(founder, request), /its key is no ECDSA key on P-256/);
    }
  });
});
