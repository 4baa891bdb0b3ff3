/**
 * The QMP commands and events that Viper uses, with the fields it uses of them. A room that needs another command
 * adds a line here. Source: QEMU docs/interop/qemu-qmp-ref, version 7.2 (nothing newer without a fallback).
 */
export type RunState =
  | 'debug'
  | 'finish-migrate'
  | 'guest-panicked'
  | 'inmigrate'
  | 'internal-error'
  | 'io-error'
  | 'paused'
  | 'postmigrate'
  | 'prelaunch'
  | 'restore-vm'
  | 'running'
  | 'save-vm'
  | 'shutdown'
  | 'suspended'
  | 'watchdog'
  | 'colo';

export type MigrationStatus =
  | 'none'
  | 'setup'
  | 'cancelling'
  | 'cancelled'
  | 'active'
  | 'postcopy-active'
  | 'postcopy-paused'
  | 'postcopy-recover'
  | 'completed'
  | 'failed'
  | 'colo'
  | 'pre-switchover'
  | 'device'
  | 'wait-unplug';

export type MigrationCapability =
  | 'xbzrle'
  | 'auto-converge'
  | 'events'
  | 'postcopy-ram'
  | 'release-ram'
  | 'return-path'
  | 'pause-before-switchover'
  | 'multifd'
  | 'dirty-bitmaps'
  | 'late-block-activate'
  | 'validate-uuid'
  | 'background-snapshot'
  | 'postcopy-preempt'
  | 'switchover-ack';

export interface MigrationParameters {
  'max-bandwidth'?: number;
  'downtime-limit'?: number;
  'max-postcopy-bandwidth'?: number;
  'announce-initial'?: number;
  'announce-max'?: number;
  'announce-rounds'?: number;
  'announce-step'?: number;
  'cpu-throttle-initial'?: number;
  'cpu-throttle-increment'?: number;
  'max-cpu-throttle'?: number;
  'multifd-channels'?: number;
  /** QEMU 8.2 and later: bytes per second that count for the switchover, instead of what QEMU has measured. */
  'avail-switchover-bandwidth'?: number;
  'multifd-compression'?: 'none' | 'zlib' | 'zstd';
}

export interface MigrationInfo {
  status?: MigrationStatus;
  'error-desc'?: string;
  'total-time'?: number;
  'setup-time'?: number;
  downtime?: number;
  'expected-downtime'?: number;
  'cpu-throttle-percentage'?: number;
  'blocked-reasons'?: string[];
  ram?: {
    transferred: number;
    remaining: number;
    total: number;
    /** Zero pages, then pages sent whole. */
    duplicate: number;
    normal: number;
    'normal-bytes': number;
    'dirty-pages-rate': number;
    'dirty-sync-count': number;
    mbps: number;
    'page-size': number;
    'postcopy-requests': number;
  };
}

export type JobStatus =
  | 'undefined'
  | 'created'
  | 'running'
  | 'paused'
  | 'ready'
  | 'standby'
  | 'waiting'
  | 'pending'
  | 'aborting'
  | 'concluded'
  | 'null';

export interface JobInfo {
  id: string;
  type: string;
  status: JobStatus;
  'current-progress': number;
  'total-progress': number;
  error?: string;
}

export interface BlockJobInfo {
  device: string;
  type: string;
  status: JobStatus;
  len: number;
  offset: number;
  busy: boolean;
  paused: boolean;
  ready: boolean;
  speed: number;
  error?: string;
}

/** Options of a block node, a netdev, a chardev, a device or an object: QEMU's own words. */
export type QemuOptions = Record<string, unknown>;

/** A command without arguments has `undefined` as its `arguments`. */
interface Command<A, R> {
  arguments: A;
  return: R;
}
type None = undefined;
// QEMU answers {} where there is nothing to tell.
type Done = Record<string, never>;

