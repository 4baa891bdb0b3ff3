import assert from 'node:assert/strict';
import { test } from 'node:test';
import { chooseEngine } from './engine-policy.ts';

const facts = { wanted: 'auto', channels: 0, linkBps: undefined, limitBps: undefined } as const;

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

test('the reason names the rate that decided', () => {
  assert.match(chooseEngine({ ...facts, linkBps: 60e6 }).reason, /60 Mbit\/s/);
});

test('a destination that takes far less than can leave has relays', () => {
  const facts = { wanted: 'auto', channels: 0, linkBps: 20e6, limitBps: undefined } as const;
  assert.equal(chooseEngine({ ...facts, uplinkBps: 200e6 }).engine, 'relayed');
  assert.match(chooseEngine({ ...facts, uplinkBps: 200e6 }).reason, /takes 20 of 200 Mbit/);
  assert.equal(chooseEngine({ ...facts, uplinkBps: 60e6 }).engine, 'condensed');
  assert.equal(chooseEngine({ ...facts, uplinkBps: 200e6, limitBps: 30e6 }).engine, 'condensed');
  assert.equal(chooseEngine(facts).engine, 'condensed', 'where nothing is to be relayed');
});
