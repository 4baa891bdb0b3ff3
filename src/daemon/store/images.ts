/** Images by digest, and the names that people gave them. An alias belongs to one image. */
import { AppError } from '../../model/errors.ts';
import type { ImageDigest } from '../../model/ids.ts';
import type { ImageRecord } from '../../model/vm.ts';
import { type Database, type Statement, violatesUnique } from './database.ts';
import { type Page, type PageRequest, readPage } from './page.ts';

interface Row {
  digest: string;
  created_at: string;
  format: 'qcow2' | 'raw';
  file_bytes: number;
  virtual_bytes: number;
  /** A JSON array. */
  aliases: string;
}

const select = `SELECT digest, created_at, format, file_bytes, virtual_bytes,
  (SELECT json_group_array(alias ORDER BY alias) FROM image_aliases a WHERE a.digest = images.digest) AS aliases
  FROM images`;

export class ImageRepository {
  readonly #database: Database;
  readonly #byDigest: Statement<Row>;
  readonly #byAlias: Statement<Row>;
  readonly #page: Statement<Row>;
  readonly #users: Statement<{ kind: string; name: string }>;
  readonly #insert: Statement<never>;
  readonly #delete: Statement<never>;
  readonly #insertAlias: Statement<never>;
  readonly #moveAlias: Statement<never>;
  readonly #deleteAlias: Statement<never>;

  constructor(database: Database) {
    this.#database = database;
    this.#byDigest = database.prepare(`${select} WHERE digest = ?`);
    this.#byAlias = database.prepare(
      `${select} WHERE digest = (SELECT digest FROM image_aliases WHERE alias = ?)`,
    );
    this.#page = database.prepare(
      `${select} WHERE (created_at, digest) > (?, ?) ORDER BY created_at, digest LIMIT ?`,
    );
    this.#users = database.prepare(
      `SELECT 'vm' AS kind, name FROM vms WHERE base = ?1
       UNION ALL SELECT 'snapshot', name FROM snapshots WHERE image = ?1 LIMIT 20`,
    );
    this.#insert = database.prepare(
      'INSERT INTO images (digest, created_at, format, file_bytes, virtual_bytes) VALUES (?, ?, ?, ?, ?)',
    );
    this.#delete = database.prepare('DELETE FROM images WHERE digest = ?');
    this.#insertAlias = database.prepare('INSERT INTO image_aliases (alias, digest) VALUES (?, ?)');
    this.#moveAlias = database.prepare(
      'INSERT INTO image_aliases (alias, digest) VALUES (?, ?) ON CONFLICT (alias) DO UPDATE SET digest = excluded.digest',
    );
    this.#deleteAlias = database.prepare('DELETE FROM image_aliases WHERE alias = ? AND digest = ?');
  }

  get(digest: ImageDigest): ImageRecord | undefined {
    const row = this.#byDigest.get(digest);
    return row && parse(row);
  }

  getByAlias(alias: string): ImageRecord | undefined {
    const row = this.#byAlias.get(alias);
    return row && parse(row);
  }

  /** By digest or by alias; no alias looks like a digest. */
  find(reference: string): ImageRecord | undefined {
    return this.get(reference) ?? this.getByAlias(reference);
  }

  /** Oldest first. */
  list(request: PageRequest): Page<ImageRecord> {
    return readPage(this.#page, request, (row) => [row.created_at, row.digest], parse);
  }

  /** Inserts an image with its aliases. Errors: `name_taken` if the image is there or an alias is another's. */
  insert(image: ImageRecord): void {
    const { digest, createdAt, format, fileBytes, virtualBytes, aliases } = image;
    this.#database.transact(() => {
      refuseTaken('images.digest', 'image', digest, () =>
        this.#insert.run(digest, createdAt, format, fileBytes, virtualBytes),
      );
      for (const alias of aliases) this.addAlias(digest, alias);
    });
  }

  /** Names an image; fails with `name_taken` if any image has the alias. */
  addAlias(digest: ImageDigest, alias: string): void {
    refuseTaken('image_aliases.alias', 'image alias', alias, () => this.#insertAlias.run(alias, digest));
  }

  /** Names an image; the alias of another image moves over. */
  moveAlias(digest: ImageDigest, alias: string): void {
    this.#moveAlias.run(alias, digest);
  }

  /** False if the image did not have the alias. */
  deleteAlias(digest: ImageDigest, alias: string): boolean {
    return this.#deleteAlias.run(alias, digest).changes === 1;
  }

  /** The names of VMs and snapshots that need the image: at most 20. */
  usedBy(digest: ImageDigest): { kind: string; name: string }[] {
    return this.#users.all(digest).map(({ kind, name }) => ({ kind, name }));
  }

  /** Removes an image with its aliases; false if there was none. Errors: `in_use`. */
  delete(digest: ImageDigest): boolean {
    return this.#database.transact(() => {
      const usedBy = this.usedBy(digest);
      if (usedBy.length > 0) {
        const first = `${usedBy[0]!.kind} ${usedBy[0]!.name}`;
        throw new AppError('in_use', `Cannot delete image ${digest}: ${first} needs it.`, { usedBy });
      }
      return this.#delete.run(digest).changes === 1;
    });
  }
}

const parse = (row: Row): ImageRecord => ({
  digest: row.digest,
  aliases: JSON.parse(row.aliases) as string[],
  format: row.format,
  fileBytes: row.file_bytes,
  virtualBytes: row.virtual_bytes,
  createdAt: row.created_at,
});

function refuseTaken(column: string, kind: string, name: string, write: () => void): void {
  try {
    write();
  } catch (error) {
    if (!violatesUnique(error, column)) throw error;
    throw new AppError('name_taken', `Cannot add the ${kind} ${name}: it is there already.`, { kind, name });
  }
}
