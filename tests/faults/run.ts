/**
 * The fault table: every journalled step of a migration, struck by everything that can go wrong, with real daemons.
 *   node tests/faults/run.ts [--only TEXT]... [--quick] [--cut SECONDS] [--times N] [--logs DIRECTORY]
 * In DIRECTORY are the logs of the daemons of each case that went wrong.
 * Exit code 1 if a VM was lost or doubled, if something was left over, or if a case could not be run.
 */
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
  },
});
const isWanted = (one: Case) => !values.only || values.only.some((text) => nameOf(one).includes(text));
const once = (values.quick ? quickCases : cases).filter(isWanted);
const wanted = Array.from({ length: Number(values.times) }, () => once).flat();

const outcomes: Outcome[] = [];
// The case at work is ended in good order, and the table is printed as far as it came.
const stop = new AbortController();
for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => stop.abort());
{
  await using stage = await Stage.set({ cutMs: Number(values.cut) * 1000, logs: values.logs });
  for (const one of wanted) {
    if (stop.signal.aborted) break;
    if (one.fault === 'destination disk full' && !stage.canFillDisks) {
      console.error(`${nameOf(one)}: left out, only root can mount a small disk`);
      continue;
    }
    const outcome = await stage.run(one);
    outcomes.push(outcome);
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

function describe({ name, outcome, lost, doubled, leftovers, problem, seconds }: Outcome): string {
  const bad = [lost ? 'LOST' : '', doubled ? 'DOUBLED' : '', problem ? `PROBLEM ${problem}` : ''];
  const said = [outcome, ...bad, ...leftovers].filter((part) => part !== '');
  return `${name}: ${said.join('; ')} (${seconds} s)`;
}
