/**
 * Tells the operator when nobody runs a VM for longer than a cut of the link explains. Nothing is decided by this:
 * the migration goes on when the other side answers, and until then only a human can know that it never will.
 */
import type { DestinationState } from '../../migration/destination-machine.ts';
import type { SourceState } from '../../migration/source-machine.ts';
import type { MigrationOptions } from '../../model/migration.ts';

const doubtMs = 15_000;

/** It runs here, as far as it can: pages are still at the source, which does not answer. */
export const pagesAreMissing = (peer: string): string =>
  `The VM runs here but part of its memory is still at ${peer}, which does not answer; what needs that part stands ` +
  `still until it does. If ${peer} is gone for good, the VM can only be deleted, or stopped and started from its disk`;

/** Released and not yet taken up, as far as is known here. */
export const isSourceInDoubt = ({ name }: SourceState): boolean => name === 'switching';

/** All of the VM is here, but not the word that it may run. */
export const isDestinationInDoubt = (state: DestinationState): boolean =>
  state.name === 'waiting' && state.loaded === 'whole';

export const doubtAtSource = (peer: string, { mode, engine }: MigrationOptions): string =>
  `${peer} has been given the VM and does not answer; the VM stands still until it does. If ${peer} is gone for ` +
  `good, and only then, claim the VM here: viper vm claim${isBinding(mode, engine) ? mayBeBound : ''}`;

/** A stock QEMU takes back no post-copy that it has begun; the source of the other engines runs a pre-copy. */
const isBinding = (mode: MigrationOptions['mode'], engine: MigrationOptions['engine'] = 'direct'): boolean =>
  mode !== 'precopy' && engine === 'direct';
const mayBeBound =
  '. If post-copy has begun, its memory is lost then, and it can only be started from its disk';

export const doubtAtDestination = (peer: string): string =>
  `The VM is here as a whole, but ${peer} does not say whether it may run here; it stands still until it does. If ` +
  `${peer} is gone for good, and only then, claim the VM here: viper vm claim`;

export class DoubtTimer {
  readonly #tell: () => void;
  #timer: NodeJS.Timeout | undefined;

  constructor(tell: () => void) {
    this.#tell = tell;
  }

  /** With every state: the clock runs from the first that is in doubt to the first that is not. */
  note(isInDoubt: boolean): void {
    if (!isInDoubt) this.stop();
    else this.#timer ??= setTimeout(this.#tell, doubtMs).unref();
  }

  stop(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
  }
}
