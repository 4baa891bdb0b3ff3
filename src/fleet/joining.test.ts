import assert from 'node:assert/strict';
import { X509Certificate } from 'node:crypto';
import { readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { admitMember, type JoinRequest } from './admission.ts';
import { createKey, createSigningRequest, readMember, signMember } from './certificates.ts';
import {
  type Answer,
  serveFounder,
  startMs,
  type TestCloudlet,
  testDirectory,
  testFounder,
  testMember,
  testServer,
} from './fixtures.ts';
import { loadCloudlet } from './identity.ts';
import { createJoinToken } from './join-token.ts';
import { joinFleet } from './joining.ts';

const dayMs = 24 * 3_600_000;
const token = (founder: TestCloudlet) => createJoinToken(founder.state, founder.identity).token;
const joining = (directory: string, founderUrl: string, joinToken: string) => ({
  directory,
  name: 'member',
  url: 'https://member.example:7443',
  founderUrl,
  token: joinToken,
});

/** Tries to join at a server, and checks that the directory is then as it was. */
async function refusedAt(founderUrl: string, joinToken: string, code: string): Promise<void> {
  await using parent = await testDirectory();
  const directory = join(parent.path, 'state');
  await assert.rejects(joinFleet(joining(directory, founderUrl, joinToken)), { code });
  assert.deepEqual(await readdir(parent.path), []);
}

describe('joining', () => {
  test('gives an identity of the fleet, and the peers that it has', async () => {
    await using founder = await testFounder();
    await using first = await testMember(founder, 'first');
    await using server = await serveFounder(founder);
    await using directory = await testDirectory();
    const { identity, peers } = await joinFleet(joining(directory.path, server.url, token(founder)));
    assert.deepEqual(await loadCloudlet(directory.path), identity);
    assert.equal(identity.fleetId, founder.identity.fleetId);
    assert.equal(identity.founderId, founder.identity.id);
    assert.equal(identity.caKey, undefined);
    assert.deepEqual(
      peers.map(({ id }) => id),
      [founder.identity.id, first.identity.id],
    );
    const certificate = new X509Certificate(identity.certificate);
    const member = readMember(certificate, new X509Certificate(founder.identity.caCertificate))!;
    assert.deepEqual([member.cloudletId, member.name, member.founderOf], [identity.id, 'member', undefined]);
    assert.equal(founder.peers.get(identity.id)!.url, 'https://member.example:7443');
  });

  test('passes on why the founder refuses', async () => {
    await using founder = await testFounder();
    await using _first = await testMember(founder, 'member');
    await using server = await serveFounder(founder);
    await refusedAt(server.url, token(founder), 'name_taken');
    await using elsewhere = await testFounder();
    const foreign = token({ ...elsewhere, identity: founder.identity });
    await refusedAt(server.url, foreign, 'unauthenticated');
  });

  test('where a cloudlet is already is refused before anybody is asked', async () => {
    await using founder = await testFounder();
    await using server = await serveFounder(founder);
    const attempt = joinFleet(joining(founder.identity.directory, server.url, token(founder)));
    await assert.rejects(attempt, { code: 'name_taken' });
    assert.equal(server.receivedBytes(), 0);
  });

  test('at nobody says so', async () => {
    await using founder = await testFounder();
    const server = await serveFounder(founder);
    await server[Symbol.asyncDispose]();
    await refusedAt(server.url, token(founder), 'peer_unreachable');
  });

  test('ends at once when it is aborted', async () => {
    await using founder = await testFounder();
    await using server = await serveFounder(founder);
    await using directory = await testDirectory();
    const signal = AbortSignal.abort(new Error('enough'));
    const attempt = joinFleet({ ...joining(directory.path, server.url, token(founder)), signal });
    await assert.rejects(attempt, { message: 'enough' });
    assert.deepEqual(await readdir(directory.path), []);
  });

  test('with a damaged token or URL is a bad request', async () => {
    await using founder = await testFounder();
    await refusedAt('https://127.0.0.1:1', `${token(founder)}x`, 'invalid_request');
    await refusedAt('http://127.0.0.1:1', token(founder), 'invalid_request');
  });
});

describe('the token is not given to', () => {
  /** Joins the founder's fleet at a server that is somebody else, who must not be told anything. */
  async function refusedUnheard(founder: TestCloudlet, tls: { key: string; cert: string }): Promise<void> {
    await using server = await testServer(tls, () => assert.fail('was asked'));
    await refusedAt(server.url, token(founder), 'peer_untrusted');
    assert.equal(server.receivedBytes(), 0);
  }

  test('the founder of another fleet', async () => {
    await using founder = await testFounder();
    await using other = await testFounder('other');
    await refusedUnheard(founder, other.identity.tls);
  });

  test('one who shows the right CA behind a certificate that it did not sign', async () => {
    await using founder = await testFounder();
    await using other = await testFounder('other');
    const { key, certificate } = other.identity;
    await refusedUnheard(founder, { key, cert: `${certificate}\n${founder.identity.caCertificate}` });
  });

  test('a member that is not the founder', async () => {
    await using founder = await testFounder();
    await using member = await testMember(founder, 'member');
    await refusedUnheard(founder, member.identity.tls);
  });

  test('a founder whose certificate has run out', async () => {
    await using founder = await testFounder('founder', () => Date.now() - 400 * dayMs);
    await refusedUnheard(founder, founder.identity.tls);
  });

  test('a founder whose certificate is not valid yet', async () => {
    await using founder = await testFounder('founder', () => Date.now() + dayMs);
    await refusedUnheard(founder, founder.identity.tls);
  });
});

describe('an answer is not taken', () => {
  const wrongAnswers: Record<string, (founder: TestCloudlet, request: JoinRequest) => Promise<unknown>> = {
    'with a certificate for another key': async (founder, request) => {
      const csr = await createSigningRequest('member', await createKey());
      return admitMember(founder, { ...request, csr });
    },
    'with a certificate for another cloudlet': (founder, request) =>
      admitMember(founder, { ...request, id: crypto.randomUUID() }),
    'with a certificate of another CA': async (founder, request) => {
      await using other = await testFounder('other');
      const { caCertificate, caKey } = other.identity;
      const ca = { certificate: caCertificate, key: caKey! };
      const certificate = await signMember(ca, request.csr, request, Date.now());
      return { ...(await admitMember(founder, request)), certificate, caCertificate };
    },
    'with a certificate that has run out': async (founder, request) => {
      const { caCertificate, caKey } = founder.identity;
      const ca = { certificate: caCertificate, key: caKey! };
      const certificate = await signMember(ca, request.csr, request, startMs - 800 * dayMs);
      return { ...(await admitMember(founder, request)), certificate };
    },
    'without peers': async (founder, request) => ({
      ...(await admitMember(founder, request)),
      peers: 'none',
    }),
    'without a fleet': async (founder, request) => ({ ...(await admitMember(founder, request)), fleetId: 7 }),
    'with nothing in it': async () => null,
  };

  for (const [name, answer] of Object.entries(wrongAnswers)) {
    test(name, async () => {
      await using founder = await testFounder();
      const reply: Answer = ({ body }) => answer(founder, body as JoinRequest);
      await using server = await testServer(founder.identity.tls, reply);
      await refusedAt(server.url, token(founder), 'peer_untrusted');
    });
  }
});
