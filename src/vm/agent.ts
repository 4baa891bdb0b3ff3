/**
 * The QEMU guest agent of one VM. Requests queue up and run one at a time; the connection is made when it is first
 * needed, and anew after a timeout or garbage. Every reply is the word of a guest that may lie: it is parsed here,
 * bounded here, and is never more than data.
 */
import { AppError } from '../model/errors.ts';
import { MiB } from '../model/units.ts';
import { delay, isObject, type JsonObject, type WaitOptions, withDeadline } from '../qmp/index.ts';
import { AgentConnection, agentUnavailable } from './agent-connection.ts';
import { type GuestFacts, parseInterfaces, parseOs } from './guest-facts.ts';

const maxQueued = 64;
const defaultTimeoutMs = 5_000;
/** While the guest boots, one sync waits in its channel this long before another is tried. */
const readyAttemptMs = 5_000;
const maxOutputBytes = MiB;

export interface ExecRequest {
  /** The program by its path, or by its name if it is on the agent's PATH, and its arguments. */
  argv: [string, ...string[]];
  input?: string | Uint8Array;
}

export interface ExecResult {
  /** As a shell tells it: 127 if the program is not there, 128 + n after signal n. */
  exitCode: number;
  stdout: string;
  stderr: string;
  /** There was more output than is given here. */
  truncated: boolean;
}

export class GuestAgent {
  readonly #path: string;
  #connection: AgentConnection | undefined;
  #lastTurn: Promise<void> = Promise.resolve();
  #queued = 0;

  constructor(socketPath: string) {
    this.#path = socketPath;
  }

  /** Resolves if the agent answers in time. */
  async ping(options: WaitOptions = {}): Promise<void> {
    await this.#request('guest-ping', {}, options);
  }

  /** Waits for a booting guest until its agent answers. */
  async waitUntilReady({ timeoutMs, signal }: { timeoutMs: number; signal?: AbortSignal }): Promise<void> {
    const deadline = performance.now() + timeoutMs;
    for (;;) {
      const leftMs = deadline - performance.now();
      try {
        return await this.ping({ timeoutMs: Math.max(1, Math.min(leftMs, readyAttemptMs)), signal });
      } catch (error) {
        const isOver = performance.now() >= deadline;
        if (!(error instanceof AppError) || error.code !== 'agent_unavailable' || isOver) throw error;
        // A refusal may have come at once.
        await delay(100, signal);
      }
    }
  }

  /** What the guest says of itself; what its agent cannot tell is missing. */
  async facts(options: WaitOptions = {}): Promise<GuestFacts> {
    const host = await this.#optional('guest-get-host-name', options);
    const os = parseOs(await this.#optional('guest-get-osinfo', options));
    const interfaces = parseInterfaces(await this.#optional('guest-network-get-interfaces', options));
    const hostname = isObject(host) && typeof host['host-name'] === 'string' ? host['host-name'] : undefined;
    return {
      ...(hostname !== undefined && { hostname: hostname.slice(0, 255) }),
      ...os,
      ...(interfaces && { interfaces }),
    };
  }

  /**
   * Runs a program in the guest, as root and without a shell, and waits for its end. After a timeout or an abort
   * the program is killed as far as the agent can.
   */
  async exec(request: ExecRequest & { timeoutMs: number; signal?: AbortSignal }): Promise<ExecResult> {
    const { argv, input, timeoutMs, signal } = request;
    const [path, ...args] = argv;
    const deadline = performance.now() + timeoutMs;
    let started: unknown;
    try {
      started = await this.#request(
        'guest-exec',
        {
          path,
          arg: args,
          'capture-output': true,
          ...(input !== undefined && { 'input-data': Buffer.from(input).toString('base64') }),
        },
        { timeoutMs: Math.min(timeoutMs, defaultTimeoutMs), signal },
      );
    } catch (error) {
      if (!(error instanceof AppError) || error.details.agentClass !== 'GenericError') throw error;
      return { exitCode: 127, stdout: '', stderr: `${error.details.output}\n`, truncated: false };
    }
    if (!isObject(started) || !Number.isSafeInteger(started.pid)) throw nonsense('guest-exec');
    const pid = started.pid as number;
    try {
      for (let pauseMs = 5; ; pauseMs = Math.min(pauseMs * 1.5, 250)) {
        const status = await this.#request('guest-exec-status', { pid }, { signal });
        if (isObject(status) && status.exited === true) return execResult(status);
        if (performance.now() > deadline) {
          throw new AppError('timeout', `${path} did not end in the guest within ${timeoutMs} ms`, {
            waitedFor: 'guest program',
            timeoutMs,
          });
        }
        await delay(pauseMs, signal);
      }
    } catch (error) {
      if (path !== '/bin/kill') this.#kill(pid);
      throw error;
    }
  }

  /** Asks the guest to power off. It resolves when the agent has taken the request, not when the guest is off. */
  async shutdown(options: WaitOptions = {}): Promise<void> {
    await this.ping(options);
    try {
      // The agent answers only if it refuses; silence is consent.
      await this.#request(
        'guest-shutdown',
        { mode: 'powerdown' },
        { timeoutMs: 500, signal: options.signal },
      );
    } catch (error) {
      if (!(error instanceof AppError) || error.code !== 'agent_unavailable') throw error;
    }
  }

