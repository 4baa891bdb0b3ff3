/**
 * What to do about a trigger: the target is the neighbour that is nearest to the device and has room for its VM
 * (distributed API, 6.2), and then the thesis's algorithm 4.7 says whether to go there. Pure: all observations and
 * forecasts come in, a decision with every number that it was made from comes out.
 *
 * A peer may lie about its RTT to the device. Its RTT to us it cannot shorten (it has to echo a nonce), and by the
 * triangle inequality it cannot be nearer to the device than the difference of the two RTTs that we measure
 * ourselves; what it claims beyond that does not count. What the device itself reports goes before any claim.
 */
import type { Candidate, Decision, DecisionPolicy, HandoffForecast, Trigger } from '../model/follow.ts';
import type { Uuid } from '../model/ids.ts';
import type { Standing } from './neighbours.ts';

export const defaultDecisionPolicy: DecisionPolicy = {
  neighbourRttMs: 150,
  improvementMs: 2,
  improvementRatio: 0.2,
  crispRttMs: 150,
  annoyingRttMs: 1000,
};

/** What is known of one peer. */
export interface CandidateInput {
  cloudletId: Uuid;
  name: string;
  standing: Standing;
  neighbourRttMs?: number | undefined;
  /** Missing if the peer did not answer in time, or cannot reach the device. */
  claimedRttMs?: number | undefined;
  reportedRttMs?: number | undefined;
  seesDevice?: boolean | undefined;
  problems: readonly string[];
  /** Only for those that were asked for it. */
  forecast?: HandoffForecast | undefined;
}

export interface DecisionInput {
  trigger: Trigger;
  /** Missing if the device does not answer here. */
  hereRttMs?: number | undefined;
  candidates: readonly CandidateInput[];
}

export type Verdict = Pick<Decision, 'candidates' | 'outcome' | 'target' | 'reasons'>;

export function decide({ hereRttMs, candidates, trigger }: DecisionInput, policy: DecisionPolicy): Verdict {
  const reasons = [trigger.message];
  const judged = candidates.map((each) => judge(each, hereRttMs, policy));
  const possible = judged.filter(({ verdict }) => verdict === 'possible').toSorted(byNearness);
  const best = possible[0];
  if (!best) {
    reasons.push(
      candidates.length === 0 ? 'There are no other cloudlets' : 'No other cloudlet would serve better',
    );
    return { candidates: judged, outcome: 'stay', reasons };
  }
  best.verdict = 'chosen';
  best.why = `nearest to the device: ${show(best.deviceRttMs!)}`;
  reasons.push(`${best.name} is ${show(best.deviceRttMs!)} from the device, ${describeHere(hereRttMs)}`);
  const { outcome, reason } = algorithm47(initialRttMs(best, hereRttMs), best.forecast, policy);
  reasons.push(reason);
  return { candidates: judged, outcome, target: { id: best.cloudletId, name: best.name }, reasons };
}

/** Whether a candidate is worth a forecast, and how near it counts. */
export function judge(
  input: CandidateInput,
  hereRttMs: number | undefined,
  policy: DecisionPolicy,
): Candidate {
  const { cloudletId, name, standing, neighbourRttMs, claimedRttMs, reportedRttMs, forecast } = input;
  const deviceRttMs = effectiveRttMs(input, hereRttMs);
  const candidate: Candidate = {
    cloudletId,
    name,
    ...(neighbourRttMs === undefined ? {} : { neighbourRttMs }),
    ...(claimedRttMs === undefined ? {} : { claimedRttMs }),
    ...(reportedRttMs === undefined ? {} : { reportedRttMs }),
    ...(deviceRttMs === undefined ? {} : { deviceRttMs }),
    seesDevice: input.seesDevice ?? false,
    problems: [...input.problems],
    ...(forecast ? { forecast } : {}),
    verdict: 'excluded',
    why: '',
  };
  const exclude = (why: string): Candidate => ({ ...candidate, why });
  if (standing === 'far')
    return exclude(
      `no neighbour: ${show(neighbourRttMs ?? 0)} away, wanted under ${policy.neighbourRttMs} ms`,
    );
  if (standing === 'silent') return exclude('no neighbour: it has not answered of late');
  if (standing === 'unknown') return exclude('no neighbour: its RTT was not measured yet');
  if (deviceRttMs === undefined) return exclude('it does not reach the device, or did not answer in time');
  if (hereRttMs !== undefined && deviceRttMs > wantedRttMs(hereRttMs, policy)) {
    const wanted = show(Math.max(0, wantedRttMs(hereRttMs, policy)));
    return exclude(`${show(deviceRttMs)} from the device, wanted at most ${wanted}`);
  }
  if (input.problems.length > 0) return exclude(`it cannot take the VM: ${input.problems.join('; ')}`);
  return { ...candidate, verdict: 'possible', why: `${show(deviceRttMs)} from the device` };
}

