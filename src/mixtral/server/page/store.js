// Conversations and settings: what they look like, checked when they come from outside, and kept in the browser.

const PREFIX = "mixtral.chat.";
const LONGEST_TITLE = 120;

/** Numbers of a request: lowest, highest, step, and what the server takes when nothing is sent. */
export const NUMBERS = {
  temperature: { label: "Temperature", low: 0, high: 2, step: 0.05, server: "1" },
  top_p: { label: "Top p", low: 0, high: 1, step: 0.01, server: "1" },
  top_k: { label: "Top k", low: 0, high: 2147483647, step: 1, server: "off" },
  min_p: { label: "Min p", low: 0, high: 1, step: 0.01, server: "0" },
  max_tokens: { label: "Longest answer, tokens", low: 1, high: 2147483647, step: 1, server: "up to 4096" },
  seed: { label: "Seed", low: -Number.MAX_SAFE_INTEGER, high: Number.MAX_SAFE_INTEGER, step: 1, server: "drawn" },
  presence_penalty: { label: "Presence penalty", low: -2, high: 2, step: 0.1, server: "0" },
  frequency_penalty: { label: "Frequency penalty", low: -2, high: 2, step: 0.1, server: "0" },
  repetition_penalty: { label: "Repetition penalty", low: 0.5, high: 2, step: 0.05, server: "1" },
};
export const FORMATS = ["text", "json_object", "json_schema", "regex"];

/** Settings of a first conversation. A number that is null is not sent. */
export function defaultSettings() {
  const numbers = Object.fromEntries(Object.keys(NUMBERS).map((name) => [name, null]));
  return {
    model: null,
    system: "",
    ...numbers,
    temperature: 0.2,
    stop: [],
    format: "text",
    schema: "",
    regex: "",
    tools: [],
    tool_choice: "auto",
    experts: true,
  };
}

/** A new conversation with these settings. Messages are { role, content } and, for answers, more: see readMessage. */
export function newConversation(settings = defaultSettings()) {
  const now = Date.now();
  return {
    id: crypto.randomUUID?.() ?? `${now}-${Math.random().toString(36).slice(2)}`,
    title: "New chat",
    named: false, // by the user; else the first question names it
    created: now,
    updated: now,
    settings: structuredClone(settings),
    messages: [],
  };
}

/** The first line of a question, as a title. */
export function titleOf(question) {
  const line = question.trim().split("\n")[0];
  return line.length > 60 ? `${line.slice(0, 59).trimEnd()}…` : line || "New chat";
}

class Shape {
  constructor(value, where) {
    if (typeof value !== "object" || value === null || Array.isArray(value)) {
      throw new TypeError(`${where} should be an object`);
    }
    this.value = value;
    this.where = where;
  }

  #get(name, otherwise, fits, expected) {
    const value = this.value[name] ?? otherwise;
    if (value === undefined || (value !== otherwise && !fits(value))) {
      throw new TypeError(`${this.where}.${name} should be ${expected}`);
    }
    return value;
  }

  text(name, otherwise) {
    return this.#get(name, otherwise, (value) => typeof value === "string", "text");
  }

  number(name, otherwise) {
    return this.#get(name, otherwise, Number.isFinite, "a number");
  }

  flag(name, otherwise) {
    return this.#get(name, otherwise, (value) => typeof value === "boolean", "true or false");
  }

  choice(name, among, otherwise) {
    return this.#get(name, otherwise, (value) => among.includes(value), `one of ${among.join(", ")}`);
  }

  list(name, read) {
    const items = this.#get(name, [], Array.isArray, "a list");
    return items.map((item, place) => read(item, `${this.where}.${name}[${place}]`));
  }

  part(name, read) {
    const value = this.value[name];
    return value === undefined || value === null ? null : read(value, `${this.where}.${name}`);
  }
}

function readText(value, where) {
  if (typeof value !== "string") throw new TypeError(`${where} should be text`);
  return value;
}

function readTool(value, where) {
  const given = new Shape(value, where);
  return {
    enabled: given.flag("enabled", true),
    name: given.text("name", ""),
    description: given.text("description", ""),
    parameters: given.text("parameters", ""),
  };
}

function readSettings(value, where) {
  const given = new Shape(value, where);
  return {
    model: given.text("model", null),
    system: given.text("system", ""),
    ...Object.fromEntries(Object.keys(NUMBERS).map((name) => [name, given.number(name, null)])),
    stop: given.list("stop", readText),
    format: given.choice("format", FORMATS, "text"),
    schema: given.text("schema", ""),
    regex: given.text("regex", ""),
    tools: given.list("tools", readTool),
    tool_choice: given.text("tool_choice", "auto"),
    experts: given.flag("experts", true),
  };
}

