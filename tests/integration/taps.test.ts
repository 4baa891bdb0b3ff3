/** Taps on bridges, made by the real `ip`, in a network namespace of this test alone. */
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { newId, newMac } from '../../src/model/ids.ts';
import {
  type CloudletNetwork,
  type Link,
  listLinksCommand,
  parseLinks,
  type Run,
  Taps,
  tapName,
} from '../../src/network/index.ts';
import { run as runOnHost } from '../../src/vm/run.ts';

const { signal } = new AbortController();
const skip = process.getuid?.() === 0 ? false : 'network namespaces need root';
const namespace = `vipertest-${process.pid}`;
const run: Run = (program, args, options) =>
  runOnHost('ip', ['netns', 'exec', namespace, program, ...args], options);
const ip = (...args: string[]) => run('ip', args, { signal });
const networks: CloudletNetwork[] = [
  { name: 'user', kind: 'user' },
  { name: 'lan', kind: 'bridge', bridge: 'viperbr0' },
];
const owner = newId();
const taps = new Taps({ owner, networks, run });
const onLan = () => ({ network: 'lan', mac: newMac() });

async function links(): Promise<Link[]> {
  const [program, ...args] = listLinksCommand;
  return parseLinks((await run(program, args, { signal })).stdout);
}
const find = async (name: string) => (await links()).find((link) => link.name === name);

if (!skip) {
  before(async () => {
    await runOnHost('ip', ['netns', 'add', namespace], { signal });
    await ip('link', 'add', 'name', 'viperbr0', 'mtu', '1450', 'type', 'bridge');
    await ip('link', 'set', 'dev', 'viperbr0', 'up');
  });
  after(async () => {
    await runOnHost('ip', ['netns', 'delete', namespace], { signal });
  });
}

test('taps come and go with their VM, on the bridge and with its MTU', { skip }, async () => {
  const vmId = newId();
  const names = await taps.up(vmId, [onLan(), { network: 'user', mac: newMac() }, onLan()]);
  assert.deepEqual(names, [tapName(vmId, 0), null, tapName(vmId, 2)]);
  const { mtu, master, kind, alias } = (await find(tapName(vmId, 0)))!;
  assert.deepEqual(
    { mtu, master, kind, alias },
    { mtu: 1450, master: 'viperbr0', kind: 'tun', alias: `viper:${owner}:${vmId}` },
  );
  assert.deepEqual(await taps.up(vmId, [onLan()]), [tapName(vmId, 0)], 'a second time replaces them');
  assert.equal(await find(tapName(vmId, 2)), undefined);
  await taps.down(vmId);
  await taps.down(vmId);
  assert.equal(await find(tapName(vmId, 0)), undefined);
});

test('cleaning touches only the taps of this cloudlet whose VM is gone', { skip }, async () => {
  const [kept, gone, foreign] = [newId(), newId(), newId()];
  await taps.up(kept, [onLan()]);
  await taps.up(gone, [onLan()]);
  await new Taps({ owner: newId(), networks, run }).up(foreign, [onLan()]);
  await ip('tuntap', 'add', 'dev', 'tap0', 'mode', 'tap');
  await ip('link', 'add', 'vipabcdef01n0', 'type', 'bridge');
  assert.deepEqual(await taps.removeStrays([kept]), [tapName(gone, 0)]);
  for (const name of [tapName(kept, 0), tapName(foreign, 0), 'tap0', 'vipabcdef01n0', 'viperbr0'])
    assert.ok(await find(name), name);
});

test('a tap of somebody else under our name is neither taken over nor removed', { skip }, async () => {
  const vmId = newId();
  await new Taps({ owner: newId(), networks, run }).up(vmId, [onLan()]);
  await assert.rejects(taps.up(vmId, [onLan()]), {
    code: 'unsupported',
    message: /another device named vip/,
  });
  await taps.down(vmId);
  assert.ok(await find(tapName(vmId, 0)));
});

test('a device that is no bridge is an error that names it, and leaves no tap', { skip }, async () => {
  const vmId = newId();
  const elsewhere = new Taps({ owner, networks: [{ name: 'lan', kind: 'bridge', bridge: 'tap0' }], run });
  await assert.rejects(elsewhere.up(vmId, [onLan()]), {
    code: 'unsupported',
    message: /tap0 is no bridge but tun/,
  });
  assert.equal(await find(tapName(vmId, 0)), undefined);
});
