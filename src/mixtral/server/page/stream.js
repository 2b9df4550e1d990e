// Talking to the API: requests, errors as they were received, server-sent events, and the answer they add up to.

/** An error as the API describes it. `status` is that of HTTP, or null for an error inside a stream. */
export class ApiError extends Error {
  constructor({ message, code = null, param = null }, { status = null, requestId = null, retryAfter = null } = {}) {
    super(message);
    this.code = code;
    this.param = param;
    this.status = status;
    this.requestId = requestId;
    this.retryAfter = retryAfter;
  }

  /** As plain data, to be kept with the answer it belongs to. */
  data() {
    const { message, code, param, status, requestId, retryAfter } = this;
    return { message, code, param, status, requestId, retryAfter };
  }
}

/** What went wrong, whoever threw it, as data of an ApiError. */
export function errorData(error) {
  if (error instanceof ApiError) return error.data();
  const lost = error instanceof TypeError; // what fetch throws when there is no answer at all
  const message = lost ? "The server does not answer. Is it running?" : `${error.name}: ${error.message}`;
  return new ApiError({ message, code: lost ? "no_connection" : "page_error" }).data();
}

async function failure(response) {
  const about = {
    status: response.status,
    requestId: response.headers.get("x-request-id"),
    retryAfter: response.headers.get("retry-after"),
  };
  const text = await response.text();
  try {
    const { error } = JSON.parse(text);
    if (typeof error.message === "string") return new ApiError(error, about);
  } catch {
    // Not from this API: a proxy, for example.
  }
  return new ApiError(
    { message: text.slice(0, 500) || `The server answered ${response.status} without a word.` },
    about,
  );
}

/** A request to the API. Throws ApiError for every status that is not success. */
export async function call(path, { key, body, signal } = {}) {
  const headers = {};
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  const response = await fetch(path, {
    method: body ? "POST" : "GET",
    headers,
    body: body && JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await failure(response);
  return response;
}

/** The events of a stream, one parsed object each. Throws ApiError for an error event or a missing end. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const about = { requestId: response.headers.get("x-request-id") };
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) {
      throw new ApiError({ message: "The connection ended before the answer did.", code: "connection_lost" }, about);
    }
    waiting += value;
    const blocks = waiting.split("\n\n");
    waiting = blocks.pop();
    for (const block of blocks) {
      if (!block.startsWith("data: ")) continue; // a comment that keeps the connection open
      const data = block.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(event.error, about);
      yield event;
    }
  }
}

/** The answer that the events of one stream add up to, with the times at which they came. */
export class Answer {
  constructor(now = performance.now()) {
    this.content = "";
    this.calls = []; // { id, name, arguments }
    this.finish = null;
    this.usage = null;
    this.seed = null;
    this.sent = now;
    this.first = null;
    this.last = null;
    this.pieces = 0;
  }

  /** Take one event. Gives the tokens with log-probabilities that came with it. */
  take(event, now = performance.now()) {
    if (event.usage) this.usage = event.usage;
    const tokens = [];
    for (const { index, delta, logprobs, finish_reason: finish } of event.choices ?? []) {
      if (index !== 0) continue;
      this.finish = finish ?? this.finish;
      const calls = delta.tool_calls ?? [];
      if (delta.content || calls.length > 0) this.#piece(now);
      this.content += delta.content ?? "";
      calls.forEach((part) => this.#addCall(part));
      tokens.push(...(logprobs?.content ?? []));
    }
    return tokens;
  }

  #piece(now) {
    this.first ??= now;
    this.last = now;
    this.pieces += 1;
  }

  #addCall({ index, id, function: { name, arguments: more } = {} }) {
    this.calls[index] ??= { id: "", name: "", arguments: "" };
    const known = this.calls[index];
    known.id = id ?? known.id;
    known.name += name ?? "";
    known.arguments += more ?? "";
  }

  /** Numbers for the line under an answer; those that are not known yet are null. */
  statistics() {
    const tokens = this.usage?.completion_tokens ?? null;
    const seconds = this.first === null ? 0 : (this.last - this.first) / 1000;
    const counted = tokens ?? this.pieces;
    return {
      prompt_tokens: this.usage?.prompt_tokens ?? null,
      cached_tokens: this.usage?.prompt_tokens_details?.cached_tokens ?? null,
      completion_tokens: tokens,
      first_s: this.first === null ? null : (this.first - this.sent) / 1000,
      per_s: seconds > 0 && counted > 1 ? (counted - 1) / seconds : null,
      seed: this.seed,
    };
  }
}
