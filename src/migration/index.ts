/** The room's door: both sides of a migration, what they say to each other, pre-flight and forecast. */
export type { GuestRam } from './condensed/guest-memory.ts';
export * from './destination.ts';
export {
  absentDestination,
  type DestinationState,
  destinationOwns,
  isDestinationOver,
} from './destination-machine.ts';
export type { Journal } from './engine.ts';
export * from './engine-policy.ts';
export * from './estimator.ts';
export * from './preflight.ts';
export type { Ending, Problem, RefusalName, Ticket, ToDestination, ToSource } from './protocol.ts';
export * from './source.ts';
export { isSourceOver, plannedSource, type SourceState, sourceOwns } from './source-machine.ts';
