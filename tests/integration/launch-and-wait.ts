/** A program for machine.test.ts to kill: launches the VM of its first argument, tells its process, and waits. */
import { Machine } from '../../src/vm/machine.ts';

const machine = await Machine.launch(JSON.parse(process.argv[2]!));
await machine.resume();
process.stdout.write(`${JSON.stringify(machine.process)}\n`);
setInterval(() => {}, 1000);