export interface QmpCommands {
  qmp_capabilities: Command<{ enable?: 'oob'[] } | None, Done>;
  'query-version': Command<None, { qemu: { major: number; minor: number; micro: number }; package: string }>;
  'query-status': Command<None, { running: boolean; status: RunState }>;
  'query-name': Command<None, { name?: string }>;
  'query-uuid': Command<None, { UUID: string }>;
  'query-kvm': Command<None, { enabled: boolean; present: boolean }>;
  'query-machines': Command<
    None,
    { name: string; alias?: string; 'is-default'?: boolean; 'cpu-max': number; deprecated: boolean }[]
  >;
  'query-cpu-definitions': Command<
    None,
    { name: string; typename: string; 'unavailable-features'?: string[]; deprecated: boolean }[]
  >;
  'query-cpu-model-expansion': Command<
    { type: 'static' | 'full'; model: { name: string; props?: QemuOptions } },
    { model: { name: string; props?: QemuOptions } }
  >;
  'query-cpus-fast': Command<None, { 'cpu-index': number; 'qom-path': string; 'thread-id': number }[]>;
  'query-commands': Command<None, { name: string }[]>;
  'query-memory-size-summary': Command<None, { 'base-memory': number; 'plugged-memory'?: number }>;

  cont: Command<None, Done>;
  stop: Command<None, Done>;
  quit: Command<None, Done>;
  system_powerdown: Command<None, Done>;
  system_reset: Command<None, Done>;

  migrate: Command<{ uri: string; detach?: boolean; resume?: boolean }, Done>;
  'migrate-incoming': Command<{ uri: string }, Done>;
  migrate_cancel: Command<None, Done>;
  'migrate-continue': Command<{ state: 'pre-switchover' }, Done>;
  'migrate-start-postcopy': Command<None, Done>;
  'migrate-pause': Command<None, Done>;
  'migrate-recover': Command<{ uri: string }, Done>;
  /** Cuts the connections of what it names. */
  yank: Command<{ instances: { type: 'migration' }[] }, Done>;
  'migrate-set-capabilities': Command<
    { capabilities: { capability: MigrationCapability; state: boolean }[] },
    Done
  >;
  'query-migrate-capabilities': Command<None, { capability: MigrationCapability; state: boolean }[]>;
  'migrate-set-parameters': Command<MigrationParameters, Done>;
  'query-migrate-parameters': Command<None, MigrationParameters>;
  'query-migrate': Command<None, MigrationInfo>;
  /** QEMU 6.1 and later; `calc-time` in seconds. */
  'calc-dirty-rate': Command<{ 'calc-time': number; 'sample-pages': number }, Done>;
  /** MiB/s; missing until it is measured. */
  'query-dirty-rate': Command<
    None,
    { status: 'unstarted' | 'measuring' | 'measured'; 'dirty-rate'?: number }
  >;
  'announce-self': Command<
    { initial: number; max: number; rounds: number; step: number; interfaces?: string[]; id?: string },
    Done
  >;

  'query-block': Command<
    None,
    {
      device: string;
      qdev?: string;
      'io-status'?: 'ok' | 'failed' | 'nospace';
      inserted?: { 'node-name'?: string; file: string; ro: boolean };
    }[]
  >;
  'query-named-block-nodes': Command<
    { flat?: boolean } | None,
    { 'node-name'?: string; drv: string; file: string; ro: boolean; image: { 'virtual-size': number } }[]
  >;
  'query-block-jobs': Command<None, BlockJobInfo[]>;
  'query-jobs': Command<None, JobInfo[]>;
  'blockdev-add': Command<QemuOptions & { driver: string; 'node-name': string }, Done>;
  'blockdev-del': Command<{ 'node-name': string }, Done>;
  'blockdev-reopen': Command<{ options: (QemuOptions & { driver: string; 'node-name': string })[] }, Done>;
  'block-stream': Command<
    { 'job-id': string; device: string; 'base-node': string; 'backing-file': string },
    Done
  >;
  /** Into the qcow2 itself. */
  'blockdev-snapshot-internal-sync': Command<{ device: string; name: string }, Done>;
  'blockdev-snapshot-delete-internal-sync': Command<
    { device: string; name: string },
    { id: string; name: string }
  >;
  'blockdev-backup': Command<
    {
      'job-id': string;
      device: string;
      target: string;
      sync: 'full' | 'top' | 'none' | 'incremental' | 'bitmap';
      speed?: number;
      'auto-finalize'?: boolean;
      'auto-dismiss'?: boolean;
      'on-source-error'?: 'report' | 'ignore' | 'enospc' | 'stop';
      'on-target-error'?: 'report' | 'ignore' | 'enospc' | 'stop';
    },
    Done
  >;
  'blockdev-mirror': Command<
    {
      'job-id': string;
      device: string;
      target: string;
      sync: 'full' | 'top' | 'none';
      speed?: number;
      granularity?: number;
      'buf-size'?: number;
      'copy-mode'?: 'background' | 'write-blocking';
      'auto-finalize'?: boolean;
      'auto-dismiss'?: boolean;
    },
    Done
  >;
  'block-job-cancel': Command<{ device: string; force?: boolean }, Done>;
  /** QEMU 8.2 and later. */
  'block-job-change': Command<{ id: string; type: 'mirror'; 'copy-mode': 'write-blocking' }, Done>;
  'block-job-set-speed': Command<{ device: string; speed: number }, Done>;
  'job-cancel': Command<{ id: string }, Done>;
  'job-complete': Command<{ id: string }, Done>;
  'job-finalize': Command<{ id: string }, Done>;
  'job-dismiss': Command<{ id: string }, Done>;
  'nbd-server-start': Command<
    { addr: QemuOptions; 'max-connections'?: number; 'handshake-max-seconds'?: number },
    Done
  >;
  'nbd-server-stop': Command<None, Done>;
  'block-export-add': Command<
    { type: 'nbd'; id: string; 'node-name': string; writable?: boolean; name?: string },
    Done
  >;
  'block-export-del': Command<{ id: string; mode?: 'safe' | 'hard' }, Done>;

