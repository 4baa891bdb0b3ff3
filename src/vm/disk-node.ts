/**
 * Where a disk's bytes are, as the innermost block node of QEMU: a file of this host, or a file on a server that QEMU
 * speaks to itself (`nfs://HOST/EXPORT/FILE` through libnfs, `gluster://HOST[:PORT]/VOLUME/FILE` through gfapi, both
 * in Debian's qemu-block-extra). The URLs are those that `qemu-img` takes as well. Pure.
 */
import { AppError } from '../model/errors.ts';
import type { QemuOptions } from '../qmp/index.ts';

const defaultGlusterPort = 24007;

/** Whether it is a URL and not a file of this host. */
export const isRemote = (source: string): boolean => /^(nfs|gluster):\/\//.test(source);

/** Driver options without a node name. Throws `invalid_request` for a URL that names no file. */
export function diskNode(source: string): QemuOptions {
  if (!isRemote(source)) return { driver: 'file', filename: source };
  const { protocol, hostname, port, pathname } = new URL(source);
  const path = decodeURIComponent(pathname);
  if (protocol === 'nfs:') {
    // libnfs mounts the directory and opens the file in it.
    if (!/^\/.*[^/]$/.test(path)) throw badUrl(source, 'nfs://HOST/EXPORT/FILE');
    return { driver: 'nfs', server: { type: 'inet', host: withoutBrackets(hostname) }, path };
  }
  const [, volume, file] = /^\/([^/]+)\/(.*[^/])$/.exec(path) ?? [];
  if (!volume || !file) throw badUrl(source, 'gluster://HOST/VOLUME/FILE');
  const server = { type: 'inet', host: withoutBrackets(hostname), port: port || String(defaultGlusterPort) };
  return { driver: 'gluster', volume, path: file, server: [server] };
}

const withoutBrackets = (hostname: string): string => hostname.replace(/^\[(.*)\]$/, '$1');

const badUrl = (value: string, wanted: string): AppError =>
  new AppError('invalid_request', `Open disk: the URL is ${value}, wanted ${wanted}`, {
    problems: [{ field: 'url', value, wanted }],
  });
