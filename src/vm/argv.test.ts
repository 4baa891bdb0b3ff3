import assert from 'node:assert/strict';
import { test } from 'node:test';
import { MiB } from '../model/units.ts';
import type { VmSpec } from '../model/vm.ts';
import { type Launch, maxNets, qemuArgv } from './argv.ts';

const spec: VmSpec = {
  machine: 'pc-q35-7.2',
  accelerator: 'auto',
  cpu: { model: 'Nehalem', count: 2 },
  memoryBytes: 512 * MiB,
  disk: { image: `sha256:${'0'.repeat(64)}`, sizeBytes: 1024 * MiB },
  nets: [
    { network: 'user', mac: '02:00:00:00:00:01' },
    { network: 'lan', mac: '02:00:00:00:00:02' },
  ],
  seed: { hostname: 'one', sshKeys: [], addresses: [] },
};

const launch: Launch = {
  id: '11111111-1111-4111-8111-111111111111',
  name: 'one',
  spec,
  accelerator: 'tcg',
  directory: '/var/lib/viper/vms/one',
  diskFile: '/var/lib/viper/vms/one/disk.qcow2',
  seedFile: '/var/lib/viper/vms/one/seed.iso',
  taps: [null, 'vpr0'],
};

/** The values of one option, in order. */
const values = (argv: string[], option: string): string[] =>
  argv.flatMap((value, index) => (value === option ? [argv[index + 1]!] : []));

const devices = (argv: string[]): Record<string, unknown>[] =>
  values(argv, '-device').map((text) => JSON.parse(text));

test('a whole spec gives these arguments', () => {
  assert.deepEqual(qemuArgv(launch).join('\n'), golden);
});

const golden = `\
-name
guest=one,process=viper-one,debug-threads=on
-uuid
11111111-1111-4111-8111-111111111111
-no-user-config
-nodefaults
-display
none
-msg
timestamp=on
-sandbox
on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-machine
pc-q35-7.2,usb=off,vmport=off,smm=off,sata=off,dump-guest-core=off
-accel
tcg,thread=multi,tb-size=256
-cpu
Nehalem
-m
size=524288K
-smp
cpus=2,maxcpus=2,sockets=1,cores=2,threads=1
-rtc
base=utc
-boot
strict=on
-global
ICH9-LPC.disable_s3=1
-global
ICH9-LPC.disable_s4=1
-object
{"qom-type":"rng-builtin","id":"rng-source"}
-S
-action
shutdown=pause
-chardev
socket,id=qmp,path=/var/lib/viper/vms/one/qmp.sock,server=on,wait=off
-mon
chardev=qmp,mode=control
-blockdev
{"driver":"file","filename":"/var/lib/viper/vms/one/disk.qcow2","node-name":"disk-file","discard":"unmap","cache":{"direct":false,"no-flush":false}}
-blockdev
{"driver":"qcow2","node-name":"disk","file":"disk-file","discard":"unmap","detect-zeroes":"unmap","cache":{"direct":false,"no-flush":false}}
-device
{"driver":"virtio-blk-pci","write-cache":"on","disable-legacy":"on","id":"disk0","drive":"disk","serial":"viper-disk","werror":"stop","rerror":"stop","bootindex":0,"bus":"pcie.0","addr":"0x02"}
-blockdev
{"driver":"raw","node-name":"seed","read-only":true,"file":{"driver":"file","node-name":"seed-file","filename":"/var/lib/viper/vms/one/seed.iso","read-only":true}}
-device
{"driver":"virtio-blk-pci","write-cache":"on","disable-legacy":"on","id":"disk1","drive":"seed","serial":"viper-seed","bus":"pcie.0","addr":"0x03"}
-chardev
socket,id=agent,path=/var/lib/viper/vms/one/agent.sock,server=on,wait=off
-device
{"driver":"virtio-serial-pci","id":"serial","disable-legacy":"on","bus":"pcie.0","addr":"0x04"}
-device
{"driver":"virtserialport","bus":"serial.0","nr":1,"chardev":"agent","id":"agent0","name":"org.qemu.guest_agent.0"}
-chardev
socket,id=console,path=/var/lib/viper/vms/one/console.sock,server=on,wait=off,logfile=/var/lib/viper/vms/one/console.log,logappend=on
-device
{"driver":"isa-serial","id":"console0","chardev":"console","index":0}
-netdev
{"type":"user","id":"net0"}
-device
{"driver":"virtio-net-pci","id":"nic0","netdev":"net0","mac":"02:00:00:00:00:01","romfile":"","disable-legacy":"on","bus":"pcie.0","addr":"0x10"}
-netdev
{"type":"tap","id":"net1","ifname":"vpr0","script":"no","downscript":"no"}
-device
{"driver":"virtio-net-pci","id":"nic1","netdev":"net1","mac":"02:00:00:00:00:02","romfile":"","disable-legacy":"on","bus":"pcie.0","addr":"0x11"}
-device
{"driver":"virtio-rng-pci","id":"rng","rng":"rng-source","disable-legacy":"on","bus":"pcie.0","addr":"0x05"}
-device
{"driver":"virtio-balloon-pci","id":"balloon","deflate-on-oom":true,"free-page-reporting":false,"disable-legacy":"on","bus":"pcie.0","addr":"0x06"}
-device
{"driver":"vmgenid","id":"generation","guid":"11111111-1111-4111-8111-111111111111"}
-device
{"driver":"pcie-root-port","id":"hotplug0","chassis":1,"slot":1,"bus":"pcie.0","addr":"0x1c.0x0","multifunction":true}
-device
{"driver":"pcie-root-port","id":"hotplug1","chassis":2,"slot":2,"bus":"pcie.0","addr":"0x1c.0x1","multifunction":false}
-device
{"driver":"pcie-root-port","id":"hotplug2","chassis":3,"slot":3,"bus":"pcie.0","addr":"0x1c.0x2","multifunction":false}
-device
{"driver":"pcie-root-port","id":"hotplug3","chassis":4,"slot":4,"bus":"pcie.0","addr":"0x1c.0x3","multifunction":false}`;

