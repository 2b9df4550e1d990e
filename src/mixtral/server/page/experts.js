// Which experts each token of an answer used: the data of routing events, lined up with the text of the tokens.

/** The value of a half-precision number. */
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

function bytesOf(text, length, what) {
  const raw = atob(text);
  if (raw.length !== length) throw new TypeError(`${what} has ${raw.length} bytes; expected ${length}`);
  return Uint8Array.from(raw, (character) => character.charCodeAt(0));
}

function textOf(bytes) {
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
}

/** A token as it can be shown: its text, or its bytes if they are only part of a character. */
function tokenText({ token, bytes }) {
  if (!bytes) return token;
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(bytes));
  } catch {
    return bytes.map((byte) => `<${byte.toString(16).padStart(2, "0")}>`).join("");
  }
}

/**
 * One request's share of an answer: tokens in order, and rows of experts by position. Row p belongs to the token at
 * position p of prompt and answer together. Nothing is made from the last token of an answer that was cut, so that it
 * has none.
 */
class Part {
  constructor() {
    this.tokens = []; // { text, probability }
    this.rows = new Map(); // position -> { experts: Uint8Array [L * A], weights: Uint8Array of float16 [L * A] }
    this.prompt = null; // tokens of the prompt, once the server has counted them
    this.offset = 0; // tokens of the answer before the first listed one: the one that opens function calls has no text
  }

  get first() {
    if (this.prompt !== null) return this.prompt;
    for (const position of this.rows.keys()) return position;
    return 0;
  }

  cells() {
    const first = this.first;
    const length = this.tokens.length + this.offset;
    return Array.from({ length }, (_, place) => ({
      text: this.tokens[place - this.offset]?.text ?? "[TOOL_CALLS]",
      probability: this.tokens[place - this.offset]?.probability ?? null,
      row: this.rows.get(first + place) ?? null,
    }));
  }
}

/** The experts of one answer, which may have been continued by further requests. */
export class Trace {
  constructor() {
    this.layers = null; // indices of the layers that were asked for
    this.perToken = 0; // A
    this.parts = [];
  }

  /** The next events belong to a new request. */
  begin() {
    this.parts.push(new Part());
  }

  /** Tokens with their log-probabilities, as the API lists them. */
  addTokens(listed) {
    const { tokens } = this.parts.at(-1);
    for (const each of listed) tokens.push({ text: tokenText(each), probability: Math.exp(each.logprob) });
  }

  /** Routing data of an event. Throws TypeError if its sizes do not fit together. */
  addRouting(items) {
    for (const item of items) if ((item.choice ?? 0) === 0) this.#addRows(item);
  }

  #addRows({ first, shape, experts, weights, layers }) {
    const [tokens, layerCount, perToken] = shape;
    this.layers ??= layers ?? Array.from({ length: layerCount }, (_, place) => place);
    this.perToken ||= perToken;
    if (layerCount !== this.layers.length || perToken !== this.perToken) {
      throw new TypeError(`routing has shape ${shape}; expected [*, ${this.layers.length}, ${this.perToken}]`);
    }
    const width = layerCount * perToken;
    const ids = bytesOf(experts, tokens * width, "experts");
    const shares = bytesOf(weights, 2 * tokens * width, "weights");
    for (let token = 0; token < tokens; token += 1) {
      this.parts.at(-1).rows.set(first + token, {
        experts: ids.subarray(token * width, (token + 1) * width),
        weights: shares.subarray(2 * token * width, 2 * (token + 1) * width),
      });
    }
  }

  /** What the end of a stream tells: how long the prompt was, and whether the answer opened with a call. */
  settle({ promptTokens, calls }) {
    const part = this.parts.at(-1);
    part.prompt = promptTokens ?? part.prompt;
    part.offset = calls ? 1 : 0;
  }

  get empty() {
    return this.layers === null;
  }

  /** All tokens of the answer: text, probability, and row of experts or null. */
  cells() {
    return this.parts.flatMap((part) => part.cells());
  }

  /** Changes when cells that were given out before may have got other rows. */
  get alignment() {
    return this.parts.map((part) => `${part.first}+${part.offset}`).join(" ");
  }

  /** The choices of one row in one layer (by place), the larger weight first: { expert, weight }. */
  choices(row, place) {
    const view = new DataView(row.weights.buffer, row.weights.byteOffset);
    return Array.from({ length: this.perToken }, (_, rank) => {
      const at = place * this.perToken + rank;
      return { expert: row.experts[at], weight: half(view.getUint16(2 * at, true)) };
    });
  }

  /** How many experts a layer has, as far as the data tell; never fewer than the 8 of every Mixtral. */
  static width(cells) {
    let most = 7;
    for (const { row } of cells) if (row) for (const expert of row.experts) if (expert > most) most = expert;
    return most + 1;
  }

  /** How often each expert was used: [layer place][expert], over cells that have a row. */
  counts(cells) {
    const experts = Trace.width(cells);
    const counts = this.layers.map(() => new Array(experts).fill(0));
    for (const { row } of cells) {
      if (row)
        row.experts.forEach((expert, at) => {
          counts[Math.floor(at / this.perToken)][expert] += 1;
        });
    }
    return counts;
  }

  /** As data that JSON can hold, one row a token. */
  data() {
    return {
      layers: this.layers,
      per_token: this.perToken,
      tokens: this.cells().map(({ text, probability, row }) => ({
        text,
        probability,
        experts: row && textOf(row.experts),
        weights: row && textOf(row.weights),
      })),
    };
  }

  /** A trace from its data. Throws TypeError if it is not one. */
  static fromData({ layers, per_token: perToken, tokens }) {
    if (!Array.isArray(layers) || !Number.isInteger(perToken) || !Array.isArray(tokens)) {
      throw new TypeError("experts should have layers, per_token and tokens");
    }
    const trace = new Trace();
    trace.layers = layers.map(Number);
    trace.perToken = perToken;
    trace.begin();
    const [part] = trace.parts;
    part.prompt = 0;
    tokens.forEach(({ text, probability, experts, weights }, place) => {
      part.tokens.push({ text: String(text), probability: probability === null ? null : Number(probability) });
      if (experts === null) return;
      const width = layers.length * perToken;
      const row = { experts: bytesOf(experts, width, "experts"), weights: bytesOf(weights, 2 * width, "weights") };
      part.rows.set(place, row);
    });
    return trace;
  }
}
