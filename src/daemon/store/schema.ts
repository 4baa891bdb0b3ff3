/**
 * The schema as the ordered list of steps that led to it. `PRAGMA user_version` counts the steps that a file has
 * seen. A step that was ever released is never edited: a change is a new step at the end.
 *
 * Rows keep their record as JSON; beside it stand only the columns that something looks up or sorts by.
 */
export interface Migration {
  name: string;
  sql: string;
}

export const migrations: readonly Migration[] = [
  {
    name: 'images, VMs and snapshots',
    sql: `
      CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;

      CREATE TABLE images (
        digest TEXT PRIMARY KEY,
        created_at TEXT NOT NULL,
        format TEXT NOT NULL,
        file_bytes INTEGER NOT NULL,
        virtual_bytes INTEGER NOT NULL
      ) STRICT;
      CREATE INDEX images_by_age ON images (created_at, digest);
      CREATE TABLE image_aliases (
        alias TEXT PRIMARY KEY,
        digest TEXT NOT NULL REFERENCES images ON DELETE CASCADE
      ) STRICT, WITHOUT ROWID;
      CREATE INDEX image_aliases_by_digest ON image_aliases (digest, alias);

      CREATE TABLE vms (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        state TEXT NOT NULL,
        created_at TEXT NOT NULL,
        image TEXT NOT NULL REFERENCES images,
        cpus INTEGER NOT NULL,
        memory_bytes INTEGER NOT NULL,
        record TEXT NOT NULL
      ) STRICT;
      CREATE INDEX vms_by_age ON vms (created_at, id);
      CREATE INDEX vms_by_state ON vms (state);
      CREATE INDEX vms_by_image ON vms (image);

      CREATE TABLE snapshots (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        created_at TEXT NOT NULL,
        image TEXT NOT NULL REFERENCES images,
        record TEXT NOT NULL
      ) STRICT;
      CREATE INDEX snapshots_by_age ON snapshots (created_at, id);
      CREATE INDEX snapshots_by_image ON snapshots (image);
    `,
  },
  {
    name: 'operations and events',
    sql: `
      CREATE TABLE operations (
        id TEXT PRIMARY KEY,
        state TEXT NOT NULL,
        created_at TEXT NOT NULL,
        record TEXT NOT NULL
      ) STRICT;
      CREATE INDEX operations_by_age ON operations (created_at, id);
      CREATE INDEX operations_running ON operations (id) WHERE state = 'running';

      CREATE TABLE events (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at TEXT NOT NULL,
        kind TEXT NOT NULL,
        vm_id TEXT,
        latest_of TEXT,
        data TEXT NOT NULL
      ) STRICT;
      CREATE UNIQUE INDEX events_latest_of ON events (latest_of) WHERE latest_of IS NOT NULL;
    `,
  },
  {
    name: 'credentials',
    sql: `
      CREATE TABLE credentials (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        kind TEXT NOT NULL,
        hash TEXT NOT NULL,
        created_at TEXT NOT NULL,
        revoked_at TEXT,
        record TEXT NOT NULL
      ) STRICT;
      CREATE UNIQUE INDEX credentials_by_hash ON credentials (kind, hash);
      CREATE UNIQUE INDEX credentials_by_name ON credentials (name) WHERE revoked_at IS NULL;
      CREATE INDEX credentials_by_age ON credentials (created_at, id);
    `,
  },
  {
    name: 'the fleet',
    sql: `
      CREATE TABLE join_tokens (
        id TEXT PRIMARY KEY,
        secret_hash TEXT NOT NULL UNIQUE,
        created_at TEXT NOT NULL,
        expires_at TEXT NOT NULL,
        used_at TEXT,
        used_by TEXT
      ) STRICT;

      CREATE TABLE peers (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        joined_at TEXT NOT NULL,
        removed_at TEXT,
        record TEXT NOT NULL
      ) STRICT;
    `,
  },
  {
    name: 'migrations',
    sql: `
      CREATE TABLE migrations (
        id TEXT PRIMARY KEY,
        vm_id TEXT NOT NULL,
        created_at TEXT NOT NULL,
        finished_at TEXT,
        record TEXT NOT NULL
      ) STRICT;
      CREATE INDEX migrations_by_age ON migrations (created_at, id);
      CREATE INDEX migrations_unfinished ON migrations (created_at) WHERE finished_at IS NULL;
    `,
  },
  {
    // `image` is what the disk was made from, `base` the image that it still needs: none on shared storage.
    name: 'VMs that need no image',
    sql: `
      CREATE TABLE vms_new (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        state TEXT NOT NULL,
        created_at TEXT NOT NULL,
        image TEXT NOT NULL,
        base TEXT REFERENCES images,
        cpus INTEGER NOT NULL,
        memory_bytes INTEGER NOT NULL,
        record TEXT NOT NULL
      ) STRICT;
      INSERT INTO vms_new SELECT id, name, state, created_at, image, image, cpus, memory_bytes, record FROM vms;
      DROP TABLE vms;
      ALTER TABLE vms_new RENAME TO vms;
      CREATE INDEX vms_by_age ON vms (created_at, id);
      CREATE INDEX vms_by_state ON vms (state);
      CREATE INDEX vms_by_base ON vms (base);
    `,
  },
  {
    name: 'addresses and handoffs',
    sql: `
      CREATE TABLE leases (
        network TEXT NOT NULL,
        address TEXT NOT NULL,
        vm_id TEXT NOT NULL,
        expires_at TEXT,
        PRIMARY KEY (network, address)
      ) STRICT, WITHOUT ROWID;
      CREATE INDEX leases_by_vm ON leases (vm_id);

      CREATE TABLE handoffs (
        id TEXT PRIMARY KEY,
        vm_id TEXT NOT NULL,
        record TEXT NOT NULL
      ) STRICT, WITHOUT ROWID;
    `,
  },
  {
    name: 'following devices',
    sql: `
      CREATE TABLE neighbours (id TEXT PRIMARY KEY, record TEXT NOT NULL) STRICT, WITHOUT ROWID;

      CREATE TABLE devices (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        created_at TEXT NOT NULL,
        record TEXT NOT NULL
      ) STRICT;
      CREATE INDEX devices_by_age ON devices (created_at, id);

      CREATE TABLE decisions (
        id TEXT PRIMARY KEY,
        vm_id TEXT NOT NULL,
        created_at TEXT NOT NULL,
        record TEXT NOT NULL
      ) STRICT;
      CREATE INDEX decisions_by_age ON decisions (created_at, id);

      CREATE TABLE profile (
        migration_id TEXT PRIMARY KEY,
        at TEXT NOT NULL,
        record TEXT NOT NULL
      ) STRICT;
      CREATE INDEX profile_by_age ON profile (at);
      CREATE INDEX migrations_by_vm ON migrations (vm_id, created_at);
    `,
  },
  {
    name: 'escrows',
    sql: `
      CREATE TABLE escrows (
        migration_id TEXT PRIMARY KEY,
        created_at TEXT NOT NULL,
        record TEXT NOT NULL
      ) STRICT, WITHOUT ROWID;
    `,
  },
];
