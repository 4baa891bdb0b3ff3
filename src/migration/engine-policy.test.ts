import assert from 'node:assert/strict';
import { test } from 'node:test';
import { chooseEngine } from './engine-policy.ts';

const facts = {
  wanted: 'auto',
  mode: undefined,
  canPostcopy: true,
  channels: 0,
  linkBps: undefined,
  limitBps: undefined,
  qemuVersion: '10.0.2',
  sets: [],
} as const;

test('an engine that is asked for is taken, whatever the link', () => {
  assert.equal(chooseEngine({ ...facts, wanted: 'direct' }).engine, 'direct');
  assert.equal(chooseEngine({ ...facts, wanted: 'condensed', linkBps: 1e11 }).engine, 'condensed');
});

test('left to itself it condenses, unless the link is faster than that', () => {
  assert.equal(chooseEngine(facts).engine, 'condensed');
  assert.equal(chooseEngine({ ...facts, linkBps: 60e6 }).engine, 'condensed');
  assert.equal(chooseEngine({ ...facts, linkBps: 10e9 }).engine, 'direct');
  assert.equal(chooseEngine({ ...facts, linkBps: 10e9, limitBps: 100e6 }).engine, 'condensed');
  assert.equal(chooseEngine({ ...facts, channels: 4 }).engine, 'direct');
});

test('a QEMU whose memory cannot be read does its post-copy itself', () => {
  const old = { ...facts, mode: 'auto', qemuVersion: '7.2.15', sets: ['image:sha256:00'] } as const;
  assert.equal(chooseEngine(old).engine, 'direct');
  const choice = chooseEngine({ ...old, mode: undefined });
  assert.deepEqual([choice.engine, choice.mode], ['condensed', 'precopy']);
  assert.match(choice.reason, /hold nothing/);
});

test('the mode is auto where a post-copy can be taken back, unless one is asked for', () => {
  const modeOf = (change: Partial<Parameters<typeof chooseEngine>[0]>) =>
    chooseEngine({ ...facts, ...change }).mode;
  assert.equal(modeOf({}), 'auto');
  assert.equal(modeOf({ wanted: 'condensed' }), 'auto');
  assert.equal(modeOf({ canPostcopy: false }), 'precopy');
  assert.equal(modeOf({ linkBps: 10e9 }), 'precopy', 'direct');
  assert.equal(modeOf({ wanted: 'relayed' }), 'postcopy');
  assert.equal(modeOf({ mode: 'hybrid' }), 'hybrid');
});

test('the reason names the rate that decided, and what need not travel', () => {
  const sets = ['image:sha256:00', 'golden:11', 'golden:22', 'stayed:0:33', 'other:44'];
  const { reason } = chooseEngine({ ...facts, linkBps: 60e6, sets });
  assert.match(reason, /60 Mbit\/s/);
  assert.match(reason, /the base image, memory of a golden snapshot, memory that stayed behind$/);
});

test('a destination that takes far less than can leave has relays', () => {
  const slow = { ...facts, linkBps: 20e6 };
  assert.equal(chooseEngine({ ...slow, uplinkBps: 200e6 }).engine, 'relayed');
  assert.match(chooseEngine({ ...slow, uplinkBps: 200e6 }).reason, /takes 20 of 200 Mbit/);
  assert.equal(chooseEngine({ ...slow, uplinkBps: 35e6 }).engine, 'condensed');
  assert.equal(chooseEngine({ ...slow, uplinkBps: 200e6, limitBps: 30e6 }).engine, 'condensed');
  assert.equal(chooseEngine(slow).engine, 'condensed', 'where nothing is to be relayed');
});
