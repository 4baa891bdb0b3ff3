/** The room's door: the NBD protocol as codecs without I/O, and a server and a client over a unix socket. */
export { type ConnectOptions, connectNbd, type NbdClient } from './client.ts';
export { type Answer, type Command, NbdClientCodec } from './client-codec.ts';
export {
  type ExportInfo,
  type Extent,
  extentFlag,
  NbdError,
  type NbdErrorName,
} from './protocol.ts';
export { type Backend, type NbdServer, type ServeOptions, serveNbd, serveNbdOn } from './server.ts';
export { type NbdRequest, NbdServerCodec } from './server-codec.ts';
