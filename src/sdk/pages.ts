/** All items of a list, fetched page by page as they are asked for. */
import { ViperError } from './errors.ts';
import type { CallOptions, ListPage } from './types.ts';

export interface PagesOptions extends CallOptions {
  /** Items of one page; the daemon takes 1 to 200. */
  limit?: number;
}

export async function* pages<T>(list: ListPage<T>, options: PagesOptions = {}): AsyncGenerator<T> {
  const { limit, signal } = options;
  let after: string | undefined;
  for (;;) {
    const page = await list({
      query: { ...(limit ? { limit } : {}), ...(after === undefined ? {} : { after }) },
      ...(signal ? { signal } : {}),
    });
    yield* page.items;
    if (page.next === null) return;
    if (page.next === after) {
      throw new ViperError('bad_reply', `The page after '${after}' names itself as the next one`);
    }
    after = page.next;
  }
}
