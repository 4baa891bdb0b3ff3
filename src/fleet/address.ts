/** The names and URLs by which cloudlets are called. */
import { AppError } from '../model/errors.ts';
import { namePattern } from '../model/ids.ts';

const name = new RegExp(namePattern);
const host = /^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?|\[[0-9a-f:.]+\])$/;
const MAX_URL_LENGTH = 300;

export const isCloudletName = (text: string): boolean => name.test(text);

/** The URL without a slash at its end, or undefined if it is more or less than https, host and port. */
export function normaliseCloudletUrl(text: string): string | undefined {
  if (text.length > MAX_URL_LENGTH || !URL.canParse(text)) return undefined;
  const url = new URL(text);
  const bare =
    url.pathname === '/' && url.search === '' && url.hash === '' && url.username + url.password === '';
  return url.protocol === 'https:' && bare && host.test(url.hostname) ? url.origin : undefined;
}

/** The normalised URL. Errors: `invalid_request`, also for the name. */
export function requireAddress(cloudletName: string, url: string): string {
  const normalised = normaliseCloudletUrl(url);
  const problems = [];
  if (!isCloudletName(cloudletName)) {
    problems.push({
      field: 'name',
      value: cloudletName,
      wanted: 'a-z, 0-9 and hyphens, at most 63 characters',
    });
  }
  if (normalised === undefined)
    problems.push({ field: 'url', value: url, wanted: 'https://HOST or https://HOST:PORT' });
  if (normalised !== undefined && problems.length === 0) return normalised;
  const first = problems[0]!;
  const message = `A cloudlet cannot have the ${first.field} ${JSON.stringify(first.value)}: wanted ${first.wanted}.`;
  throw new AppError('invalid_request', message, { problems });
}
