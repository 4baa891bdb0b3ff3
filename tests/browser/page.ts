/** What the page of the tests runs: it has imported the SDK, as a user's site would, and shows it to the test. */
import * as sdk from '../../src/sdk/client.ts';

declare global {
  interface Window {
    sdk: typeof sdk;
    refusal: typeof refusal;
    viper: sdk.Viper;
    /** What the events of the whole test have told so far. */
    seen: sdk.ViperEvent[];
  }
}

/** How the call was refused, as plain values: an error cannot leave the page whole. Rejects if it was not. */
async function refusal(call: Promise<unknown>) {
  const error = await call.then(
    () => Promise.reject(new Error('the call succeeded, wanted a refusal')),
    (thrown: unknown) => thrown,
  );
  if (!(error instanceof sdk.ViperError)) throw error;
  const { code, status, message, details, requestId } = error;
  return { code, status, message, details, requestId };
}

Object.assign(window, { sdk, refusal });
