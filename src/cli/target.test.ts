import assert from 'node:assert/strict';
import { mkdtempSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, test } from 'node:test';
import { addContext, contextsFile, readContexts } from './contexts.ts';
import { resolveTarget } from './target.ts';

const directory = mkdtempSync(join(tmpdir(), 'viper-target-'));
after(() => rmSync(directory, { recursive: true }));

const file = join(directory, 'new', 'config.json');
const env = { VIPER_CONFIG: file };
const tokenFile = join(directory, 'token');
const caFile = join(directory, 'ca.pem');
writeFileSync(tokenFile, 'from-file\n');
writeFileSync(caFile, 'PEM from file');
addContext(file, 'edge2', { url: 'https://edge2:7443/', token: 'two', ca: 'PEM 2' });
addContext(file, 'edge1', { url: 'https://edge1:7443', token: 'one' });

test('only the user can read the contexts', () => {
  assert.equal(statSync(file).mode & 0o777, 0o600);
  assert.equal(statSync(join(directory, 'new')).mode & 0o777, 0o700);
  assert.deepEqual(Object.keys(readContexts(file).contexts), ['edge2', 'edge1']);
});

test('the contexts are where XDG wants them, unless VIPER_CONFIG says else', () => {
  assert.equal(contextsFile({ XDG_CONFIG_HOME: '/xdg' }), '/xdg/viper/config.json');
  assert.match(contextsFile({ XDG_CONFIG_HOME: 'relative' }), /\/\.config\/viper\/config\.json$/);
  assert.equal(contextsFile(env), file);
});

test('the current context is used, or the one that is named', () => {
  assert.deepEqual(resolveTarget({}, env), { url: 'https://edge1:7443', token: 'one' });
  assert.deepEqual(resolveTarget({ context: 'edge2' }, env), {
    url: 'https://edge2:7443/',
    token: 'two',
    ca: 'PEM 2',
  });
  assert.throws(
    () => resolveTarget({ context: 'edge3' }, env),
    /There is no context 'edge3'.*known: edge2, edge1/,
  );
});

test('options count more than the environment, and that more than the context', () => {
  const full = { ...env, VIPER_URL: 'https://env:1', VIPER_TOKEN: 'env', VIPER_CA: caFile };
  assert.deepEqual(resolveTarget({}, full), { url: 'https://env:1', token: 'env', ca: 'PEM from file' });
  const target = resolveTarget({ url: 'https://opt:1', tokenFile }, { ...full, VIPER_CA: '' });
  assert.deepEqual(target, { url: 'https://opt:1', token: 'from-file' });
  assert.equal(
    resolveTarget({ context: 'edge1' }, { ...env, VIPER_URL: 'https://env:1' }).url,
    'https://edge1:7443',
  );
});

test('the token and the CA of a context never go to another URL', () => {
  assert.deepEqual(resolveTarget({ url: 'https://evil:7443' }, env), { url: 'https://evil:7443' });
  assert.deepEqual(resolveTarget({ url: 'https://edge2:7443', context: 'edge2' }, env).token, 'two');
  assert.deepEqual(resolveTarget({}, { ...env, VIPER_URL: 'https://edge1:7443/' }).token, 'one');
});

test('what cannot be used is told with what names it', () => {
  assert.throws(
    () => resolveTarget({}, { VIPER_CONFIG: join(directory, 'none') }),
    /No daemon is known: pass --url/,
  );
  assert.throws(() => resolveTarget({ url: 'https://a', token: 'x', tokenFile }, env), /either --token or/);
  assert.throws(
    () => resolveTarget({ tokenFile: `${tokenFile}x` }, env),
    /Cannot read '.*tokenx', which --token-file/,
  );
  assert.throws(
    () => resolveTarget({}, { ...env, VIPER_CA: '/none' }),
    /Cannot read '\/none', which VIPER_CA names/,
  );
  writeFileSync(join(directory, 'broken'), '{"contexts":{"a":{}}}');
  assert.throws(() => resolveTarget({}, { VIPER_CONFIG: join(directory, 'broken') }), /cannot be understood/);
});
