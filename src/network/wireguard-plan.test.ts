import assert from 'node:assert/strict';
import { test } from 'node:test';
import { planWireguard } from './wireguard-plan.ts';

const owner = 'abcdef01-0000-4000-8000-000000000000';
const [b, c] = [`${'b'.repeat(43)}=`, `${'c'.repeat(43)}=`];

test('members of the groups are peers, and those that are none any more are removed', () => {
  const peers = [{ publicKey: b, endpoint: '192.0.2.2:51820', allowedIps: ['10.200.0.2/32', '10.2.0.0/24'] }];
  const address = '10.200.0.1/24';
  const wanted = { owner, address, listenPort: 51820, privateKeyFile: '/key', peers };
  assert.deepEqual(
    planWireguard(wanted, [b, c]).map((command) => command.join(' ')),
    [
      `wg set vipwabcdef01 listen-port 51820 private-key /key peer ${c} remove peer ${b} endpoint 192.0.2.2:51820 persistent-keepalive 25 allowed-ips 10.200.0.2/32,10.2.0.0/24`,
      'ip address replace 10.200.0.1/24 dev vipwabcdef01',
      'ip link set dev vipwabcdef01 mtu 1420 up',
      'ip route replace 10.2.0.0/24 dev vipwabcdef01 metric 1000',
    ],
  );
});
