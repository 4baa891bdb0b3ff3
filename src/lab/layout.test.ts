import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { layOut, wiresOf } from './layout.ts';
import { parseLab } from './spec.ts';

const label = fc.stringMatching(/^[a-z][a-z0-9]{0,7}$/);
const labs = fc
  .uniqueArray(
    label.filter((name) => !['core', 'cell', 'radio', 'cellular', 'host'].includes(name)),
    { minLength: 2, maxLength: 24 },
  )
  .chain((names) =>
    fc.record({
      name: label,
      cloudlets: fc.constant(names.slice(0, Math.ceil(names.length / 2))),
      devices: fc.constant(names.slice(Math.ceil(names.length / 2)).map((name) => ({ name, cellular: {} }))),
      topology: fc.constantFrom('mesh' as const, 'star' as const),
      subnet: fc.nat({ max: 511 }),
    }),
  );

test('no two parts of a lab share a name or an address, and Linux takes every device name', () => {
  fc.assert(
    fc.property(labs, ({ subnet, ...wish }) => {
      const layout = layOut(parseLab(wish), subnet);
      const ends = wiresOf(layout).flatMap((wire) => wire.ends);
      const addresses = [
        layout.hostAddress,
        ...layout.sites.flatMap(({ address, gateway }) => [address, gateway]),
        ...layout.links.flatMap((link) => link.addresses),
        ...layout.devices.flatMap((device) => [
          device.cellular!.address,
          device.cellular!.gateway,
          ...layout.sites.map((site) => device.addressAt(site)),
        ]),
      ];
      const namespaces = [
        layout.core,
        layout.cell,
        ...[...layout.sites, ...layout.devices].map((each) => each.namespace),
      ];
      for (const all of [
        addresses,
        namespaces,
        wiresOf(layout).map(({ name }) => name),
        ends.map(({ namespace, device }) => `${namespace} ${device}`),
      ])
        assert.equal(new Set(all).size, all.length, all.join(' '));
      for (const { device } of [...ends, { device: layout.hostDevice }])
        assert.ok(device.length <= 15, device);
      for (const namespace of namespaces) assert.ok(namespace.startsWith(`viper-${wish.name}-`));
    }),
  );
});

test('a mesh joins each two cloudlets, a star each with the first', () => {
  const names = (topology: 'mesh' | 'star') =>
    layOut(parseLab({ topology }), 0).links.map(({ wire }) => wire.name);
  assert.deepEqual(names('mesh'), ['c1-c2', 'c1-c3', 'c2-c3']);
  assert.deepEqual(names('star'), ['c1-c2', 'c1-c3']);
});

test('gateways have one MAC everywhere, or each its own', () => {
  const macs = (gatewayMac: 'anycast' | 'own') =>
    new Set(layOut(parseLab({ gatewayMac }), 0).sites.map((site) => site.gatewayMac)).size;
  assert.deepEqual([macs('anycast'), macs('own')], [1, 3]);
});
