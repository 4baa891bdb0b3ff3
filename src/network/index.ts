export { type BridgeRequest, isOwnBridge, planBridge } from './bridge-plan.ts';
export { bringUp, type Command, type DevicePlan, type Run, takeDown } from './commands.ts';
export { type Link, listLinksCommand, parseLinks } from './links.ts';
export { type CloudletNetwork, findNetwork, userNetwork } from './networks.ts';
export { isTapName, planTap, type TapRequest, tapName } from './tap-plan.ts';
export { Taps, type TapsOptions } from './taps.ts';
