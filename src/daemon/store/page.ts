/**
 * Pages of a list in the order (sort key, id). The cursor is the position after the last row and not a count, so
 * rows that come and go between two pages are neither shown twice nor skipped.
 */
import { AppError } from '../../model/errors.ts';
import type { Statement } from './database.ts';

export interface PageRequest {
  /** Rows wanted, 50 if absent, at most 1,000. */
  limit?: number | undefined;
  /** `next` of the page before; absent for the first page. */
  after?: string | undefined;
}

export interface Page<T> {
  items: T[];
  /** Where the next page starts; null on the last one. */
  next: string | null;
}

const MAX_LIMIT = 1000;
/** A sort key and an id have no blank in them: dates, names, UUIDs and digests. */
const cursorPattern = /^(\S{1,64}) (\S{1,80})$/;

/**
 * Reads one page. The statement takes (sort key, id, limit) and selects the rows after that position.
 * Errors: `invalid_request` if `after` is no cursor.
 */
export function readPage<Row, T>(
  statement: Statement<Row>,
  request: PageRequest,
  position: (row: Row) => [sortKey: string, id: string],
  parse: (row: Row) => T,
): Page<T> {
  const limit = Math.max(1, Math.min(request.limit ?? 50, MAX_LIMIT));
  const [sortKey, id] = request.after === undefined ? ['', ''] : decodeCursor(request.after);
  // One row more than asked for tells whether there is a next page.
  const rows = statement.all(sortKey, id, limit + 1);
  const shown = rows.slice(0, limit);
  const last = shown.at(-1);
  return {
    items: shown.map(parse),
    next: rows.length > limit && last !== undefined ? encodeCursor(position(last)) : null,
  };
}

const encodeCursor = (position: [string, string]): string =>
  Buffer.from(position.join(' ')).toString('base64url');

function decodeCursor(cursor: string): [string, string] {
  const match = cursorPattern.exec(Buffer.from(cursor, 'base64url').toString());
  if (match) return [match[1]!, match[2]!];
  throw new AppError(
    'invalid_request',
    `Cannot read the list after ${JSON.stringify(cursor)}: it is no cursor.`,
    {
      problems: [{ field: 'after', value: cursor, wanted: '`next` of the page before' }],
    },
  );
}
