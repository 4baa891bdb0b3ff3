/**
 * What is asked before a migration: whether the VM fits there, by the checks of both sides, and what it would be moved
 * with.
 */
import type { Static } from 'typebox';
import type * as schemas from '../../contract/schemas.ts';
import { chooseEngine, type EngineChoice, modeFor } from '../../migration/engine-policy.ts';
import { missingCpuFeaturesOf } from '../../migration/preflight.ts';
import type { Problem } from '../../migration/protocol.ts';
import { AppError } from '../../model/errors.ts';
import type { Peer } from '../../model/fleet.ts';
import { newId, type Uuid } from '../../model/ids.ts';
import type { MigrationLimits, MigrationOptions, VmToMove } from '../../model/migration.ts';
import type { Fleet } from '../fleet.ts';
import { vmOfSets } from '../references/reference-sets.ts';
import type { Store } from '../store/index.ts';
import type { Managed } from '../vms/registry.ts';
import { linkBpsOf, uplinkBpsOf } from './forecast.ts';
import type { HalfParts } from './half.ts';
import type { PeerSide } from './peer-side.ts';
import { chooseRelays, defaultReplicas, describeRelays } from './relays.ts';

type MigrateVm = Static<typeof schemas.MigrateVm>;

export type InquiryOptions = Pick<HalfParts, 'registry' | 'runner' | 'references' | 'journal' | 'peers'> & {
  store: Store;
  fleet: Fleet;
};

const defaultLimits: MigrationLimits = { downtimeMs: 300, autoConverge: false };

export class Inquiry {
  readonly #options: InquiryOptions;

  constructor(options: InquiryOptions) {
    this.#options = options;
  }

  /** For the session that is wanted first, while both sides are asked whether the VM fits. */
  connectEarly(reference: string, { to, storage }: MigrateVm): void {
    const { registry } = this.#options;
    const managed = registry.find(reference);
    registry.require(managed, 'migrate');
    const { spec } = managed.record;
    const isShared = storage === 'shared' || (storage !== 'copied' && spec.disk.storage !== undefined);
    this.#options.peers.expect(this.#options.peers.find(to).id, isShared ? 'memory' : 'disk');
  }

