/** What a session is for; it is the ALPN name as well, so one port serves the HTTP API and every purpose. */
export const linkPurposes = [
  'viper-memory/1',
  'viper-disk/1',
  'viper-image/1',
  'viper-snapshot/1',
  'viper-relay/1',
  'viper-escrow/1',
] as const;

export type LinkPurpose = (typeof linkPurposes)[number];

/** `ALPNProtocols` for the server that `attachLink` is given: ours, and HTTP for all others. */
export const serverAlpnProtocols: readonly string[] = [...linkPurposes, 'http/1.1'];

export const isLinkPurpose = (name: unknown): name is LinkPurpose =>
  linkPurposes.some((each) => each === name);
