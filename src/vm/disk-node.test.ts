import assert from 'node:assert/strict';
import { test } from 'node:test';
import { diskNode, isRemote } from './disk-node.ts';

test('a path is a file of this host, whatever is in its name', () => {
  for (const path of ['/var/lib/viper/vms/one/disk.qcow2', '/mnt/nfs://odd,name'])
    assert.deepEqual(diskNode(path), { driver: 'file', filename: path });
});

test('an NFS URL names server and path, and no port, which the portmapper tells', () => {
  assert.deepEqual(diskNode('nfs://nas.example/export/vms/viper-1.qcow2'), {
    driver: 'nfs',
    server: { type: 'inet', host: 'nas.example' },
    path: '/export/vms/viper-1.qcow2',
  });
});

test('a Gluster URL names server, volume and path; IPv6 goes without its brackets', () => {
  const server = { type: 'inet', host: 'fd00::7', port: '24009' };
  assert.deepEqual(diskNode('gluster://[fd00::7]:24009/volume/a/b.qcow2'), {
    driver: 'gluster',
    volume: 'volume',
    path: 'a/b.qcow2',
    server: [server],
  });
  const { server: byDefault } = diskNode('gluster://host/volume/b.qcow2');
  assert.deepEqual(byDefault, [{ type: 'inet', host: 'host', port: '24007' }]);
});

test('a URL without a file is refused', () => {
  for (const url of [
    'nfs://host/',
    'nfs://host/export/',
    'gluster://host/volume',
    'gluster://host/volume/',
  ]) {
    assert.ok(isRemote(url));
    assert.throws(() => diskNode(url), { code: 'invalid_request' });
  }
});