  async ask(reference: string, request: MigrateVm) {
    const { registry, runner } = this.#options;
    const managed = registry.find(reference);
    registry.require(managed, 'migrate');
    const peer = this.#options.peers.find(request.to);
    const wantedRelays = request.relays?.map((relay) => this.#options.peers.find(relay));
    const custodian = custodianOf(request, peer, this.#options.peers);
    const id = newId();
    const host = await runner.facts();
    const ask = async (storage: MigrationOptions['storage']) => {
      const vm = await this.#vmToMove(managed, storage);
      const { mode, engine: wanted = custodian ? 'relayed' : 'auto' } = request;
      // For the checks it makes no difference which engine it will be; a mode that is left to us is one that works there.
      const asPlanned = optionsOf(request, storage, { engine: 'direct', mode: mode ?? 'precopy' });
      const choosing = () =>
        chooseRelays(this.#options.fleet, {
          wanted: wantedRelays,
          destination: peer,
          custodian,
          replicas: request.replicas ?? defaultReplicas,
          // One that stands on no image here and on one there is mirrored as a whole.
          ...(storage === 'copied' && !vm.wholeDisk && { diskBytes: vm.diskBytes }),
        });
      // Relays that are wanted in any case are asked meanwhile.
      const early = wanted === 'relayed' ? choosing() : undefined;
      early?.catch(() => {});
      const sentAt = new Date().toISOString();
      const asked = performance.now();
      const missingCpuFeatures = missingCpuFeaturesOf(vm, host);
      const question = {
        vm,
        options: asPlanned,
        qemuVersion: host.qemu.version,
        ...(missingCpuFeatures ? { missingCpuFeatures } : {}),
        sentAt,
      };
      const answer = await this.#options.peers.check(peer, id, question);
      const rttMs = Math.round(performance.now() - asked);
      const { cloudletBps } = this.#options.peers.limits;
      const limits = [request.limits?.bandwidthBps, cloudletBps].filter((each) => typeof each === 'number');
      const latest = this.#options.journal.latest();
      const ofSets = vmOfSets(vm, asPlanned, (each) => runner.diskOf(each));
      let choice = chooseEngine({
        wanted,
        mode,
        canPostcopy: answer.canPostcopy ?? false,
        channels: asPlanned.channels,
        linkBps: linkBpsOf(latest, peer.id),
        limitBps: limits.length > 0 ? Math.min(...limits) : undefined,
        qemuVersion: host.qemu.version,
        sets: await this.#options.references.inCommon(ofSets, answer.sets ?? []),
        // Memory at others only for those who leave both to us.
        ...(wanted === 'auto' && mode === undefined && { uplinkBps: uplinkBpsOf(latest) }),
      });
      const found = choice.engine === 'relayed' ? await (early ?? choosing()) : undefined;
      // Where there is no room for that the disk is mirrored.
      if (found && !(await this.#takesFromRelays(peer, id, question, found.relayed)))
        delete found.relayed.diskRelays;
      // One that nobody asked for is done without.
      if (found && found.problems.length > 0 && wanted === 'auto')
        choice = withoutRelays(choice, answer.canPostcopy ?? false);
      const isRelayed = choice.engine === 'relayed' && found;
      if (isRelayed) choice = { ...choice, reason: `${choice.reason}; ${describeRelays(found.relayed)}` };
      const options = {
        ...optionsOf(request, storage, choice),
        ...(isRelayed ? { relayed: found.relayed } : {}),
      };
      const ofRelays = isRelayed ? found.problems : [];
      const ofCustodian = custodian ? await this.#problemsAt(custodian, id, question) : [];
      const here = this.#problemsHere(vm, answer.hasImage);
      const problems = [...answer.problems, ...here, ...ofRelays, ...ofCustodian];
      return { id, managed, peer, vm, options, choice, rttMs, hasImage: answer.hasImage, problems };
    };
    const wanted = request.storage ?? 'auto';
    if (wanted !== 'auto') return ask(wanted);
    if (managed.record.spec.disk.storage === undefined) return ask('copied');
    const shared = await ask('shared');
    return shared.problems.some(({ field }) => field === 'disk.storage') ? ask('copied') : shared;
  }

  /** A disk that comes by way of relays takes more room than one that is mirrored. */
  async #takesFromRelays(
    peer: Peer,
    id: Uuid,
    question: Parameters<PeerSide['check']>[2],
    relayed: NonNullable<MigrationOptions['relayed']>,
  ): Promise<boolean> {
    if (!relayed.diskRelays) return true;
    const sentAt = new Date().toISOString();
    const options = { ...question.options, relayed };
    const { problems } = await this.#options.peers.check(peer, id, { ...question, options, sentAt });
    return problems.every(({ field }) => field !== 'disk');
  }

  /** A VM that came with a disk on shared storage may have no image here that could be sent. */
  #problemsHere({ image, wholeDisk }: VmToMove, hasImage: boolean): Problem[] {
    if (hasImage || !wholeDisk || this.#options.store.images.get(image.digest)) return [];
    const message = `Neither side has the image ${image.digest}, which the disk there would stand on: import it`;
    return [{ field: 'image', value: image.digest, wanted: 'an image that one side has', message }];
  }

  /** Why a third cloudlet could not go on with the VM. */
  async #problemsAt(
    custodian: Peer,
    id: Uuid,
    question: Parameters<PeerSide['check']>[2],
  ): Promise<Problem[]> {
    if (question.options.storage !== 'shared') {
      const message = `${custodian.name} could not go on with the VM: its disk is not on storage that both have`;
      return [{ field: 'custodian', value: custodian.name, wanted: 'a disk on shared storage', message }];
    }
    const sentAt = new Date().toISOString();
    const { problems } = await this.#options.peers.check(custodian, id, { ...question, sentAt });
    return problems.map((problem) => ({
      ...problem,
      field: `custodian.${problem.field}`,
      message: `At ${custodian.name}, its custodian: ${problem.message}`,
    }));
  }

  async #vmToMove({ record, stalled }: Managed, storage: MigrationOptions['storage']): Promise<VmToMove> {
    const { store, runner } = this.#options;
    const { disk } = record.spec;
    const { storage: sharedStorage, ...copiedDisk } = disk;
    // A disk on shared storage needs no image, so there may be none here any more.
    const image = store.images.get(disk.image);
    const { digest, format, fileBytes, virtualBytes } = image ?? unknownImage(disk.image);
    return {
      id: record.id,
      name: record.name,
      spec: storage === 'shared' ? record.spec : { ...record.spec, disk: copiedDisk },
      // One that stands still for want of space runs on where there is some.
      running: record.state === 'running' || stalled !== undefined,
      epoch: record.epoch ?? 1,
      runningWith: record.runningWith ?? 'tcg',
      image: { digest, format, fileBytes, virtualBytes },
      diskBytes: storage === 'shared' ? 0 : await runner.diskBytesOf(record),
      ...(storage === 'copied' && sharedStorage !== undefined ? { wholeDisk: true } : {}),
      ...(record.attachment ? { attachment: record.attachment } : {}),
      ...(record.continuity ? { continuity: record.continuity } : {}),
      ...(record.tenant ? { tenant: record.tenant } : {}),
    };
  }
}

