/** Bars in groups on a logarithmic scale, as an SVG that needs nothing else. */
export interface Bar {
  label: string;
  /** Above 0; undefined for one that has no value, of which `note` then says why. */
  value: number | undefined;
  note?: string;
}

export interface BarGroup {
  label: string;
  bars: readonly Bar[];
}

export interface ChartOptions {
  title: string;
  subtitle: string;
  unit: string;
  /** The same bars in each group; colours go by their place. */
  groups: readonly BarGroup[];
}

const colours = ['#9aa5b1', '#6b7a8a', '#47525e', '#2f8fd0', '#e07a2c', '#7a4fb5'];
const [left, top, plotHeight, barWidth, groupGap, bottom] = [70, 86, 300, 22, 30, 54];

export function barChart({ title, subtitle, unit, groups }: ChartOptions): string {
  const values = groups.flatMap(({ bars }) => bars.flatMap(({ value }) => value ?? []));
  const low = 10 ** Math.floor(Math.log10(Math.min(...values, 1e9)));
  const high = 10 ** Math.ceil(Math.log10(Math.max(...values, low * 10)));
  const decades = Math.log10(high / low);
  const heightOf = (value: number): number => (Math.log10(value / low) / decades) * plotHeight;
  const base = top + plotHeight;
  const parts: string[] = [];
  for (let power = 0; power <= decades; power += 1) {
    const y = base - (power / decades) * plotHeight;
    parts.push(
      `<line x1="${left}" x2="100%" y1="${y}" y2="${y}" stroke="#e3e6ea"/>`,
      text(left - 8, y + 4, String(Number((low * 10 ** power).toPrecision(3))), 'end'),
    );
  }
  let x = left + groupGap / 2;
  for (const { label, bars } of groups) {
    const middle = x + (bars.length * barWidth) / 2;
    for (const [index, { value, note }] of bars.entries()) {
      const height = value === undefined ? plotHeight : Math.max(1, heightOf(value));
      const y = base - height;
      const fill = colours[index % colours.length]!;
      const style =
        value === undefined ? `fill="none" stroke="${fill}" stroke-dasharray="3 3"` : `fill="${fill}"`;
      parts.push(`<rect x="${x}" y="${y}" width="${barWidth - 3}" height="${height}" ${style}/>`);
      const shown = value === undefined ? (note ?? '') : formatValue(value);
      parts.push(
        `<text transform="translate(${x + barWidth / 2 + 2},${y - 4}) rotate(-60)" font-size="10">${escapeText(shown)}</text>`,
      );
      x += barWidth;
    }
    parts.push(text(middle, base + 18, label, 'middle'));
    x += groupGap;
  }
  const labels = groups[0]?.bars.map(({ label }) => label) ?? [];
  let legendX = left;
  for (const [index, label] of labels.entries()) {
    parts.push(
      `<rect x="${legendX}" y="${base + 32}" width="10" height="10" fill="${colours[index % colours.length]}"/>`,
      text(legendX + 14, base + 41, label, 'start'),
    );
    legendX += 26 + label.length * 6.6;
  }
  const width = Math.ceil(Math.max(x, legendX, left + title.length * 9));
  const head = [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${base + bottom}" viewBox="0 0 ${width} ${base + bottom}" font-family="sans-serif" font-size="12" fill="#222">`,
    `<title>${escapeText(title)}</title>`,
    '<rect width="100%" height="100%" fill="#fff"/>',
    `<text x="${left}" y="22" font-size="16" font-weight="bold">${escapeText(title)}</text>`,
    text(left, 40, subtitle, 'start'),
    text(left - 8, top - 14, unit, 'end'),
  ];
  return `${[...head, ...parts, '</svg>'].join('\n')}\n`;
}

export const text = (x: number, y: number, content: string, anchor: 'start' | 'middle' | 'end'): string =>
  `<text x="${x}" y="${y}" text-anchor="${anchor}">${escapeText(content)}</text>`;

const formatValue = (value: number): string =>
  value >= 100 ? value.toFixed(0) : value.toFixed(value >= 10 ? 1 : 2);

export const escapeText = (content: string): string =>
  content.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;');
