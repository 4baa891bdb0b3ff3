/**
 * One SQLite file that one process owns.
 *
 * Invariants: the file lock is taken at open, held until close and falls with the process (it is a kernel lock,
 * so `kill -9` frees it); a file of a newer Viper is never written to; a commit is on the disk before `transact`
 * returns, unless it was made inside `relaxed`.
 */
import { chmodSync, closeSync, existsSync, mkdirSync, openSync, statfsSync } from 'node:fs';
import { join } from 'node:path';
import { DatabaseSync, type SQLInputValue } from 'node:sqlite';
import { AppError } from '../../model/errors.ts';
import { type Migration, migrations } from './schema.ts';

/** A prepared statement whose rows have the type that its SQL selects. */
export interface Statement<Row> {
  get(...parameters: SQLInputValue[]): Row | undefined;
  all(...parameters: SQLInputValue[]): Row[];
  run(...parameters: SQLInputValue[]): { changes: number | bigint; lastInsertRowid: number | bigint };
}

/** SQLite's result codes, https://www.sqlite.org/rescode.html */
const SQLITE_BUSY = 5;
const SQLITE_FULL = 13;
const SQLITE_CONSTRAINT_PRIMARYKEY = 1555;
const SQLITE_CONSTRAINT_UNIQUE = 2067;

export const stateFileName = 'state.sqlite';

/** Room that the file and its log keep for themselves, in pages of 4 KiB. */
const ROOM_PAGES = 256;
/** The log is written back after so many, so that what is then being written still finds room behind them. */
const WRITE_BACK_PAGES = ROOM_PAGES - 64;

export class Database implements Disposable {
  readonly #sqlite: DatabaseSync;
  readonly #directory: string;
  readonly #afterCommit: (() => void)[] = [];
  #depth = 0;

  private constructor(sqlite: DatabaseSync, directory: string) {
    this.#sqlite = sqlite;
    this.#directory = directory;
  }

  /**
   * Opens the state of a directory, makes it if there is none, and brings it up to the newest schema.
   * Errors: `state_locked` if another process has it open, `state_too_new` if a newer Viper wrote it.
   */
  static open(directory: string, steps: readonly Migration[] = migrations): Database {
    const path = join(directory, stateFileName);
    preparePrivateFile(directory, path);
    return withLockErrors(path, () => {
      refuseNewerVersion(path, steps.length);
      const sqlite = new DatabaseSync(path, { timeout: 0 });
      try {
        // Exclusive before WAL: then the first read takes the lock, and no shared-memory file is needed.
        sqlite.exec('PRAGMA locking_mode = EXCLUSIVE');
        sqlite.exec('PRAGMA journal_mode = WAL');
        sqlite.exec('PRAGMA synchronous = FULL');
        sqlite.exec('PRAGMA foreign_keys = ON');
        sqlite.exec(`PRAGMA wal_autocheckpoint = ${WRITE_BACK_PAGES}`);
        const database = new Database(sqlite, directory);
        database.#migrate(path, steps);
        database.#setRoomAside();
        return database;
      } catch (error) {
        sqlite.close();
        throw error;
      }
    });
  }

  prepare<Row = never>(sql: string): Statement<Row> {
    const statement = this.#sqlite.prepare(sql) as unknown as Statement<Row>;
    return {
      get: (...parameters) => statement.get(...parameters),
      all: (...parameters) => statement.all(...parameters),
      run: (...parameters) => this.#write(() => statement.run(...parameters)),
    };
  }