/** The third peer that may go on with the VM, if one is wanted. */
function custodianOf(
  { custodian, engine = 'relayed', relays }: MigrateVm,
  destination: Peer,
  peers: Pick<PeerSide, 'find'>,
): Peer | undefined {
  if (custodian === undefined) return undefined;
  const found = peers.find(custodian);
  const isRelay = relays?.some((relay) => relay === found.id || relay === found.name) ?? false;
  if (engine === 'relayed' && found.id !== destination.id && !isRelay) return found;
  throw new AppError(
    'invalid_request',
    `Migrate VM: the custodian is ${custodian}, with the engine ${engine}`,
    {
      problems: [
        {
          field: 'body.custodian',
          value: custodian,
          wanted: 'a peer that is neither the destination nor a relay, with the engine relayed',
        },
      ],
    },
  );
}

const unknownImage = (digest: string): VmToMove['image'] => ({
  digest,
  format: 'qcow2',
  fileBytes: 0,
  virtualBytes: 0,
});

const withoutRelays = ({ reason }: EngineChoice, canPostcopy: boolean): EngineChoice => ({
  engine: 'condensed',
  mode: modeFor('condensed', canPostcopy),
  reason: `${reason.split(':')[0]}, but too few peers lend memory`,
});

function optionsOf(
  request: MigrateVm,
  storage: MigrationOptions['storage'],
  { engine, mode }: Pick<EngineChoice, 'engine' | 'mode'>,
): MigrationOptions {
  const { channels = 0 } = request;
  if (engine === 'relayed' && mode === 'precopy') {
    throw new AppError('invalid_request', 'Migrate VM: the mode is precopy with the engine relayed', {
      problems: [{ field: 'body.mode', value: mode, wanted: 'postcopy, hybrid or auto, or another engine' }],
    });
  }
  if (channels > 0 && mode !== 'precopy') {
    throw new AppError(
      'invalid_request',
      `Migrate VM: channels is ${channels} with mode ${mode}, wanted precopy`,
      {
        problems: [{ field: 'body.channels', value: channels, wanted: '0, or the mode precopy' }],
      },
    );
  }
  return {
    mode,
    engine,
    storage,
    limits: { ...defaultLimits, ...request.limits },
    channels,
  };
}
