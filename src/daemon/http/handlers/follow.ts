import { AppError } from '../../../model/errors.ts';
import type { Cloudlet } from '../../cloudlet.ts';
import type { Principal } from '../../credentials.ts';
import { startFresh } from '../../follow/fresh-service.ts';
import { viewOfGroups, wireguardOf } from '../../follow/groups.ts';
import { streamEvents } from '../event-stream.ts';
import type { Handlers } from '../server.ts';

type Names =
  | 'listNeighbours'
  | 'greetNeighbour'
  | 'listGroups'
  | 'getGroupConfig'
  | 'listDevices'
  | 'createDevice'
  | 'getDevice'
  | 'deleteDevice'
  | 'pairDevice'
  | 'unpairDevice'
  | 'handOverDevice'
  | 'getOwnDevice'
  | 'reportDevice'
  | 'streamDeviceEvents'
  | 'askNearness'
  | 'startFreshVm'
  | 'getPlacement'
  | 'listDecisions'
  | 'getDecision'
  | 'getProfile';

/** Neighbours, devices and decisions. */
export const followHandlers = (cloudlet: Cloudlet): Handlers<Names> => {
  const { follow } = cloudlet;
  const { devices } = follow;
  return {
    listNeighbours: () => follow.neighbours.view(),
    greetNeighbour: ({ body, caller }) => follow.neighbours.greeted(cloudletOf(caller!), body),
    listGroups: () => viewOfGroups(follow.groups()),
    getGroupConfig: ({ params }) => wireguardOf(follow.groups(), params.group),

    listDevices: ({ query }) => {
      const page = devices.list(query);
      return { ...page, items: page.items.map((device) => follow.view(device)) };
    },
    createDevice: ({ body }) => {
      const { device, secret } = devices.create(body);
      follow.sync();
      return { device: follow.view(device), secret };
    },
    getDevice: ({ params }) => follow.view(devices.find(params.device)),
    deleteDevice: ({ params }) => {
      devices.remove(params.device);
      follow.sync();
      return undefined;
    },
    pairDevice: ({ params, body }) => {
      const device = devices.pair(params.device, body.vm);
      follow.sync();
      return follow.view(device);
    },
    unpairDevice: ({ params }) => {
      const device = devices.pair(params.device, undefined);
      follow.sync();
      return follow.view(device);
    },
    handOverDevice: ({ params, body, caller }) => {
      devices.takeOver(params.device, body, { cloudletId: cloudletOf(caller!) });
      return undefined;
    },

    getOwnDevice: ({ caller }) => follow.status(devices.ofCaller(caller!)),
    reportDevice: ({ body, caller }) => follow.report(caller!, body),
    streamDeviceEvents: async ({ caller, request, reply }) => {
      const { id } = devices.ofCaller(caller!);
      const isItsOwn = (data: Record<string, unknown>) => data.deviceId === id;
      await streamEvents(cloudlet, undefined, request, reply, ({ data }) => isItsOwn(data));
      return undefined;
    },

    askNearness: ({ body }) => follow.desk.answer(body, cloudlet.closing),
    startFreshVm: ({ body, caller }) =>
      startFresh({ ...cloudlet, devices }, body, { cloudletId: cloudletOf(caller!) }),
    getPlacement: ({ params }) => follow.placement(params.vm),
    listDecisions: ({ query }) => follow.decisions(query),
    getDecision: ({ params }) => follow.decision(params.decision),
    getProfile: () => follow.profiles.all(),
  };
};

/** The contract lets only cloudlets call these routes. */
function cloudletOf(caller: Principal): string {
  if (caller.kind === 'cloudlet') return caller.cloudletId;
  throw new AppError('forbidden', `The caller ${caller.name} is no cloudlet`, { wanted: ['peer'] });
}