test('a VM that takes over another one has the same devices and waits for its memory', () => {
  const argv = qemuArgv({ ...launch, directory: '/elsewhere', incoming: true });
  assert.deepEqual(devices(argv), devices(qemuArgv(launch)));
  assert.deepEqual(values(argv, '-incoming'), ['defer']);
});

test('no two devices share a place, with every interface and a seed', () => {
  const nets = Array.from({ length: maxNets }, (_, index) => ({
    network: 'user',
    mac: `02:00:00:00:00:0${index}`,
  }));
  const places = devices(qemuArgv({ ...launch, spec: { ...spec, nets } }))
    .filter(({ bus }) => bus === 'pcie.0')
    .map(({ addr }) => addr);
  assert.equal(places.length, 5 + maxNets + 4);
  assert.equal(new Set(places).size, places.length);
});

test('a missing seed moves no other device', () => {
  const places = (argv: string[]) => devices(argv).map(({ id, bus, addr }) => `${id} ${bus} ${addr}`);
  const without = qemuArgv({ ...launch, seedFile: undefined });
  assert.deepEqual(
    places(without),
    places(qemuArgv(launch)).filter((place) => !place.startsWith('disk1 ')),
  );
});

test('under KVM a CPU feature that the host lacks is an error', () => {
  const argv = qemuArgv({ ...launch, accelerator: 'kvm' });
  assert.deepEqual(values(argv, '-cpu'), ['Nehalem,enforce=on']);
  assert.deepEqual(values(argv, '-accel'), ['kvm']);
});

test('commas in names and paths do not end a value', () => {
  const argv = qemuArgv({ ...launch, name: 'a,b', directory: '/x,readonly=on' });
  assert.match(values(argv, '-name')[0]!, /^guest=a,,b,process=viper-a,,b,/);
  for (const chardev of values(argv, '-chardev')) assert.match(chardev, /path=\/x,,readonly=on\//);
});