  /** Flushes and freezes the guest's filesystems, and gives their number; `fsThaw` must follow soon. */
  fsFreeze(options: WaitOptions = {}): Promise<number> {
    return this.#count('guest-fsfreeze-freeze', { timeoutMs: 30_000, ...options });
  }

  fsThaw(options: WaitOptions = {}): Promise<number> {
    return this.#count('guest-fsfreeze-thaw', options);
  }

  /** Closes our end; a later request connects again. */
  close(): void {
    this.#connection?.close();
    this.#connection = undefined;
  }

  async #count(command: string, options: WaitOptions): Promise<number> {
    const value = await this.#request(command, {}, options);
    if (typeof value !== 'number') throw nonsense(command);
    return value;
  }

  async #optional(command: string, options: WaitOptions): Promise<unknown> {
    try {
      return await this.#request(command, {}, options);
    } catch (error) {
      if (error instanceof AppError && error.code === 'unsupported') return undefined;
      throw error;
    }
  }

  #kill(pid: number): void {
    const argv = ['/bin/kill', '-9', String(pid)] as [string, ...string[]];
    this.exec({ argv, timeoutMs: 2_000 }).catch(() => {
      // The guest may be gone, which is as good.
    });
  }

  /** Waits for its turn, sends, and gives the value returned. */
  async #request(command: string, args: JsonObject, options: WaitOptions): Promise<unknown> {
    if (this.#queued >= maxQueued) {
      throw new AppError('too_many', `More than ${maxQueued} requests wait for the guest agent`, { command });
    }
    const turn = this.#lastTurn;
    const ended = Promise.withResolvers<void>();
    this.#lastTurn = ended.promise;
    this.#queued += 1;
    try {
      await withDeadline(turn, { signal: options.signal, onTimeout: () => new Error('unreachable') });
      return await this.#exchange(command, args, options);
    } finally {
      this.#queued -= 1;
      // Whoever gave up while waiting must not let the next one go before its time.
      turn.then(ended.resolve);
    }
  }

  async #exchange(command: string, args: JsonObject, options: WaitOptions): Promise<unknown> {
    const { timeoutMs = defaultTimeoutMs, signal } = options;
    if (!this.#connection || this.#connection.isClosed) this.#connection = new AgentConnection(this.#path);
    const connection = this.#connection;
    const talk = async (): Promise<JsonObject> => {
      await connection.synchronised();
      return connection.request({ execute: command, arguments: args });
    };
    const onTimeout = () => agentUnavailable(`${command} had no reply within ${timeoutMs} ms`);
    let reply: JsonObject;
    try {
      reply = await withDeadline(talk(), { timeoutMs, signal, onTimeout });
    } catch (error) {
      // A late reply must not be taken for the next one's.
      connection.close();
      throw error;
    }
    if (isObject(reply.error)) throw refusedByAgent(command, reply.error);
    if (!('return' in reply)) {
      connection.close();
      throw nonsense(command);
    }
    return reply.return;
  }
}

function execResult(status: JsonObject): ExecResult {
  const [stdout, outCut] = decodeOutput(status['out-data']);
  const [stderr, errCut] = decodeOutput(status['err-data']);
  const exitCode =
    typeof status.exitcode === 'number'
      ? status.exitcode
      : 128 + (typeof status.signal === 'number' ? status.signal : 0);
  const truncated = outCut || errCut || status['out-truncated'] === true || status['err-truncated'] === true;
  return { exitCode, stdout, stderr, truncated };
}

function decodeOutput(base64: unknown): [text: string, truncated: boolean] {
  const bytes = typeof base64 === 'string' ? Buffer.from(base64, 'base64') : Buffer.alloc(0);
  return [bytes.subarray(0, maxOutputBytes).toString('utf8'), bytes.length > maxOutputBytes];
}

function refusedByAgent(command: string, error: JsonObject): AppError {
  const output = String(error.desc).slice(0, 1000);
  const agentClass = String(error.class).slice(0, 100);
  return new AppError('unsupported', `The guest agent refused ${command}: ${output}`, {
    command,
    agentClass,
    output,
  });
}

const nonsense = (command: string): AppError => agentUnavailable(`its reply to ${command} makes no sense`);
