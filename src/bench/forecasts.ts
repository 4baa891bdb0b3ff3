/** How wrong forecasts are, by the profile of real migrations: each is forecast from those before it alone. */
import { correct } from '../follow/index.ts';
import type { ProfileSample } from '../model/follow.ts';
import { median } from './report.ts';

export interface ForecastError {
  /** Migrations that were forecast. */
  count: number;
  /** Median of |forecast - measured| / measured. */
  totalTime: number;
  downtime: number;
  /** Of the model alone, for comparison. */
  modelTotalTime: number;
  modelDowntime: number;
}

/** `samples` as `GET /v1/profile` gives them, oldest first; the first `after` of them only teach. */
export function forecastError(samples: readonly ProfileSample[], after = 20): ForecastError {
  const errors = samples.slice(after).map((sample, index) => {
    const forecast = correct(sample, samples.slice(0, after + index));
    const off = (value: number, measured: number) => Math.abs(value - measured) / measured;
    return {
      totalTime: off(forecast.totalMs, sample.totalMs),
      downtime: off(forecast.downtimeMs, sample.downtimeMs),
      modelTotalTime: off(sample.modelTotalMs, sample.totalMs),
      modelDowntime: off(sample.modelDowntimeMs, sample.downtimeMs),
    };
  });
  const medianOf = (what: keyof (typeof errors)[number]) => median(errors.map((each) => each[what]));
  return {
    count: errors.length,
    totalTime: medianOf('totalTime'),
    downtime: medianOf('downtime'),
    modelTotalTime: medianOf('modelTotalTime'),
    modelDowntime: medianOf('modelDowntime'),
  };
}
