/**
 * Validates requests by the contract's schemas. Unknown fields are refused and nothing is coerced in a body;
 * paths and queries are text, so numbers and booleans are read from it there.
 */
import { Ajv, type ErrorObject, type ValidateFunction } from 'ajv';
import addFormats from 'ajv-formats';
import { AppError } from '../../model/errors.ts';

const options = { allErrors: true, useDefaults: true, removeAdditional: false, verbose: true, strict: false };
// ajv-formats is CommonJS: its types name the function under `default`.
const withFormats = (ajv: Ajv): Ajv => (addFormats as unknown as { default: (ajv: Ajv) => Ajv }).default(ajv);
const bodies = withFormats(new Ajv({ ...options, coerceTypes: false }));
const texts = withFormats(new Ajv({ ...options, coerceTypes: true }));

/** More problems than this help nobody, and an answer has a bound. */
const maxProblems = 20;

export interface Problem {
  /** Where: `body.hardware.memoryBytes`. */
  field: string;
  /** The value that was met, shortened. */
  value?: unknown;
  /** What was wanted. */
  wanted: string;
}

export const compileFor = (httpPart: string | undefined, schema: object): ValidateFunction =>
  (httpPart === 'body' ? bodies : texts).compile(schema);

/** Deeper JSON has no place in the contract, and would exhaust the stack of whoever walks through it. */
const maxDepth = 32;

/** Refuses a body that is nested too deeply, before anything walks through it. */
export function requireShallow(body: unknown): void {
  let level = [body];
  for (let depth = 0; level.length > 0; depth += 1) {
    if (depth > maxDepth)
      throw invalidRequest([{ field: 'body', wanted: `at most ${maxDepth} values inside each other` }]);
    level = level.flatMap((value) =>
      typeof value === 'object' && value !== null ? Object.values(value) : [],
    );
  }
}

function shorten(value: unknown): unknown {
  const text = JSON.stringify(value);
  if (text === undefined) return undefined;
  return text.length <= 120 ? value : `${text.slice(0, 120)}…`;
}

function wanted(error: ErrorObject): string {
  switch (error.keyword) {
    case 'enum':
      return `one of ${(error.params as { allowedValues: string[] }).allowedValues.join(', ')}`;
    case 'additionalProperties':
      return 'no field of this name';
    case 'required':
      return 'this field';
    case 'pattern': {
      const { description } = (error.parentSchema ?? {}) as { description?: string };
      return description ?? `text that matches ${(error.params as { pattern: string }).pattern}`;
    }
    default:
      return (error.message ?? error.keyword).replace(/^must (be |have |NOT have )?/, (_all, verb) =>
        verb === 'be ' ? '' : verb === 'NOT have ' ? 'no ' : '',
      );
  }
}

/** Ajv's errors as problems that name the field, the value and what was wanted. */
export function problemsOf(errors: readonly ErrorObject[], part: string): Problem[] {
  return errors.slice(0, maxProblems).map((error) => {
    const path = error.instancePath.split('/').slice(1);
    const params = error.params as { additionalProperty?: string; missingProperty?: string };
    const extra = params.additionalProperty ?? params.missingProperty;
    const field = [part, ...path, ...(extra === undefined ? [] : [extra])].join('.');
    if (error.keyword === 'required') return { field, wanted: wanted(error) };
    const value = params.additionalProperty
      ? (error.data as Record<string, unknown>)[params.additionalProperty]
      : error.data;
    return { field, value: shorten(value), wanted: wanted(error) };
  });
}

/** One sentence from the first problem; the details carry them all. */
export function invalidRequest(problems: readonly Problem[]): AppError {
  const first = problems[0];
  const message = first
    ? `The request was refused: ${first.field}${first.value === undefined ? '' : ` is ${JSON.stringify(first.value)}`}, wanted ${first.wanted}`
    : 'The request was refused';
  return new AppError('invalid_request', message, { problems });
}
