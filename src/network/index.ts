export { type AddressPlan, chooseAddress, isInSubnet, requireAddressPlan } from './addresses.ts';
export { bringUp, type Command, type DevicePlan, type Run, takeDown } from './commands.ts';
export {
  type DevicePath,
  type HandoverMode,
  handoverModes,
  MptcpDevice,
  type MptcpDeviceOptions,
  type Roamed,
} from './device.ts';
export { type Guarded, type GuardedTap, guardTable, planGuard, planGuardRemoval } from './guard-plan.ts';
export {
  type GuestNetwork,
  type GuestPlace,
  type GuestReply,
  type GuestRequest,
  type GuestStep,
  guestRequest,
  type Joined,
  parseJoined,
  parseStatus,
  requireDone,
} from './guest-network.ts';
export {
  type Action,
  bridgeFor,
  type Handoff,
  type HandoffPlan,
  type HandoffStep,
  keepsAddress,
  planAwayEndRemoval,
  planDestination,
  planHomeEnd,
  planHomeTurn,
  planSource,
} from './handoff-plan.ts';
export { type Hop, hopCommand, parseHop } from './host-route-plan.ts';
export { type Link, listLinksCommand, parseLinks } from './links.ts';
export { monitorLines, mptcpMonitorCommand } from './monitor-process.ts';
export { type MptcpEvent, parseMptcpEvent } from './mptcp-monitor.ts';
export { type CloudletNetwork, findNetwork, userNetwork } from './networks.ts';
export { isTapName, planTap, type TapRequest, tapName } from './tap-plan.ts';
export { Taps, type TapsOptions } from './taps.ts';
export { newVni, ownTunnelDevices, type Tunnel } from './tunnel-plan.ts';
export {
  listPeersCommand,
  makeInKernel,
  makeInUserSpace,
  planWireguard,
  planWireguardRemoval,
  type WireguardInterface,
} from './wireguard-plan.ts';
