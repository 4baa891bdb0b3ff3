/** `viper image …` */
import { createReadStream, type Stats, statSync } from 'node:fs';
import { basename } from 'node:path';
import { Readable, Transform } from 'node:stream';
import { type Command, Option } from 'commander';
import { formatBytes } from '../../model/units.ts';
import type { Image } from '../../sdk/client.ts';
import { Interrupted, UsageError } from '../failures.ts';
import { formatAge, formatTime, shortDigest } from '../output.ts';
import { type ProgressView, showProgress } from '../progress.ts';
import { addCommand, addGroup, type Session, withSession } from '../session.ts';
import { listAll } from './lists.ts';

export function addImageCommands(program: Command): void {
  const image = addGroup(program, 'image', 'disk images that VMs are made from');

  addCommand(
    image,
    'import <file>',
    'import a qcow2 or raw disk; the same bytes give the same image',
    'viper image import debian-12-genericcloud-amd64.qcow2 --alias debian-12',
  )
    .option('-a, --alias <alias>', 'a name for it')
    .option('--digest <digest>', 'refuse other bytes than these (sha256:…)')
    .addOption(new Option('--format <format>', 'told from the bytes if absent').choices(['qcow2', 'raw']))
    .action(withSession(importFile));

  addCommand(image, 'list', 'all images, oldest first', 'viper image list').action(
    withSession((session) =>
      listAll(
        session,
        session.viper.listImages,
        ['DIGEST', 'ALIASES', 'FORMAT', 'FILE', 'DISK', 'INDEX', 'AGE'],
        (each) => [
          shortDigest(each.digest),
          each.aliases.join(','),
          each.format,
          formatBytes(each.fileBytes),
          formatBytes(each.virtualBytes),
          formatIndex(each.index),
          formatAge(each.createdAt),
        ],
        'There are no images. Bring one: viper image import FILE --alias NAME',
      ),
    ),
  );

  addCommand(image, 'show <image>', 'one image, by alias or digest', 'viper image show debian-12').action(
    withSession(async (session, name: string) => {
      const found = await session.viper.getImage({ params: { image: name }, signal: session.signal });
      showImage(session, found);
    }),
  );

  addCommand(
    image,
    'remove <image>',
    'remove an image that nothing uses',
    'viper image remove debian-12',
  ).action(
    withSession(async ({ viper, output, signal }, name: string) => {
      await viper.deleteImage({ params: { image: name }, signal });
      output.say(`Image ${name} is removed.`);
    }),
  );

  addCommand(
    image,
    'alias <image> <alias>',
    'give an image a name; it moves over from another image that has it',
    'viper image alias sha256:0c5a… debian-12\nviper image alias debian-12 old-name --remove',
  )
    .option('--remove', 'take the name away instead')
    .action(
      withSession(async (session, name: string, alias: string, options: { remove?: true }) => {
        const { viper, output, signal } = session;
        const params = { image: name, alias };
        if (!options.remove) return showImage(session, await viper.addImageAlias({ params, signal }));
        await viper.removeImageAlias({ params, signal });
        output.say(`Alias ${alias} is removed.`);
      }),
    );
}

function showImage({ output }: Session, image: Image): void {
  output.show(image, () =>
    output.facts([
      ['Digest', image.digest],
      ['Aliases', image.aliases.join(', ')],
      ['Format', image.format],
      ['File', formatBytes(image.fileBytes)],
      ['Disk', formatBytes(image.virtualBytes)],
      ['Index', explainIndex(image.index)],
      ['Imported', formatTime(image.createdAt)],
    ]),
  );
}

/** How far the index is that spares migrations the image's blocks, in a word. */
export function formatIndex(index: Image['index']): string {
  if (index.state !== 'building' || index.totalBytes === 0) return index.state;
  return `${Math.floor((index.doneBytes / index.totalBytes) * 100)} %`;
}

export function explainIndex(index: Image['index']): string {
  if (index.state === 'failed') return `failed: ${index.message}`;
  if (index.state !== 'ready') return formatIndex(index);
  return `ready, ${index.blocks} blocks in ${formatBytes(index.fileBytes)}`;
}

interface ImportOptions {
  alias?: string;
  digest?: string;
  format?: 'qcow2' | 'raw';
}

async function importFile(session: Session, file: string, options: ImportOptions): Promise<void> {
  const { viper, output, signal } = session;
  const { alias, digest, format } = options;
  const { size } = fileToImport(file);
  using view = showProgress(`import ${basename(file)}`, output);
  const source = createReadStream(file, { highWaterMark: 1024 * 1024 });
  const counted = source.pipe(counter(size, view));
  // Without this, an error while reading would only end the stream.
  source.on('error', (error) => counted.destroy(error));
  try {
    const image = await viper.importImage({
      query: { ...(alias ? { alias } : {}), ...(digest ? { digest } : {}), ...(format ? { format } : {}) },
      body: Readable.toWeb(counted) as unknown as ReadableStream<Uint8Array>,
      sizeBytes: size,
      signal,
    });
    view[Symbol.dispose]();
    showImage(session, image);
  } catch (error) {
    throw error instanceof Interrupted ? new Interrupted(`the import of '${file}' was broken off`) : error;
  } finally {
    source.destroy();
  }
}

function fileToImport(file: string): Stats {
  let found: Stats;
  try {
    found = statSync(file);
  } catch (error) {
    throw new UsageError(`Cannot import '${file}': ${(error as Error).message}`);
  }
  if (!found.isFile()) throw new UsageError(`Cannot import '${file}': it is not a file`);
  return found;
}

/** Passes bytes on and shows how many of `total` went by. */
function counter(total: number, view: ProgressView): Transform {
  let done = 0;
  return new Transform({
    transform(chunk: Uint8Array, _, callback) {
      done += chunk.length;
      view.update({ phase: done < total ? 'sending' : 'verifying', done, total, unit: 'bytes' });
      callback(null, chunk);
    },
  });
}
