import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { addToGroups, distanceM, formGroups, removeFromGroups, type Site, walkM } from './groups.ts';

const metre = 1 / 111_195;
/** On a line to the east, in metres. */
const site = (cloudletId: string, eastM: number, coverageM = 50): Site => ({
  cloudletId,
  latitude: 0,
  longitude: eastM * metre,
  coverageM,
});
const sitesOf = (list: Site[]) => new Map(list.map((each) => [each.cloudletId, each]));

test('a walker covers 936 m before MPTCP gives up', () => {
  assert.equal(walkM, 936);
});

test('a degree of latitude is 111 km', () => {
  assert.ok(Math.abs(distanceM({ latitude: 0, longitude: 0 }, { latitude: 1, longitude: 0 }) - 111_195) < 5);
});

test('cloudlets within the reach of their radios and 936 m form a group, one beyond it its own', () => {
  const groups = formGroups([site('a', 0), site('b', 1030), site('c', 2100)]);
  assert.deepEqual(
    groups.map(({ members }) => members),
    [['a', 'b'], ['c']],
  );
});

test('a cloudlet between two groups joins both, and they are not merged', () => {
  const groups = formGroups([site('a', 0), site('c', 2000), site('b', 1000)]);
  assert.deepEqual(
    groups.map(({ members }) => members),
    [
      ['a', 'b'],
      ['c', 'b'],
    ],
  );
});

test('the larger of the radios counts, too', () => {
  assert.equal(formGroups([site('a', 0, 50), site('b', 1500, 600)]).length, 1);
});

test('removing a cloudlet that held a group together tells into which parts it falls', () => {
  const list = [site('a', 0), site('b', 1000), site('c', 2000)];
  const [group] = formGroups(list);
  assert.deepEqual(group!.members, ['a', 'b', 'c']);
  const { groups, split } = removeFromGroups([group!], 'b', sitesOf(list));
  assert.deepEqual(groups[0]!.members, ['a', 'c']);
  assert.deepEqual(split, [{ name: 'vpn1', parts: [['a'], ['c']] }]);
  assert.deepEqual(removeFromGroups([group!], 'c', sitesOf(list)).split, []);
});

test('the last member takes its group along', () => {
  const list = [site('a', 0)];
  assert.deepEqual(removeFromGroups(formGroups(list), 'a', sitesOf(list)), { groups: [], split: [] });
});

test('whatever order they come in: all are in a group, none twice in one, each has a near member, again changes nothing', () => {
  const list = fc.uniqueArray(fc.integer({ min: 0, max: 8000 }), { minLength: 1, maxLength: 15 });
  fc.assert(
    fc.property(list, (eastMs) => {
      const sites = eastMs.map((east, i) => site(`c${i}`, east));
      const groups = formGroups(sites);
      for (const each of sites) {
        const inGroups = groups.filter(({ members }) => members.includes(each.cloudletId));
        assert.ok(inGroups.length > 0);
        for (const { members } of inGroups) {
          assert.equal(new Set(members).size, members.length);
          const near = members.some(
            (id) =>
              id !== each.cloudletId &&
              distanceM(each, sites[Number(id.slice(1))]!) <= 50 + 50 + walkM + 1e-6,
          );
          assert.ok(near || members.length === 1);
        }
        assert.deepEqual(addToGroups(groups, each, sitesOf(sites)), groups);
      }
    }),
  );
});
