import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { test } from 'node:test';
import fc from 'fast-check';
import type { SeedSpec } from '../model/vm.ts';
import { seedFiles } from './seed-files.ts';

const mac = '02:00:00:00:00:01';
const otherMac = '02:00:00:00:00:02';
const instanceId = '7b0c1c1e-8a54-4d0a-9f0c-2f4a39f0a001';
const spec = (changed: Partial<SeedSpec> = {}): SeedSpec => ({
  hostname: 'guest-1',
  sshKeys: [],
  addresses: [],
  ...changed,
});
const filesOf = (changed: Partial<SeedSpec> = {}, macs: string[] = []) =>
  seedFiles({ spec: spec(changed), instanceId, macs });
const parsed = (text: string | undefined) => JSON.parse((text ?? '').replace('#cloud-config\n', ''));

test('meta-data and user-data carry identity, the default user and the keys', () => {
  const sshKeys = ['ssh-ed25519 AAAA user@host', 'ssh-rsa BBBB'];
  const files = filesOf({ sshKeys });
  assert.deepEqual(parsed(files['meta-data']), { 'instance-id': instanceId, 'local-hostname': 'guest-1' });
  assert.match(files['user-data'] ?? '', /^#cloud-config\n/);
  assert.deepEqual(parsed(files['user-data']), {
    hostname: 'guest-1',
    users: ['default'],
    ssh_authorized_keys: sshKeys,
  });
});

test('user data of the caller replaces ours byte by byte', () => {
  const userData = '#!/bin/sh\necho "it\'s me"\n';
  assert.equal(filesOf({ userData })['user-data'], userData);
});

test('static addresses are matched by MAC, the other interfaces ask by DHCP', () => {
  const addresses = [{ mac, address: '10.0.0.2/24', gateway: '10.0.0.1' }];
  assert.deepEqual(parsed(filesOf({ addresses }, [mac, otherMac])['network-config']), {
    version: 2,
    ethernets: {
      nic0: {
        match: { macaddress: mac },
        dhcp4: false,
        addresses: ['10.0.0.2/24'],
        routes: [{ to: '0.0.0.0/0', via: '10.0.0.1' }],
      },
      nic1: { match: { macaddress: otherMac }, dhcp4: true },
    },
  });
});

test('one interface takes an address of each family', () => {
  const addresses = [
    { mac, address: '10.0.0.2/24' },
    { mac, address: 'fd00::2/64', gateway: 'fd00::1' },
  ];
  const { ethernets } = parsed(filesOf({ addresses })['network-config']);
  assert.deepEqual(ethernets.nic0.addresses, ['10.0.0.2/24', 'fd00::2/64']);
  assert.deepEqual(ethernets.nic0.routes, [{ to: '::/0', via: 'fd00::1' }]);
});

test('without knowledge of interfaces there is no network-config', () => {
  assert.equal(filesOf()['network-config'], undefined);
});

test('a shell that sources viper.env gets the values as they are', () => {
  const sshKeys = [`ssh-ed25519 AAAA Bob's "lap$top" \`id\` \\ $(reboot)`, 'ssh-rsa BBBB'];
  const addresses = [
    { mac, address: '10.0.0.2/24', gateway: '10.0.0.1' },
    { mac: otherMac, address: 'fd00::2/64' },
  ];
  const env = filesOf({ sshKeys, addresses })['viper.env'] ?? '';
  const show = (name: string) =>
    execFileSync('sh', ['-c', `eval "$1"; printf %s "$${name}"`, 'sh', env], { encoding: 'utf8' });
  assert.equal(show('VIPER_HOSTNAME'), 'guest-1');
  assert.equal(show('VIPER_INSTANCE_ID'), instanceId);
  assert.equal(show('VIPER_SSH_KEYS'), sshKeys.join('\n'));
  assert.equal(show('VIPER_ADDRESSES'), `${mac}=10.0.0.2/24,10.0.0.1 ${otherMac}=fd00::2/64`);
});

test('every field that cannot be written safely is named with its value and what was wanted', () => {
  const bad: { changed: Partial<SeedSpec>; field: string }[] = [
    { changed: { hostname: "x'; reboot" }, field: 'seed.hostname' },
    { changed: { hostname: '' }, field: 'seed.hostname' },
    { changed: { sshKeys: ['good', 'two\nlines'] }, field: 'seed.sshKeys/1' },
    { changed: { sshKeys: [' '] }, field: 'seed.sshKeys/0' },
    { changed: { sshKeys: ['lone \ud800'] }, field: 'seed.sshKeys/0' },
    { changed: { addresses: [{ mac: 'no', address: '10.0.0.2/24' }] }, field: 'seed.addresses/0/mac' },
    { changed: { addresses: [{ mac, address: '10.0.0.2' }] }, field: 'seed.addresses/0/address' },
    { changed: { addresses: [{ mac, address: '10.0.0.2/33' }] }, field: 'seed.addresses/0/address' },
    { changed: { addresses: [{ mac, address: "10.0.0.2/24'" }] }, field: 'seed.addresses/0/address' },
    {
      changed: { addresses: [{ mac, address: '10.0.0.2/24', gateway: 'fd00::1' }] },
      field: 'seed.addresses/0/gateway',
    },
  ];
  for (const { changed, field } of bad)
    assert.throws(
      () => filesOf(changed),
      (error: { code: string; message: string; details: { problems: { field: string }[] } }) =>
        error.code === 'invalid_request' &&
        error.message.includes(field) &&
        error.details.problems[0]?.field === field,
      field,
    );
});

test('no key escapes its line or its quotes', () => {
  fc.assert(
    fc.property(fc.array(fc.string({ unit: 'binary' }), { maxLength: 3 }), (sshKeys) => {
      let files: Record<string, string>;
      try {
        files = filesOf({ sshKeys });
      } catch {
        return;
      }
      assert.deepEqual(parsed(files['user-data']).ssh_authorized_keys ?? [], sshKeys);
      const unquoted = (files['viper.env'] ?? '').replace(/'[^']*'|\\'/g, '');
      assert.equal(
        unquoted,
        'VIPER_HOSTNAME=\nVIPER_INSTANCE_ID=\nVIPER_SSH_KEYS=\nVIPER_ADDRESSES=\nVIPER_WAITING=\n',
      );
    }),
    { numRuns: 500 },
  );
});
