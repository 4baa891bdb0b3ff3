/** Prometheus metrics of one daemon. Rooms report what happened; only this file knows Prometheus. */
import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from 'prom-client';
import { type VmState, vmStates } from '../model/states.ts';

/** Why a caller was turned away. */
export type Refusal = 'missing' | 'unknown' | 'expired' | 'revoked' | 'scope';
const refusals: readonly Refusal[] = ['missing', 'unknown', 'expired', 'revoked', 'scope'];

interface RequestLabels {
  method: string;
  route: string;
  status: number;
}

export class Metrics {
  readonly #registry = new Registry();
  /** Counted here and handed over when somebody scrapes: a request must not pay for labels. */
  readonly #requests = new Map<string, { labels: RequestLabels; count: number; seconds: number }>();
  readonly #refused = new Counter({
    name: 'viper_http_refused_callers_total',
    help: 'Requests without a good credential (401) or with too small a scope (403).',
    labelNames: ['reason'],
    registers: [this.#registry],
  });
  readonly #operations = new Counter({
    name: 'viper_operations_total',
    help: 'Operations that have ended, by kind and outcome.',
    labelNames: ['kind', 'state'],
    registers: [this.#registry],
  });
  readonly #starts = new Histogram({
    name: 'viper_vm_start_seconds',
    help: 'From the request to running vCPUs, by where the VM started from.',
    labelNames: ['from'],
    buckets: [0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10],
    registers: [this.#registry],
  });

  constructor(countVms: () => Map<VmState, number>) {
    collectDefaultMetrics({ register: this.#registry });
    this.#exposeRequests(
      'viper_http_requests_total',
      'Requests answered, by route of the contract.',
      'count',
    );
    this.#exposeRequests('viper_http_request_seconds_total', 'Time spent to answer them.', 'seconds');
    for (const reason of refusals) this.#refused.inc({ reason }, 0);
    new Gauge({
      name: 'viper_vms',
      help: 'VMs by state.',
      labelNames: ['state'],
      registers: [this.#registry],
      collect() {
        const counts = countVms();
        for (const state of vmStates) this.set({ state }, counts.get(state) ?? 0);
      },
    });
  }

  #exposeRequests(name: string, help: string, field: 'count' | 'seconds'): void {
    const requests = this.#requests;
    new Counter({
      name,
      help,
      labelNames: ['method', 'route', 'status'],
      registers: [this.#registry],
      collect() {
        this.reset();
        for (const entry of requests.values()) this.inc({ ...entry.labels }, entry[field]);
      },
    });
  }

  observeRequest(method: string, route: string, status: number, seconds: number): void {
    const key = `${method} ${route} ${status}`;
    let entry = this.#requests.get(key);
    if (!entry) {
      entry = { labels: { method, route, status }, count: 0, seconds: 0 };
      this.#requests.set(key, entry);
    }
    entry.count += 1;
    entry.seconds += seconds;
  }

  countRefusedCaller(reason: Refusal): void {
    this.#refused.inc({ reason });
  }

  countOperation(kind: string, state: string): void {
    this.#operations.inc({ kind, state });
  }

  observeStart(from: 'boot' | 'snapshot' | 'clone', seconds: number): void {
    this.#starts.observe({ from }, seconds);
  }

  /** The exposition format of Prometheus. */
  text(): Promise<string> {
    return this.#registry.metrics();
  }
}
