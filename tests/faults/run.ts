/**
 * The fault table: every journalled step of a migration, struck by everything that can go wrong, with real daemons.
 *   node tests/faults/run.ts [--only TEXT]... [--quick] [--cut SECONDS] [--times N] [--logs DIRECTORY]
 *                            [--results FILE] [--for SECONDS] [--parallel N]
 * In DIRECTORY are the logs of the daemons of each case that went wrong. With FILE the table can be run in pieces: what
 * it holds is not run again, and is in the table. After SECONDS no other case begins. N pairs of daemons share the
 * cases, which spend most of their time waiting.
 * Exit code 1 if a VM was lost or doubled, if something was left over, or if a case could not be run.
 */
import { appendFileSync, existsSync, readFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import Table from 'cli-table3';
import { type Case, cases, nameOf, quickCases } from './cases.ts';
import { type Outcome, Stage } from './stage.ts';

const { values } = parseArgs({
  options: {
    only: { type: 'string', multiple: true },
    quick: { type: 'boolean', default: false },
    cut: { type: 'string', default: '30' },
    times: { type: 'string', default: '1' },
    logs: { type: 'string' },
    results: { type: 'string' },
    parallel: { type: 'string', default: '1' },
    for: { type: 'string', default: 'Infinity' },
  },
});
const isWanted = (one: Case) => !values.only || values.only.some((text) => nameOf(one).includes(text));
const once = (values.quick ? quickCases : cases).filter(isWanted);
const wanted = Array.from({ length: Number(values.times) }, () => once).flat();

const known = values.results ? readResults(values.results) : [];
const outcomes: Outcome[] = known.filter(({ name }) => wanted.some((one) => nameOf(one) === name));
const left = wanted.filter((one) => !outcomes.some(({ name }) => name === nameOf(one)));
const endAt = performance.now() + Number(values.for) * 1000;
// The case at work is ended in good order, and the table is printed as far as it came.
const stop = new AbortController();
for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => stop.abort());
const queue = [...left];
await Promise.all(Array.from({ length: Math.min(Number(values.parallel), left.length) }, work));

async function work(): Promise<void> {
  await using stage = await Stage.set({ cutMs: Number(values.cut) * 1000, logs: values.logs });
  for (let one = queue.shift(); one; one = queue.shift()) {
    if (stop.signal.aborted || performance.now() > endAt) break;
    if (one.fault === 'destination disk full' && !stage.canFillDisks) {
      console.error(`${nameOf(one)}: left out, only root can mount a small disk`);
      continue;
    }
    const outcome = await stage.run(one);
    outcomes.push(outcome);
    if (values.results) appendFileSync(values.results, `${JSON.stringify(outcome)}\n`);
    console.error(describe(outcome));
  }
}

const table = new Table({
  head: ['case', 'outcome', 'lost', 'stopped', 'doubled', 'left over', 's'],
  style: { head: [] },
});
for (const { name, outcome, lost, stopped, doubled, leftovers, problem, seconds } of outcomes) {
  const count = (is: boolean) => (is ? '1' : '0');
  table.push([
    name,
    problem ?? outcome,
    count(lost),
    count(stopped),
    count(doubled),
    leftovers.join('\n') || '0',
    seconds,
  ]);
}
console.log(table.toString());
const { length: notBegun } = wanted.filter((one) => !outcomes.some(({ name }) => name === nameOf(one)));
if (notBegun > 0) console.log(`${notBegun} more are to be run`);
const sum = {
  cases: outcomes.length,
  lost: outcomes.filter(({ lost }) => lost).length,
  stopped: outcomes.filter(({ stopped }) => stopped).length,
  doubled: outcomes.filter(({ doubled }) => doubled).length,
  leftovers: outcomes.filter(({ leftovers }) => leftovers.length > 0).length,
  notRun: outcomes.filter(({ problem }) => problem).length,
};
console.log(
  `${sum.cases} cases: ${sum.lost} lost, ${sum.stopped} stopped by a post-copy that cannot be loaded, ${sum.doubled} doubled, ${sum.leftovers} with leftovers, ${sum.notRun} stuck or not met`,
);
process.exitCode = sum.lost + sum.doubled + sum.leftovers + sum.notRun > 0 || sum.cases === 0 ? 1 : 0;

function readResults(file: string): Outcome[] {
  const lines = existsSync(file) ? readFileSync(file, 'utf8').split('\n') : [];
  return lines.filter((line) => line !== '').map((line) => JSON.parse(line) as Outcome);
}

function describe({ name, outcome, lost, doubled, leftovers, problem, told, seconds }: Outcome): string {
  const bad = [lost ? 'LOST' : '', doubled ? 'DOUBLED' : '', problem ? `PROBLEM ${problem}` : ''];
  const said = [outcome, told, ...bad, ...leftovers].filter((part) => part !== '');
  return `${name}: ${said.join('; ')} (${seconds} s)`;
}
