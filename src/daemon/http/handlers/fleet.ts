import type { Cloudlet } from '../../cloudlet.ts';
import type { Handlers } from '../server.ts';

type Names =
  | 'listPeers'
  | 'announcePeer'
  | 'removePeer'
  | 'createJoinToken'
  | 'renewCertificate'
  | 'announceRemoval'
  | 'joinMember';

export const fleetHandlers = ({ fleet }: Cloudlet): Handlers<Names> => ({
  listPeers: () => ({ items: fleet.peers(), removed: fleet.directory.removed() }),
  announcePeer: ({ body, caller }) => {
    fleet.announced(body, caller!);
    return undefined;
  },
  removePeer: ({ params }) => {
    fleet.remove(params.peer);
    return undefined;
  },
  createJoinToken: ({ body }) => fleet.createJoinToken(body.expiresInS ?? 3600),
  renewCertificate: ({ body, caller }) => fleet.renew(caller!, body.csr),
  announceRemoval: ({ params, caller }) => {
    fleet.removalAnnounced(params.peer, caller!);
    return undefined;
  },
  joinMember: ({ body }) => fleet.admit(body),
});
