/** Cloudlets that stand near each other form a VPN group, and its tunnel is up: real WireGuard between network namespaces. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { LabFleet } from '../../src/lab/fleet.ts';
import { Lab } from '../../src/lab/lab.ts';
import { until } from './lab-vm.ts';
import { labName, ping, skip } from './lab-world.ts';

const options = { skip, timeout: 300_000 };

test(
  'the members of a group reach each other through its tunnel, and one that leaves does not',
  options,
  async () => {
    await using lab = await Lab.up({ name: labName('v'), cloudlets: ['c1', 'c2'] });
    await using fleet = await LabFleet.create(lab);
    for (const [index, { name, address }] of lab.layout.sites.entries()) {
      const privateKey = execFileSync('wg', ['genkey'], { encoding: 'utf8' });
      const privateKeyFile = path.join(lab.directory, `${name}.key`);
      writeFileSync(privateKeyFile, privateKey, { mode: 0o600 });
      const publicKey = execFileSync('wg', ['pubkey'], { input: privateKey, encoding: 'utf8' }).trim();
      const tunnel = { publicKey, privateKeyFile, host: address, port: 51820 };
      await fleet.add(name, {
        follow: {
          measureEveryMs: 1000,
          site: { latitude: 60.17, longitude: 24.94, coverageM: 100 },
          wireguard: { ...tunnel, address: `10.200.0.${index + 1}/24` },
        },
      });
    }
    const arrives = () => ping(lab, 'c1', '10.200.0.2', '-c', '2', '-i', '0.2');
    const { minMs } = await until('a ping through the tunnel', arrives, ({ received }) => received > 0);
    // Over the WAN, and nowhere else.
    assert.ok(minMs >= 18, `${minMs} ms`);
    const [c1, c2] = fleet.cloudlets;
    await c1!.viper.removePeer({ params: { peer: c2!.id } });
    const [program, ...args] = lab.commandIn('c1', ['ip', '-br', 'link']);
    await until('the end of the tunnel', () => !execFileSync(program, args).includes('vipw'));
  },
);
