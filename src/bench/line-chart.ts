/** A line over time with named spans behind it, as an SVG that needs nothing else. */
import { escapeText, text } from './svg.ts';

export interface LineChart {
  title: string;
  subtitle: string;
  /** Of the values, and of the times. */
  unit: string;
  timeUnit: string;
  /** Ascending in time. */
  points: readonly { at: number; value: number }[];
  /** One behind the other; each is named in the legend. */
  spans: readonly { label: string; from: number; to: number }[];
}

const fills = ['#ffffff', '#fde3c8', '#dcebf7', '#f7d4d4', '#e3f2df'];
const line = '#2f6fb0';
const [width, left, right, top, plotHeight, bottom] = [900, 60, 20, 70, 260, 74];

export function lineChart({ title, subtitle, unit, timeUnit, points, spans }: LineChart): string {
  const [from, to] = [points[0]?.at ?? 0, points.at(-1)?.at ?? 1];
  const most = niceAbove(Math.max(1e-9, ...points.map(({ value }) => value)));
  const base = top + plotHeight;
  const x = (at: number): number => left + ((at - from) / (to - from || 1)) * (width - left - right);
  const y = (value: number): number => base - (value / most) * plotHeight;
  const labels = [...new Set(spans.map(({ label }) => label))];
  const fillOf = (label: string): string => fills[labels.indexOf(label) % fills.length]!;
  const parts = spans.map(
    ({ label, from: begin, to: end }) =>
      `<rect x="${round(x(begin))}" y="${top}" width="${round(Math.max(1, x(end) - x(begin)))}" height="${plotHeight}" fill="${fillOf(label)}"/>`,
  );
  for (const share of [0, 0.25, 0.5, 0.75, 1])
    parts.push(
      `<line x1="${left}" x2="${width - right}" y1="${round(y(most * share))}" y2="${round(y(most * share))}" stroke="#d0d5da"/>`,
      text(left - 8, round(y(most * share) + 4), String(Number((most * share).toPrecision(3))), 'end'),
    );
  const step = niceAbove((to - from) / 10);
  for (let at = Math.ceil(from / step) * step; at <= to; at += step)
    parts.push(text(round(x(at)), base + 18, String(Number(at.toPrecision(6))), 'middle'));
  const path = points.map(({ at, value }) => `${round(x(at))},${round(y(value))}`).join(' ');
  parts.push(`<polyline points="${path}" fill="none" stroke="${line}" stroke-width="1.5"/>`);
  let legendX = left;
  for (const label of labels) {
    const box = `width="12" height="12" fill="${fillOf(label)}" stroke="#9aa5b1"`;
    parts.push(
      `<rect x="${legendX}" y="${base + 46}" ${box}/>`,
      text(round(legendX + 17), base + 56, label, 'start'),
    );
    legendX += 34 + label.length * 6.6;
  }
  const height = base + bottom;
  return `${[
    `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="sans-serif" font-size="12" fill="#222">`,
    `<title>${escapeText(title)}</title>`,
    '<rect width="100%" height="100%" fill="#fff"/>',
    `<text x="${left}" y="22" font-size="16" font-weight="bold">${escapeText(title)}</text>`,
    text(left, 40, subtitle, 'start'),
    text(left - 8, top - 10, unit, 'end'),
    ...parts,
    text(width - right, base + 34, timeUnit, 'end'),
    '</svg>',
  ].join('\n')}\n`;
}

/** 1, 2 or 5 times a power of ten. */
function niceAbove(value: number): number {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= value)!;
}

const round = (value: number): number => Math.round(value * 10) / 10;
