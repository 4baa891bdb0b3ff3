/**
 * The states of a VM and which action is allowed in which. The API refuses by this table, tells clients by it
 * what is possible now, and a dashboard disables its buttons by it; nobody decides this anywhere else.
 *
 *   creating -> running, or stopped
 *               stopped <-> starting -> running <-> paused
 *                  ^                       |  |
 *                  +------ stopping <------+  +--> crashed   (QEMU ended and nobody had asked for it)
 *   any resting state -> deleting -> gone
 *   running, paused -> migrating (it runs on here) -> gone, or as before
 *   arriving (from another cloudlet; nothing runs yet) -> running, paused, or gone
 */
export const vmStates = [
  'creating',
  'stopped',
  'starting',
  'running',
  'paused',
  'stopping',
  'crashed',
  'deleting',
  'migrating',
  'arriving',
] as const;
export type VmState = (typeof vmStates)[number];

const allowed = {
  start: ['stopped', 'crashed'],
  stop: ['running', 'paused'],
  pause: ['running'],
  resume: ['paused'],
  clone: ['stopped', 'running', 'paused'],
  delete: ['stopped', 'crashed', 'running', 'paused'],
  migrate: ['running', 'paused'],
  console: ['starting', 'running', 'paused', 'stopping', 'migrating'],
  guest: ['running', 'migrating'],
} as const satisfies Record<string, readonly VmState[]>;

export type VmAction = keyof typeof allowed;
export const vmActions = Object.keys(allowed) as VmAction[];

export const statesThatAllow = (action: VmAction): readonly VmState[] => allowed[action];

export const isAllowed = (action: VmAction, state: VmState): boolean =>
  (allowed[action] as readonly VmState[]).includes(state);

/** The actions that a VM in this state allows now. */
export const allowedActions = (state: VmState): VmAction[] =>
  vmActions.filter((action) => isAllowed(action, state));

export const operationStates = ['running', 'succeeded', 'failed', 'cancelled'] as const;
export type OperationState = (typeof operationStates)[number];
