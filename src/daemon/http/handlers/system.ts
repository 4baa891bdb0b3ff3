import type { Cloudlet } from '../../cloudlet.ts';
import type { Handlers } from '../server.ts';

type Names =
  | 'getHealth'
  | 'getMetrics'
  | 'getOpenApi'
  | 'getWhoami'
  | 'getCloudlet'
  | 'drainCloudlet'
  | 'limitCloudlet'
  | 'getRelay'
  | 'lendMemory'
  | 'undrainCloudlet'
  | 'listInstanceTypes';

/** The cloudlet itself: health, metrics, facts. */
export const systemHandlers = (cloudlet: Cloudlet): Handlers<Names> => ({
  getHealth: () => ({ status: 'ok', cloudletId: cloudlet.identity.id, version: cloudlet.version }),
  getMetrics: () => cloudlet.metrics.text(),
  getOpenApi: () => cloudlet.openApi,
  getWhoami: ({ caller }) => {
    const { name, scopes } = caller!;
    return {
      id: caller!.kind === 'cloudlet' ? caller!.cloudletId : caller!.credentialId,
      name,
      scopes: [...scopes],
    };
  },
  getCloudlet: () => cloudlet.facts(),
  drainCloudlet: ({ body }) => cloudlet.drain.start(body),
  limitCloudlet: ({ body }) => {
    cloudlet.linkLimits.setCloudlet(body.bandwidthBps);
    return { bandwidthBps: cloudlet.linkLimits.cloudletBps };
  },
  getRelay: () => cloudlet.relay.status,
  lendMemory: ({ body }) => cloudlet.relay.lend(body),
  undrainCloudlet: () => {
    cloudlet.drain.undrain();
    return undefined;
  },
  listInstanceTypes: () => ({ items: cloudlet.config.instanceTypes }),
});