function readCall(value, where) {
  const given = new Shape(value, where);
  return {
    id: given.text("id"),
    name: given.text("name"),
    arguments: given.text("arguments"),
    result: given.text("result", null),
  };
}

function readStatistics(value, where) {
  const given = new Shape(value, where);
  const names = ["prompt_tokens", "cached_tokens", "completion_tokens", "first_s", "per_s"];
  const numbers = Object.fromEntries(names.map((name) => [name, given.number(name, null)]));
  return { ...numbers, seed: given.text("seed", null) };
}

function readError(value, where) {
  const given = new Shape(value, where);
  const texts = ["code", "param", "requestId", "retryAfter"];
  return {
    message: given.text("message"),
    status: given.number("status", null),
    ...Object.fromEntries(texts.map((name) => [name, given.text(name, null)])),
  };
}

/**
 * A message. An answer has `calls` with what each returned (null: not yet), `finish` as the server said it or
 * "stopped", `format` that was asked for, `statistics`, and `error` if it ended with one. `experts` is read by
 * experts.js.
 */
function readMessage(value, where) {
  const given = new Shape(value, where);
  const role = given.choice("role", ["user", "assistant"]);
  const content = given.text("content");
  if (role === "user") return { role, content };
  return {
    role,
    content,
    calls: given.list("calls", readCall),
    format: given.choice("format", FORMATS, "text"),
    finish: given.text("finish", null),
    statistics: given.part("statistics", readStatistics),
    error: given.part("error", readError),
    experts: given.part("experts", (experts) => experts),
  };
}

/** A conversation out of data that may be anything. Throws TypeError, which says what is wrong and where. */
export function readConversation(value, where = "conversation") {
  const given = new Shape(value, where);
  return {
    id: given.text("id"),
    title: given.text("title").slice(0, LONGEST_TITLE),
    named: given.flag("named", true),
    created: given.number("created", 0),
    updated: given.number("updated", 0),
    settings: given.part("settings", readSettings) ?? defaultSettings(),
    messages: given.list("messages", readMessage),
  };
}

/** Conversations and choices of this page in localStorage. What cannot be kept is reported to `onProblem`. */
export class Store {
  /** `storage` gives localStorage; a browser that forbids it throws there. */
  constructor(storage, onProblem) {
    this.storage = storage;
    this.onProblem = onProblem;
  }

  #try(work, what) {
    try {
      return work();
    } catch (error) {
      const full = error.name === "QuotaExceededError";
      this.onProblem(
        full
          ? `${what}: the browser's storage is full. Export and delete old conversations.`
          : `${what}: ${error.message}`,
      );
      return null;
    }
  }

  /** All conversations, the latest first. Those that cannot be read are left where they are and reported. */
  all() {
    const names = this.#try(() => Object.keys(this.storage()), "Conversations cannot be read") ?? [];
    const found = names
      .filter((name) => name.startsWith(`${PREFIX}c.`))
      .map((name) => this.#read(name))
      .filter((conversation) => conversation !== null);
    return found.sort((one, other) => other.updated - one.updated);
  }

  #read(name) {
    const read = () => readConversation(JSON.parse(this.storage().getItem(name)));
    return this.#try(read, "A stored conversation cannot be read");
  }

  /** Keep a conversation. Its experts are left out: they are large, and can be exported. */
  save(conversation) {
    const messages = conversation.messages.map(({ experts, ...message }) => message);
    const text = JSON.stringify({ ...conversation, messages });
    this.#try(() => this.storage().setItem(`${PREFIX}c.${conversation.id}`, text), "This conversation is not kept");
  }

  remove(id) {
    this.#try(() => this.storage().removeItem(`${PREFIX}c.${id}`), "The conversation cannot be deleted");
  }

  /** The settings that were used last; null if there are none that can be read. */
  settings() {
    const text = this.choice("settings");
    return text === null
      ? null
      : this.#try(() => readSettings(JSON.parse(text), "settings"), "Settings cannot be read");
  }

  keepSettings(settings) {
    this.choose("settings", JSON.stringify(settings));
  }

  /** A choice of the page such as its colours; null if none was made. */
  choice(name) {
    return this.#try(() => this.storage().getItem(PREFIX + name), "Settings cannot be read");
  }

  choose(name, value) {
    this.#try(() => this.storage().setItem(PREFIX + name, value), "Settings are not kept");
  }

  /** Whether a storage event is about a conversation. */
  static isConversation(name) {
    return name === null || name.startsWith(`${PREFIX}c.`);
  }

  /** Whether a storage event is about the conversation `id`; without a name it is about all. */
  static isOf(name, id) {
    return name === null || name === `${PREFIX}c.${id}`;
  }
}