  netdev_add: Command<QemuOptions & { type: string; id: string }, Done>;
  netdev_del: Command<{ id: string }, Done>;
  set_link: Command<{ name: string; up: boolean }, Done>;
  device_add: Command<QemuOptions & { driver: string; id: string }, Done>;
  device_del: Command<{ id: string }, Done>;
  'chardev-add': Command<{ id: string; backend: QemuOptions }, Done>;
  'chardev-remove': Command<{ id: string }, Done>;
  'object-add': Command<QemuOptions & { 'qom-type': string; id: string }, Done>;
  'object-del': Command<{ id: string }, Done>;
  pmemsave: Command<{ val: number; size: number; filename: string }, Done>;
  /** The answer is text for humans; only for what QMP itself does not tell. */
  'human-monitor-command': Command<{ 'command-line': string }, string>;
  /** QEMU 7.2 and later, experimental, as are the next two: who uses them can do without. */
  'x-query-virtio': Command<None, { path: string; name: string }[]>;
  'x-query-virtio-status': Command<{ path: string }, { 'num-vqs': number }>;
  /** Guest-physical addresses; 0 where the guest has none. */
  'x-query-virtio-queue-status': Command<
    { path: string; queue: number },
    { 'vring-num': number; 'vring-desc': number; 'vring-avail': number; 'vring-used': number }
  >;
  'qom-get': Command<{ path: string; property: string }, unknown>;
  'qom-list': Command<{ path: string }, { name: string; type: string }[]>;
  'query-balloon': Command<None, { actual: number }>;
  balloon: Command<{ value: number }, Done>;
}

export type QmpCommand = keyof QmpCommands;
export type ArgumentsOf<C extends QmpCommand> = QmpCommands[C]['arguments'];
export type ReturnOf<C extends QmpCommand> = QmpCommands[C]['return'];

type Empty = Record<string, never>;

export interface QmpEventData {
  STOP: Empty;
  RESUME: Empty;
  RESET: { guest: boolean; reason: string };
  SHUTDOWN: { guest: boolean; reason: string };
  POWERDOWN: Empty;
  SUSPEND: Empty;
  WAKEUP: Empty;
  GUEST_PANICKED: { action: string };
  MIGRATION: { status: MigrationStatus };
  MIGRATION_PASS: { pass: number };
  JOB_STATUS_CHANGE: { id: string; status: JobStatus };
  BLOCK_JOB_READY: { device: string; type: string; len: number; offset: number };
  BLOCK_JOB_COMPLETED: { device: string; type: string; len: number; offset: number; error?: string };
  BLOCK_JOB_CANCELLED: { device: string; type: string; len: number; offset: number };
  BLOCK_JOB_ERROR: { device: string; operation: string; action: string };
  BLOCK_IO_ERROR: { device: string; 'node-name'?: string; operation: string; action: string; reason: string };
  DEVICE_DELETED: { device?: string; path: string };
  VSERPORT_CHANGE: { id: string; open: boolean };
  NIC_RX_FILTER_CHANGED: { name?: string; path: string };
  RTC_CHANGE: { offset: number };
  BALLOON_CHANGE: { actual: number };
}

/** An event; QEMU sends others than these too, so a reader ignores names that it does not know. */
export type QmpEvent = {
  [N in keyof QmpEventData]: { name: N; data: QmpEventData[N]; timestampMs: number };
}[keyof QmpEventData];
