import assert from 'node:assert/strict';
import { test } from 'node:test';
import { planAddress, planCellular, planEnter, planLeave } from './device.ts';
import { layOut } from './layout.ts';
import { parseLab } from './spec.ts';

const { sites, devices } = layOut(parseLab({ devices: [{ name: 'phone', cellular: {} }] }), 0);
const [c1, c2] = [sites[0]!, sites[1]!];
const phone = devices[0]!;
const lines = (commands: readonly (readonly string[])[]) => commands.map((command) => command.join(' '));
const radio = { rttMs: 0, rateBps: 50e6, lossPercent: 0, isCut: false };

test('a device that leaves is unplugged, down and without address', () => {
  assert.deepEqual(lines(planLeave(phone, c1)), [
    'ip -n viper-lab-c1 link set dev ap-phone nomaster down',
    'ip -n viper-lab-phone link set dev wlan0 down',
    'ip -n viper-lab-phone address flush dev wlan0',
  ]);
});

test('one that enters brings its radio link, whose rate is set again there', () => {
  assert.deepEqual(lines(planEnter(phone, { from: c1, to: c2, radio, emulator: 'vde' })), [
    'ip -n viper-lab-c1 link set dev ap-phone netns viper-lab-c2',
    'tc -n viper-lab-c2 qdisc replace dev ap-phone root tbf rate 50000000bit burst 37500b latency 100ms',
    'ip -n viper-lab-c2 link set dev ap-phone master lan0 up',
    'ip -n viper-lab-phone link set dev wlan0 up',
  ]);
});

test('one that comes back to where it was is only plugged in again', () => {
  assert.deepEqual(lines(planEnter(phone, { from: c1, to: c1, radio, emulator: 'vde' })), [
    'ip -n viper-lab-c1 link set dev ap-phone master lan0 up',
    'ip -n viper-lab-phone link set dev wlan0 up',
  ]);
});

test('its address in a LAN is an even one, and the way out is the gateway there', () => {
  assert.deepEqual(lines(planAddress(phone, c2)), [
    'ip -n viper-lab-phone address add 10.2.0.200/24 dev wlan0',
    'ip -n viper-lab-phone route add default via 10.2.0.1 dev wlan0 metric 100',
  ]);
});

test('the cellular link is the way out for its own address, and for all else when there is no LAN', () => {
  const commands = lines(planCellular(phone));
  const out = 'default via 100.66.1.1 dev cell0';
  assert.ok(commands.includes(`ip -n viper-lab-phone route add ${out} metric 1000`));
  assert.ok(commands.includes('ip -n viper-lab-phone rule add from 100.66.1.2 table 100'));
  assert.ok(commands.includes(`ip -n viper-lab-phone route add ${out} table 100`));
});