  /**
   * Runs synchronous work in one transaction: all of it is kept, or nothing if it throws. Nested calls are
   * savepoints, so an inner failure that is caught leaves no half of the inner work behind.
   */
  transact<T>(work: () => T): T {
    const savepoint = `nested_${this.#depth}`;
    const nested = this.#depth > 0;
    const pending = this.#afterCommit.length;
    this.#write(() => this.#sqlite.exec(nested ? `SAVEPOINT ${savepoint}` : 'BEGIN IMMEDIATE'));
    this.#depth += 1;
    let result: T;
    try {
      result = work();
      this.#write(() => this.#sqlite.exec(nested ? `RELEASE ${savepoint}` : 'COMMIT'));
    } catch (error) {
      this.#afterCommit.length = pending;
      // A full disk makes SQLite roll back by itself; then there is nothing left to undo.
      if (this.#sqlite.isTransaction) {
        this.#sqlite.exec(nested ? `ROLLBACK TO ${savepoint}; RELEASE ${savepoint}` : 'ROLLBACK');
      }
      throw error;
    } finally {
      this.#depth -= 1;
    }
    if (!nested) for (const run of this.#afterCommit.splice(0)) run();
    return result;
  }

  /** Runs once what was written is committed: at once outside a transaction, never if it is rolled back. */
  afterCommit(run: () => void): void {
    if (this.#depth === 0) run();
    else this.#afterCommit.push(run);
  }

  /**
   * Commits inside are not waited for on the disk: a power cut may lose them, a crash of the process does not.
   * For facts that are only worth having (progress, last use). Inside a transaction it changes nothing.
   */
  relaxed<T>(work: () => T): T {
    if (this.#depth > 0) return work();
    this.#sqlite.exec('PRAGMA synchronous = NORMAL');
    try {
      return work();
    } finally {
      this.#sqlite.exec('PRAGMA synchronous = FULL');
    }
  }

  close(): void {
    if (this.#sqlite.isOpen) this.#sqlite.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }

  /** A full disk is an expected failure: `insufficient_space`. */
  #write<T>(write: () => T): T {
    try {
      return write();
    } catch (error) {
      if (sqliteCode(error) !== SQLITE_FULL) throw error;
      const { bavail, bsize } = statfsSync(this.#directory);
      const message = `Cannot write the state in ${this.#directory}: its disk is full.`;
      const details = { wantedBytes: ROOM_PAGES * 4096, freeBytes: bavail * bsize };
      throw new AppError('insufficient_space', message, details, { cause: error });
    }
  }

  /**
   * Writes that much into file and log and takes it out again: both keep their size, so that what happens can still
   * be written down for a while when others have filled the disk.
   */
  #setRoomAside(): void {
    try {
      this.#sqlite.exec(`
        BEGIN IMMEDIATE;
        CREATE TABLE room AS SELECT zeroblob(${ROOM_PAGES * 4096}) AS room;
        COMMIT;
        DROP TABLE room;
      `);
    } catch (error) {
      if (sqliteCode(error) !== SQLITE_FULL) throw error;
      if (this.#sqlite.isTransaction) this.#sqlite.exec('ROLLBACK');
    }
  }

  #migrate(path: string, steps: readonly Migration[]): void {
    const version = readVersion(this.#sqlite);
    if (version > steps.length) throw tooNew(path, version, steps.length);
    for (const [index, step] of steps.entries()) {
      if (index < version) continue;
      this.transact(() => {
        this.#sqlite.exec(step.sql);
        this.#sqlite.exec(`PRAGMA user_version = ${index + 1}`);
      });
    }
  }
}

/** True if the error says that a unique column, such as `vms.name`, has the value already. */
export function violatesUnique(error: unknown, column: string): boolean {
  const code = sqliteCode(error);
  return (
    (code === SQLITE_CONSTRAINT_UNIQUE || code === SQLITE_CONSTRAINT_PRIMARYKEY) &&
    (error as Error).message.endsWith(`: ${column}`)
  );
}

/**
 * SQLite must not be the one that makes the file, because it would ask for mode 0644. An existing file is only
 * named, never opened here: closing any descriptor of it would drop the lock that this process may hold.
 */
function preparePrivateFile(directory: string, path: string): void {
  mkdirSync(directory, { recursive: true, mode: 0o700 });
  chmodSync(directory, 0o700);
  if (existsSync(path)) chmodSync(path, 0o600);
  else closeSync(openSync(path, 'wx', 0o600));
}

/** Looks through a read-only connection, which leaves the file and its WAL as they are, even after a crash. */
function refuseNewerVersion(path: string, newest: number): void {
  const sqlite = new DatabaseSync(path, { readOnly: true, timeout: 0 });
  try {
    const version = readVersion(sqlite);
    if (version > newest) throw tooNew(path, version, newest);
  } finally {
    sqlite.close();
  }
}

const readVersion = (sqlite: DatabaseSync): number =>
  Number(sqlite.prepare('PRAGMA user_version').get()!.user_version);

const tooNew = (path: string, version: number, newest: number): AppError =>
  new AppError(
    'state_too_new',
    `Cannot open ${path}: its schema is ${version}, this Viper knows ${newest}.`,
    {
      version,
      newest,
    },
  );

function withLockErrors<T>(path: string, open: () => T): T {
  try {
    return open();
  } catch (error) {
    if (sqliteCode(error) !== SQLITE_BUSY) throw error;
    throw new AppError(
      'state_locked',
      `Cannot open ${path}: another daemon holds it.`,
      { path },
      { cause: error },
    );
  }
}

function sqliteCode(error: unknown): number | undefined {
  if (!(error instanceof Error) || !('errcode' in error)) return undefined;
  const code = Number(error.errcode);
  // Extended codes of SQLITE_BUSY (recovery, snapshot) mean the same here.
  return (code & 0xff) === SQLITE_BUSY ? SQLITE_BUSY : code;
}
