import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { DatabaseSync } from 'node:sqlite';
import { describe, test } from 'node:test';
import { Database, stateFileName } from './database.ts';
import { testDirectory, testImage, testVm } from './fixtures.ts';
import { Store } from './index.ts';
import { migrations } from './schema.ts';

/** Another process that does `body` with the Database class and says "ready". */
function spawnOwner(directory: string, body: string) {
  const source = `
    import { Database } from ${JSON.stringify(import.meta.resolve('./database.ts'))};
    import { migrations } from ${JSON.stringify(import.meta.resolve('./schema.ts'))};
    const directory = ${JSON.stringify(directory)};
    ${body}
    console.log('ready');
    setInterval(() => {}, 1000);`;
  return spawn(process.execPath, ['--input-type=module', '--eval', source], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
}

describe('the schema', () => {
  for (let version = 0; version < migrations.length; version += 1) {
    test(`is brought up from version ${version}, and what was there stays`, () => {
      using directory = testDirectory();
      const old = Database.open(directory.path, migrations.slice(0, version));
      if (version > 0) old.prepare('INSERT INTO meta VALUES (?, ?)').run('from', String(version));
      old.close();
      using store = new Store(directory.path);
      assert.equal(store.meta.get('from'), version > 0 ? String(version) : undefined);
      store.images.insert(testImage());
      store.vms.insert(testVm('a'));
      store.close();
      const sqlite = new DatabaseSync(join(directory.path, stateFileName));
      assert.equal(sqlite.prepare('PRAGMA user_version').get()!.user_version, migrations.length);
      sqlite.close();
    });
  }

  test('stays at the version before when a step fails', () => {
    using directory = testDirectory();
    const broken = { name: 'broken', sql: 'CREATE TABLE half (a); CREATE TABLE half (a)' };
    assert.throws(() => Database.open(directory.path, [...migrations, broken]), /already exists/);
    using database = Database.open(directory.path);
    assert.deepEqual(database.prepare("SELECT name FROM sqlite_schema WHERE name = 'half'").all(), []);
  });

  test('of a newer Viper is refused and its file is not touched, even with a WAL left by a crash', async () => {
    using directory = testDirectory();
    const owner = spawnOwner(
      directory.path,
      `Database.open(directory, [...migrations, { name: 'next', sql: 'CREATE TABLE next (a)' }]);`,
    );
    await once(owner.stdout, 'data');
    owner.kill('SIGKILL');
    await once(owner, 'exit');
    const path = join(directory.path, stateFileName);
    const before = [readFileSync(path), readFileSync(`${path}-wal`)];
    for (let attempt = 0; attempt < 2; attempt += 1) {
      assert.throws(() => new Store(directory.path), { code: 'state_too_new' });
      assert.deepEqual([readFileSync(path), readFileSync(`${path}-wal`)], before);
    }
  });
});

describe('the lock', () => {
  test('of another process refuses a second one, and falls with kill -9', async () => {
    using directory = testDirectory();
    new Store(directory.path).close();
    const owner = spawnOwner(directory.path, 'Database.open(directory);');
    await once(owner.stdout, 'data');
    assert.throws(() => new Store(directory.path), { code: 'state_locked' });
    owner.kill('SIGKILL');
    await once(owner, 'exit');
    using store = new Store(directory.path);
    assert.equal(store.meta.get('x'), undefined);
  });

  test('holds within one process, and survives a refused second open', async () => {
    using directory = testDirectory();
    using _store = new Store(directory.path);
    assert.throws(() => new Store(directory.path), { code: 'state_locked' });
    const other = spawnOwner(
      directory.path,
      `try { Database.open(directory); } catch (error) { console.log(error.code); process.exit(); }`,
    );
    const [output] = await once(other.stdout, 'data');
    assert.equal(String(output).trim(), 'state_locked');
    await once(other, 'exit');
  });
});

test('what was committed is there after kill -9', async () => {
  using directory = testDirectory();
  const owner = spawnOwner(
    directory.path,
    `const database = Database.open(directory);
     database.transact(() => database.prepare("INSERT INTO meta VALUES ('k', 'durable')").run());
     database.relaxed(() => database.prepare("INSERT INTO meta VALUES ('r', 'relaxed')").run());`,
  );
  await once(owner.stdout, 'data');
  owner.kill('SIGKILL');
  await once(owner, 'exit');
  using store = new Store(directory.path);
  assert.deepEqual([store.meta.get('k'), store.meta.get('r')], ['durable', 'relaxed']);
});

test('the file and the directory are for the owner alone', () => {
  using directory = testDirectory();
  const nested = join(directory.path, 'state');
  using store = new Store(nested);
  store.meta.set('a', 'b');
  assert.equal(statSync(nested).mode & 0o777, 0o700);
  for (const name of [stateFileName, `${stateFileName}-wal`]) {
    assert.equal(statSync(join(nested, name)).mode & 0o777, 0o600, name);
  }
});

test('a file that is no database is an error of its own and stays as it is', () => {
  using directory = testDirectory();
  const path = join(directory.path, stateFileName);
  writeFileSync(path, 'not a database, but long enough to be looked at'.repeat(100));
  assert.throws(() => new Store(directory.path), /not a database/);
  assert.match(readFileSync(path, 'utf8'), /^not a database/);
});

describe('a transaction', () => {
  test('that throws leaves nothing and runs no hook', () => {
    using directory = testDirectory();
    using store = new Store(directory.path);
    const hooks: string[] = [];
    assert.throws(() =>
      store.transact(() => {
        store.meta.set('a', '1');
        store.afterCommit(() => hooks.push('a'));
        throw new Error('no');
      }),
    );
    assert.equal(store.meta.get('a'), undefined);
    assert.deepEqual(hooks, []);
  });

  test('keeps the outer work when an inner failure is caught', () => {
    using directory = testDirectory();
    using store = new Store(directory.path);
    const hooks: string[] = [];
    store.transact(() => {
      store.meta.set('outer', '1');
      store.afterCommit(() => hooks.push('outer'));
      assert.throws(() =>
        store.transact(() => {
          store.meta.set('inner', '1');
          store.afterCommit(() => hooks.push('inner'));
          throw new Error('no');
        }),
      );
      assert.deepEqual(hooks, []);
    });
    assert.deepEqual([store.meta.get('outer'), store.meta.get('inner')], ['1', undefined]);
    assert.deepEqual(hooks, ['outer']);
  });
});
