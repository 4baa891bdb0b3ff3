import assert from 'node:assert/strict';
import { test } from 'node:test';
import { type WireguardSite, wireguardConfig } from './wireguard.ts';

const key = (letter: string) => `${letter.repeat(43)}=`;
const site = (name: string, changes: Partial<WireguardSite> = {}): WireguardSite => ({
  cloudletId: name,
  name,
  endpoint: { host: `${name}.example.org`, port: 51820 },
  publicKey: key(name[0]!),
  lans: [`10.${name.charCodeAt(0)}.0.0/24`],
  ...changes,
});
const own = { address: '10.200.0.1/24', listenPort: 51820, privateKeyFile: '/var/lib/viper/wireguard.key' };
const group = { name: 'vpn1', members: ['a', 'b', 'c'] };
const sitesOf = (...list: WireguardSite[]) => new Map(list.map((each) => [each.cloudletId, each]));

test('the configuration has each other member as a peer with its LANs, and no secret', () => {
  const { interfaceName, text } = wireguardConfig(group, 'a', sitesOf(site('a'), site('b'), site('c')), own);
  assert.equal(interfaceName, 'vpr-vpn1');
  assert.equal(
    text,
    `# VPN group vpn1; wg-quick up vpr-vpn1
[Interface]
Address = 10.200.0.1/24
ListenPort = 51820
PostUp = wg set %i private-key /var/lib/viper/wireguard.key

# b
[Peer]
PublicKey = ${key('b')}
Endpoint = b.example.org:51820
AllowedIPs = 10.98.0.0/24
PersistentKeepalive = 25

# c
[Peer]
PublicKey = ${key('c')}
Endpoint = c.example.org:51820
AllowedIPs = 10.99.0.0/24
PersistentKeepalive = 25
`,
  );
});

test('an IPv6 endpoint stands in brackets', () => {
  const six = site('b', { endpoint: { host: '2001:db8::1', port: 1 } });
  assert.match(
    wireguardConfig(group, 'a', sitesOf(site('a'), six), own).text,
    /Endpoint = \[2001:db8::1\]:1\n/,
  );
});

test('two members with the same LAN are refused by name', () => {
  const same = site('b', { lans: ['10.97.0.0/24'] });
  assert.throws(() => wireguardConfig(group, 'a', sitesOf(site('a'), same), own), /LAN 10.97.0.0\/24 of/);
});

test('a value that would be a line of its own is refused by the name of its field', () => {
  for (const [bad, field] of [
    [site('b', { endpoint: { host: 'x\nPostUp = rm', port: 1 } }), /host of b/],
    [site('b', { publicKey: 'short' }), /publicKey of b/],
    [site('b', { lans: ['10.0.0.0/24\nPostUp = rm'] }), /LAN of b/],
  ] as const)
    assert.throws(() => wireguardConfig(group, 'a', sitesOf(site('a'), bad), own), field);
  assert.throws(() => wireguardConfig(group, 'x', sitesOf(site('a')), own), /not in group/);
});
