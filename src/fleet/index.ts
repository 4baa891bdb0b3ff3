/** Who is in the fleet: the identity of this cloudlet, joining, and the other cloudlets. */
export { type Admission, type Admitter, admitMember, type JoinRequest, signRenewal } from './admission.ts';
export { certificateFingerprint } from './fingerprint.ts';
export { createCloudlet, type NewCloudlet } from './founding.ts';
export { asPeer, type CloudletIdentity, certificateExpiresInDays, loadCloudlet } from './identity.ts';
export { createJoinToken, type JoinTokenOptions } from './join-token.ts';
export { type Joining, joinFleet } from './joining.ts';
export { PeerClient, type PeerRequest } from './peer-client.ts';
export { PeerDirectory } from './peers.ts';
export { type Renewal, renewCertificate } from './renewal.ts';
export type { FleetState } from './state.ts';
export {
  acceptAnnouncement,
  acceptRemoval,
  announce,
  announceRemoval,
  type FleetCall,
  type FleetCallOutcome,
  syncPeers,
} from './sync.ts';
export { FleetTrust } from './trust.ts';
