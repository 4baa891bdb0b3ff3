import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { test } from 'node:test';
import type { ExecRequest, ExecResult } from './agent.ts';
import { changeIdentity, renewLeases } from './identity.ts';

const identity = {
  hostname: 'clone',
  machineId: 'abcdef0123456789abcdef0123456789',
  macs: [{ from: '02:00:00:00:00:01', to: '02:00:00:00:00:02' }],
};

/** An agent that notes what it is asked to run. */
function fakeAgent(result: Partial<ExecResult> = {}) {
  const requests: ExecRequest[] = [];
  const exec = async (request: ExecRequest): Promise<ExecResult> => {
    requests.push(request);
    return { exitCode: 0, stdout: '', stderr: '', truncated: false, ...result };
  };
  return { exec, requests };
}

test('values travel as arguments beside a fixed script', async () => {
  const agent = fakeAgent();
  await changeIdentity(agent, identity);
  const [request] = agent.requests;
  const [, , , hostname, machineId, seconds, ...macs] = request!.argv;
  assert.deepEqual(request!.argv.slice(0, 3), ['/bin/sh', '-s', '--']);
  assert.deepEqual(
    [hostname, machineId, macs],
    ['clone', identity.machineId, Object.values(identity.macs[0]!)],
  );
  assert.match(seconds!, /^\d{10}$/);
  assert.ok(!String(request!.input).includes('clone'));
});

test('what is not a host name, machine id or MAC address never reaches the guest', async () => {
  const agent = fakeAgent();
  const wrong = [
    { ...identity, hostname: 'a b' },
    { ...identity, hostname: '' },
    { ...identity, machineId: 'abc' },
    { ...identity, macs: [{ from: '02:00:00:00:00:01', to: '$(reboot)' }] },
  ];
  for (const value of wrong) await assert.rejects(changeIdentity(agent, value), { code: 'invalid_request' });
  assert.deepEqual(agent.requests, []);
});

test('a guest that refuses is told with its own words', async () => {
  const agent = fakeAgent({ exitCode: 1, stderr: 'no interface has the address\n' });
  await assert.rejects(changeIdentity(agent, identity), {
    code: 'qemu_failed',
    details: { exitCode: 1, output: 'no interface has the address' },
  });
});

test('the scripts are good POSIX shell', async () => {
  const agent = fakeAgent();
  await changeIdentity(agent, identity);
  await renewLeases(agent);
  for (const { argv, input } of agent.requests) {
    const scripts = [String(input), ...argv.filter((item) => item.includes('\n'))];
    for (const script of scripts) execFileSync('sh', ['-n'], { input: script });
  }
});
