/** What every `list` command does: all pages as one, in the shape of the API's page. */
import type { ListPage } from '../../sdk/client.ts';
import type { Session } from '../session.ts';

export async function listAll<T>(
  { viper, output, signal }: Session,
  list: ListPage<T>,
  headers: string[],
  row: (item: T) => string[],
  empty: string,
): Promise<void> {
  const items: T[] = [];
  for await (const item of viper.pages(list, { limit: 200, signal })) items.push(item);
  output.show({ items, next: null }, () => output.table(headers, items.map(row), empty));
}
