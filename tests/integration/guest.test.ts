/** A guest that boots: its agent, its console, and its end by its own will. */
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { QmpConnection } from '../../src/qmp/index.ts';
import { readConsoleLog } from '../../src/vm/console-log.ts';
import { Machine } from '../../src/vm/machine.ts';
import { sh, testMac, until, Workshop } from './tiny-vm.ts';

const options = { timeout: 180_000 };
let workshop: Workshop;
let machine: Machine;
before(async () => {
  workshop = await Workshop.open();
  machine = await workshop.boot();
}, options);
after(() => workshop[Symbol.asyncDispose]());

test('the console log has the greeting, though nobody was attached', options, async () => {
  const { directory } = workshop;
  const log = `${directory}/${machine.id}`;
  await until(
    async () => (await readConsoleLog(log, 4096)).toString(),
    (text) => /viper guest \S+ ready/.test(text),
  );
});

test('the agent tells the host name, the kernel and the interface', options, async () => {
  const facts = await machine.agent.facts();
  assert.equal(facts.hostname, 'tiny');
  assert.match(facts.kernel ?? '', /^6\./);
  assert.ok(facts.interfaces?.some(({ mac }) => mac === testMac));
});

test(
  'a program in the guest gets its input and gives its output, errors and exit code',
  options,
  async () => {
    const result = await machine.agent.exec({
      argv: ['/bin/sh', '-c', 'cat; echo "$1" >&2; exit 3', 'sh', "it's $HOME; `x`"],
      input: 'from the host\n',
      timeoutMs: 60_000,
    });
    assert.deepEqual(result, {
      exitCode: 3,
      stdout: 'from the host\n',
      stderr: "it's $HOME; `x`\n",
      truncated: false,
    });
    const missing = await machine.agent.exec({ argv: ['/none'], timeoutMs: 60_000 });
    assert.equal(missing.exitCode, 127);
    const killed = await machine.agent.exec({ argv: ['/bin/sh', '-c', 'kill -9 $$'], timeoutMs: 60_000 });
    assert.equal(killed.exitCode, 137);
  },
);

test('more output than is kept is cut and said so', options, async () => {
  const result = await machine.agent.exec({
    argv: ['/bin/sh', '-c', 'head -c 1500000 /dev/zero | tr "\\0" x'],
    timeoutMs: 60_000,
  });
  assert.equal(result.stdout.length, 1024 * 1024);
  assert.equal(result.truncated, true);
});

test('output beyond all bounds is an error, and the agent answers the next request', options, async () => {
  await assert.rejects(
    machine.agent.exec({ argv: ['/bin/sh', '-c', 'head -c 6000000 /dev/zero'], timeoutMs: 60_000 }),
    { code: 'agent_unavailable' },
  );
  await machine.agent.waitUntilReady({ timeoutMs: 60_000 });
});

test('a program that runs too long is ended in the guest', options, async () => {
  await assert.rejects(machine.agent.exec({ argv: ['/bin/sleep', '1234'], timeoutMs: 300 }), {
    code: 'timeout',
  });
  await until(
    () => sh(machine, 'pgrep -f "^/bin/sleep 1234" || true'),
    (pids) => pids === '',
  );
});

test('a paused guest stands still and its agent with it, and both go on', options, async () => {
  await machine.pause();
  await assert.rejects(machine.agent.ping({ timeoutMs: 200 }), { code: 'agent_unavailable' });
  await machine.resume();
  await machine.agent.waitUntilReady({ timeoutMs: 60_000 });
  const ticks = Number(await sh(machine, 'cat /run/ticks'));
  await until(
    async () => Number(await sh(machine, 'cat /run/ticks')),
    (now) => now > ticks,
  );
});

test('what is typed on the console reaches the guest', options, async () => {
  const session = machine.console.attach();
  session.write('\r\necho typed-$((6 * 7))\r\n');
  let seen = '';
  for await (const bytes of session) {
    seen += bytes.toString();
    if (seen.includes('typed-42')) break;
  }
});

test('filesystems freeze and thaw, or the guest says that it cannot', options, async () => {
  try {
    assert.ok((await machine.agent.fsFreeze()) >= 0);
    await machine.agent.fsThaw();
  } catch (error) {
    assert.equal((error as { code: string }).code, 'unsupported');
  }
});

test('a guest that powers off while nobody watches has shut down, not crashed', options, async () => {
  const { id, process } = machine;
  const directory = `${workshop.directory}/${id}`;
  await sh(machine, '(sleep 0.5; poweroff) > /dev/null 2>&1 &');
  machine.detach();
  {
    // Not a Machine: that one would tell QEMU to quit.
    await using monitor = await QmpConnection.connect(machine.paths.qmp);
    await until(
      () => monitor.execute('query-status'),
      ({ status }) => status === 'shutdown',
    );
  }
  const adopted = await Machine.adopt({ id, directory, process });
  assert.ok(adopted, 'QEMU waits to be told');
  assert.equal((await adopted.exited).reason, 'shutdown');
});

test('a stop powers a guest off, even one that is paused', options, async () => {
  const other = await workshop.boot();
  await other.pause();
  const exit = await other.stop({ graceMs: 60_000 });
  assert.equal(exit.reason, 'shutdown', exit.detail);
});
