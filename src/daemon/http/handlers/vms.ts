import type { Cloudlet } from '../../cloudlet.ts';
import type { Handlers } from '../server.ts';

type Names =
  | 'listVms'
  | 'createVm'
  | 'getVm'
  | 'deleteVm'
  | 'startVm'
  | 'stopVm'
  | 'pauseVm'
  | 'resumeVm'
  | 'cloneVm'
  | 'getGuest'
  | 'execInGuest'
  | 'getConsoleLog';

export const vmHandlers = ({ vms }: Cloudlet): Handlers<Names> => ({
  listVms: ({ query }) => vms.listPage(query),
  createVm: ({ body }) => vms.create(body),
  getVm: ({ params }) => vms.view(params.vm),
  deleteVm: ({ params, query }) => vms.delete(params.vm, query),
  startVm: ({ params }) => vms.start(params.vm),
  stopVm: ({ params, body }) => vms.stop(params.vm, body),
  pauseVm: ({ params }) => vms.pause(params.vm),
  resumeVm: ({ params }) => vms.resume(params.vm),
  cloneVm: ({ params, body }) => vms.clone(params.vm, body),
  getGuest: ({ params }) => vms.guest(params.vm),
  execInGuest: ({ params, body }) => vms.exec(params.vm, body),
  getConsoleLog: ({ params, query }) => vms.consoleLog(params.vm, query.tailBytes ?? 65536),
});
