/** The dependency rule of the house (docs/architecture.md): which room may import which, and no circles. */
import assert from 'node:assert/strict';
import { readdirSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';

const source = path.resolve(import.meta.dirname, '../../src');
const rooms = readdirSync(source);

/** What each room may import beside itself. */
const allowed: Record<string, readonly string[]> = {
  model: [],
  contract: ['model'],
  stream: ['model'],
  qmp: ['model'],
  network: ['model'],
  vm: ['model', 'qmp', 'network'],
  fleet: ['model'],
  link: ['model'],
  pages: ['model'],
  relay: ['model', 'stream'],
  nbd: ['model'],
  follow: ['model'],
  migration: ['model', 'qmp', 'vm', 'link', 'stream', 'pages', 'nbd', 'relay'],
  daemon: [
    'model',
    'contract',
    'qmp',
    'network',
    'vm',
    'fleet',
    'link',
    'follow',
    'migration',
    'pages',
    'relay',
  ],
  sdk: ['model', 'contract'],
  // What runs on a device that a VM follows.
  device: ['model', 'sdk', 'network'],
  cli: ['model', 'contract', 'sdk', 'lab', 'device', 'network'],
  lab: ['model', 'network', 'vm', 'sdk'],
  bench: [
    'model',
    'contract',
    'sdk',
    'lab',
    'daemon',
    'vm',
    'pages',
    'migration',
    'stream',
    'follow',
    'relay',
  ],
};

interface Import {
  file: string;
  from: string;
  to: string;
}

function* importsOf(room: string): Generator<Import> {
  for (const entry of readdirSync(path.join(source, room), { recursive: true, withFileTypes: true })) {
    // A test may reach further: it stands outside of what runs.
    if (!entry.isFile() || !entry.name.endsWith('.ts') || entry.name.endsWith('.test.ts')) continue;
    const file = path.join(entry.parentPath, entry.name);
    const text = readFileSync(file, 'utf8');
    for (const [, target] of text.matchAll(/(?:from|import)\s*\(?\s*'(\.[^']+)'/g)) {
      const to = path.relative(source, path.resolve(path.dirname(file), target!)).split(path.sep)[0]!;
      yield { file: path.relative(source, file), from: room, to };
    }
  }
}

test('every room imports only what the plan of the house allows', () => {
  const wrong = rooms
    .flatMap((room) => [...importsOf(room)])
    .filter(({ from, to }) => from !== to && to !== '..' && !allowed[from]?.includes(to))
    .map(({ file, to }) => `${file} imports ${to}`);
  assert.deepEqual(wrong, []);
});

test('every room is in the plan', () => {
  assert.deepEqual(
    rooms.filter((room) => !(room in allowed)),
    [],
  );
});

test('the plan has no circle', () => {
  const visit = (room: string, trail: string[]): void => {
    assert.ok(!trail.includes(room), `circle: ${[...trail, room].join(' -> ')}`);
    for (const next of allowed[room] ?? []) visit(next, [...trail, room]);
  };
  for (const room of Object.keys(allowed)) visit(room, []);
});
