/** Following a device: statistics, neighbours, triggers, decisions, forecasts, groups. Observations in, decisions out. */
export * from './decide.ts';
export * from './groups.ts';
export * from './load.ts';
export * from './neighbours.ts';
export * from './profile.ts';
export * from './rtt.ts';
export * from './trigger.ts';
export * from './wireguard.ts';