/** The most that counts as an improvement over the RTT from here. */
const wantedRttMs = (hereRttMs: number, { improvementMs, improvementRatio }: DecisionPolicy): number =>
  hereRttMs - Math.max(improvementMs, hereRttMs * improvementRatio);

/** Routes are no straight lines, and one measurement is not the other: what the triangle inequality is eased by. */
const triangleSlack = { ratio: 0.25, ms: 5 };

/** The RTT that counts for a candidate, or undefined if nobody knows one. */
export function effectiveRttMs(
  { claimedRttMs, reportedRttMs, neighbourRttMs }: CandidateInput,
  hereRttMs: number | undefined,
): number | undefined {
  if (reportedRttMs !== undefined) return reportedRttMs;
  if (claimedRttMs === undefined || hereRttMs === undefined || neighbourRttMs === undefined)
    return claimedRttMs;
  const least = Math.abs(hereRttMs - neighbourRttMs) * (1 - triangleSlack.ratio) - triangleSlack.ms;
  return Math.max(claimedRttMs, least, 0);
}

/** Between device and VM while the VM is still here: measured, or over the candidate (thesis, 3.3). */
const initialRttMs = ({ deviceRttMs, neighbourRttMs }: Candidate, hereRttMs: number | undefined): number =>
  hereRttMs ?? deviceRttMs! + (neighbourRttMs ?? 0);

/** Steps 3 to 5 of the thesis's algorithm 4.7. */
export function algorithm47(
  initialMs: number,
  forecast: HandoffForecast | undefined,
  { crispRttMs, annoyingRttMs }: DecisionPolicy,
): { outcome: Decision['outcome']; reason: string } {
  if (!forecast) return { outcome: 'stay', reason: 'There is no forecast of what the migration would cost' };
  const { deltaRttMs, totalMs, serviceInitiationMs } = forecast;
  const duringMs = initialMs + deltaRttMs;
  const during = `During the migration the RTT would be ${show(duringMs)} (${show(initialMs)} + ${show(deltaRttMs)})`;
  if (duringMs <= crispRttMs) {
    return { outcome: 'migrate', reason: `${during}, at most ${crispRttMs} ms: nobody notices` };
  }
  const times = `it takes ${show(totalMs)}, a fresh service ${show(serviceInitiationMs)}`;
  if (duringMs > annoyingRttMs)
    return { outcome: 'fresh', reason: `${during}, over ${annoyingRttMs} ms: a fresh service serves better` };
  if (totalMs < serviceInitiationMs) return { outcome: 'migrate', reason: `${during}, and ${times}` };
  return { outcome: 'fresh', reason: `${during}, and ${times}: a fresh service is there sooner` };
}

/** Who sees the device in its own LAN goes first among equals. */
const byNearness = (a: Candidate, b: Candidate): number =>
  Math.round(a.deviceRttMs!) - Math.round(b.deviceRttMs!) ||
  Number(b.seesDevice) - Number(a.seesDevice) ||
  (a.neighbourRttMs ?? 0) - (b.neighbourRttMs ?? 0) ||
  (a.cloudletId < b.cloudletId ? -1 : 1);

const describeHere = (rttMs: number | undefined): string =>
  rttMs === undefined ? 'which does not answer here' : `this cloudlet ${show(rttMs)}`;

const show = (ms: number): string => (ms < 10 ? `${Number(ms.toFixed(1))} ms` : `${Math.round(ms)} ms`);
