/**
 * Where each operation of the API lives: plain data without any dependency, so that clients (a browser among
 * them) can carry it. What goes in and out of each is in `routes.ts`.
 */
export const endpoints = {
  getHealth: { method: 'GET', path: '/healthz' },
  getMetrics: { method: 'GET', path: '/metrics' },
  getOpenApi: { method: 'GET', path: '/v1/openapi.json' },
  getWhoami: { method: 'GET', path: '/v1/whoami' },
  getCloudlet: { method: 'GET', path: '/v1/cloudlet' },
  drainCloudlet: { method: 'POST', path: '/v1/drain' },
  undrainCloudlet: { method: 'DELETE', path: '/v1/drain' },
  listInstanceTypes: { method: 'GET', path: '/v1/instance-types' },

  listImages: { method: 'GET', path: '/v1/images' },
  importImage: { method: 'POST', path: '/v1/images' },
  getImage: { method: 'GET', path: '/v1/images/{image}' },
  deleteImage: { method: 'DELETE', path: '/v1/images/{image}' },
  addImageAlias: { method: 'PUT', path: '/v1/images/{image}/aliases/{alias}' },
  removeImageAlias: { method: 'DELETE', path: '/v1/images/{image}/aliases/{alias}' },

  listSnapshots: { method: 'GET', path: '/v1/snapshots' },
  createSnapshot: { method: 'POST', path: '/v1/snapshots' },
  getSnapshot: { method: 'GET', path: '/v1/snapshots/{snapshot}' },
  deleteSnapshot: { method: 'DELETE', path: '/v1/snapshots/{snapshot}' },

  listVms: { method: 'GET', path: '/v1/vms' },
  createVm: { method: 'POST', path: '/v1/vms' },
  getVm: { method: 'GET', path: '/v1/vms/{vm}' },
  deleteVm: { method: 'DELETE', path: '/v1/vms/{vm}' },
  startVm: { method: 'POST', path: '/v1/vms/{vm}/start' },
  stopVm: { method: 'POST', path: '/v1/vms/{vm}/stop' },
  pauseVm: { method: 'POST', path: '/v1/vms/{vm}/pause' },
  resumeVm: { method: 'POST', path: '/v1/vms/{vm}/resume' },
  cloneVm: { method: 'POST', path: '/v1/vms/{vm}/clone' },
  migrateVm: { method: 'POST', path: '/v1/vms/{vm}/migrate' },
  planMigration: { method: 'POST', path: '/v1/vms/{vm}/migrate/plan' },
  claimVm: { method: 'POST', path: '/v1/vms/{vm}/claim' },
  getGuest: { method: 'GET', path: '/v1/vms/{vm}/guest' },
  execInGuest: { method: 'POST', path: '/v1/vms/{vm}/guest/exec' },
  getConsoleLog: { method: 'GET', path: '/v1/vms/{vm}/console/log' },
  attachConsole: { method: 'GET', path: '/v1/vms/{vm}/console' },

  listOperations: { method: 'GET', path: '/v1/operations' },
  getOperation: { method: 'GET', path: '/v1/operations/{operation}' },
  cancelOperation: { method: 'DELETE', path: '/v1/operations/{operation}' },
  streamEvents: { method: 'GET', path: '/v1/events' },

  listMigrations: { method: 'GET', path: '/v1/migrations' },
  getMigration: { method: 'GET', path: '/v1/migrations/{migration}' },
  limitMigration: { method: 'PUT', path: '/v1/migrations/{migration}/limits' },
  checkMigration: { method: 'POST', path: '/v1/migrations/{migration}/check' },
  prepareNetwork: { method: 'PUT', path: '/v1/migrations/{migration}/network' },
  giveBackNetwork: { method: 'DELETE', path: '/v1/migrations/{migration}/network' },
  tellMigration: { method: 'POST', path: '/v1/migrations/{migration}/messages' },

  listTokens: { method: 'GET', path: '/v1/tokens' },
  createToken: { method: 'POST', path: '/v1/tokens' },
  revokeToken: { method: 'DELETE', path: '/v1/tokens/{token}' },

  listPeers: { method: 'GET', path: '/v1/peers' },
  announcePeer: { method: 'POST', path: '/v1/peers' },
  removePeer: { method: 'DELETE', path: '/v1/peers/{peer}' },
  createJoinToken: { method: 'POST', path: '/v1/fleet/join-tokens' },
  renewCertificate: { method: 'POST', path: '/v1/fleet/renewals' },
  joinMember: { method: 'POST', path: '/v1/fleet/members' },
} as const satisfies Record<string, { method: 'GET' | 'POST' | 'PUT' | 'DELETE'; path: string }>;

export type OperationName = keyof typeof endpoints;
