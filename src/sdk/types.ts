/** The types of the client, all made from the contract: nothing here exists at run time. */
import type { OperationName } from '../contract/endpoints.ts';
import type { RouteInput, RouteReply } from '../contract/routes.ts';
import type * as schemas from '../contract/schemas.ts';

export type Operation = schemas.Schema<typeof schemas.Operation>;
export type ViperEvent = schemas.Schema<typeof schemas.Event>;
export type Vm = schemas.Schema<typeof schemas.Vm>;
export type VmSummary = schemas.Schema<typeof schemas.VmSummary>;
export type CreateVm = schemas.Schema<typeof schemas.CreateVm>;
export type Image = schemas.Schema<typeof schemas.Image>;
export type Snapshot = schemas.Schema<typeof schemas.Snapshot>;
export type CreateSnapshot = schemas.Schema<typeof schemas.CreateSnapshot>;
export type Hardware = schemas.Schema<typeof schemas.Hardware>;
export type Cloudlet = schemas.Schema<typeof schemas.Cloudlet>;
export type Relay = schemas.Schema<typeof schemas.Relay>;
export type InstanceType = schemas.Schema<typeof schemas.InstanceType>;
export type Guest = schemas.Schema<typeof schemas.Guest>;
export type Token = schemas.Schema<typeof schemas.Token>;
export type Scope = schemas.Schema<typeof schemas.Scope>;
export type Migration = schemas.Schema<typeof schemas.Migration>;
export type MigrationProgress = schemas.Schema<typeof schemas.MigrationProgress>;
export type MigrationPlan = schemas.Schema<typeof schemas.MigrationPlan>;
export type MigrateVm = schemas.Schema<typeof schemas.MigrateVm>;
export type Drain = schemas.Schema<typeof schemas.Drain>;
export type NeighbourList = schemas.Schema<typeof schemas.NeighbourList>;
export type Device = schemas.Schema<typeof schemas.Device>;
export type DeviceStatus = schemas.Schema<typeof schemas.DeviceStatus>;
export type Decision = schemas.Schema<typeof schemas.Decision>;
export type Peer = schemas.Schema<typeof schemas.Peer>;

/** Operations whose bytes do not fit a request and a reply; each has a method of its own. */
export type StreamedOperation = 'importImage' | 'attachConsole' | 'streamEvents' | 'streamDeviceEvents';
export type PlainOperation = Exclude<OperationName, StreamedOperation>;

export interface CallOptions {
  /** Ends the call; it rejects with the signal's reason. */
  signal?: AbortSignal;
}

type Required<K extends string, Part> = [Part] extends [undefined] ? unknown : { [P in K]: Part };
type Optional<K extends string, Part> = [Part] extends [undefined] ? unknown : { [P in K]?: Part };

/** What a method takes: path parameters and body where the operation has them, a query if wanted. */
export type CallInput<K extends OperationName> = CallOptions &
  Required<'params', RouteInput<K>['params']> &
  Optional<'query', RouteInput<K>['query']> &
  Required<'body', RouteInput<K>['body']>;

export type Call<K extends OperationName> =
  CallOptions extends CallInput<K>
    ? (input?: CallInput<K>) => Promise<RouteReply<K>>
    : (input: CallInput<K>) => Promise<RouteReply<K>>;

/** One method for each plain operation of the contract. */
export type Calls = { readonly [K in PlainOperation]: Call<K> };

/** A method that lists one page; `pages` goes through all of them. */
export type ListPage<T> = (input: {
  query: { limit?: number; after?: string };
  signal?: AbortSignal;
}) => Promise<{ items: T[]; next: string | null }>;
