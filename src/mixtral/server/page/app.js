"use strict";

// Chat over /v1/chat/completions. Text from the model and from the server enters the page through textContent alone.

const EXAMPLES = [
  { lang: "en", text: "When does breakfast start?" },
  { lang: "fr", text: "À quelle heure ferme le Château ?" },
  { lang: "de", text: "Wann öffnet das Uhrenmuseum?" },
  { lang: "es", text: "¿Cuánto cuesta una entrada para el Acuario?" },
  { lang: "it", text: "Qual è la password del wifi?" },
  { lang: "en", text: "How much is a double room at the hotel?" },
];

const byId = (id) => document.getElementById(id);
const page = {
  examples: byId("examples"),
  main: document.querySelector("main"),
  maxTokens: byId("max-tokens"),
  messages: byId("messages"),
  model: byId("model"),
  newChat: byId("new-chat"),
  prompt: byId("prompt"),
  send: byId("send"),
  settings: byId("settings"),
  settingsButton: byId("settings-button"),
  status: byId("status"),
  stop: byId("stop"),
  system: byId("system"),
  temperature: byId("temperature"),
  temperatureValue: byId("temperature-value"),
  welcome: byId("welcome"),
};

let model = null; // its name, once the server has told it
let history = []; // what was said so far, as messages of the API
let running = null; // AbortController of the answer that is being written

/** An error as the API describes it. */
class ApiError extends Error {
  constructor(error) {
    super(error.message);
    this.code = error.code;
  }
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function setStatus(text) {
  page.status.textContent = text;
}

function refresh() {
  const busy = running !== null;
  page.send.hidden = busy;
  page.stop.hidden = !busy;
  page.send.disabled = model === null || page.prompt.value.trim() === "";
  page.welcome.hidden = page.messages.childElementCount > 0;
}

function fitPrompt() {
  page.prompt.style.height = "auto";
  page.prompt.style.height = `${page.prompt.scrollHeight}px`;
}

/** Do something that makes the conversation longer, and stay at its end unless the reader has scrolled up. */
function atEnd(grow) {
  const below = page.main.scrollHeight - page.main.scrollTop - page.main.clientHeight;
  grow();
  if (below < 80) page.main.scrollTop = page.main.scrollHeight;
}

function addMessage(role, text) {
  const message = element("article", `message ${role}`);
  message.setAttribute("aria-label", role === "user" ? "You" : role === "error" ? "Error" : "Mixtral");
  message.append(element("div", "text", text));
  if (role === "assistant") message.append(element("div", "meta"));
  page.messages.append(message);
  page.main.scrollTop = page.main.scrollHeight;
  return message;
}

function addError(error) {
  const message = addMessage("error", error.message);
  if (error.code) atEnd(() => message.append(element("span", "code", error.code)));
}

/** The events of a stream, one parsed object each; throws ApiError for an error event or a missing end. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError({ message: "The connection ended before the answer did.", code: "connection_lost" });
    waiting += value;
    const blocks = waiting.split("\n\n");
    waiting = blocks.pop();
    for (const block of blocks) {
      if (!block.startsWith("data: ")) continue; // a comment that keeps the connection open
      const data = block.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(event.error);
      yield event;
    }
  }
}

async function ask(signal) {
  const system = page.system.value.trim();
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({
      model,
      messages: system ? [{ role: "system", content: system }, ...history] : history,
      temperature: Number(page.temperature.value),
      max_tokens: Number(page.maxTokens.value),
      stream: true,
      stream_options: { include_usage: true },
    }),
    signal,
  });
  if (!response.ok) throw new ApiError((await response.json()).error);
  return response;
}

/** Measured by this page: time to the first text, and tokens per second after it. */
class Clock {
  constructor() {
    this.sent = performance.now();
    this.first = this.last = null;
    this.pieces = 0;
    this.tokens = null;
  }

  piece() {
    this.last = performance.now();
    this.first ??= this.last;
    this.pieces += 1;
  }

  summary() {
    if (this.first === null) return "";
    const tokens = this.tokens ?? this.pieces;
    const seconds = (this.last - this.first) / 1000;
    const parts = [`${tokens} ${tokens === 1 ? "token" : "tokens"}`];
    if (seconds > 0 && this.pieces > 1) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
    parts.push(`first text after ${((this.first - this.sent) / 1000).toFixed(2)} s`);
    return parts.join(" · ");
  }
}

async function write(message, clock, signal) {
  const text = message.querySelector(".text");
  let finish = null;
  for await (const event of events(await ask(signal))) {
    if (event.usage) clock.tokens = event.usage.completion_tokens;
    for (const choice of event.choices) {
      finish = choice.finish_reason ?? finish;
      if (!choice.delta.content) continue;
      clock.piece();
      atEnd(() => text.append(choice.delta.content));
      setStatus("Answering …");
    }
  }
  return finish;
}

/** Send what was typed and show the answer. A message that got no answer goes back to the input. */
async function send() {
  const question = page.prompt.value.trim();
  if (question === "" || running !== null || model === null) return;
  if (!page.maxTokens.checkValidity()) {
    showSettings(true); // the browser says what is wrong, but only beside a field that can be seen
    page.maxTokens.reportValidity();
    return;
  }
  running = new AbortController();
  history.push({ role: "user", content: question });
  const asked = addMessage("user", question);
  const message = addMessage("assistant", "");
  message.classList.add("streaming");
  page.prompt.value = "";
  fitPrompt();
  refresh();
  setStatus("Waiting for the first token …");
  const conversation = history;
  const clock = new Clock();
  let ending = "Ready";
  let failure = null;
  try {
    const finish = await write(message, clock, running.signal);
    if (finish === "length") ending = "The answer was cut at the longest allowed length";
  } catch (error) {
    ending = error.name === "AbortError" ? "Stopped" : "Failed";
    failure = error.name === "AbortError" ? null : error;
  }
  if (conversation !== history) return; // a new chat was begun
  running = null;
  message.classList.remove("streaming");
  const text = message.querySelector(".text").textContent;
  const note = ending === "Stopped" ? " · stopped" : "";
  atEnd(() => { message.querySelector(".meta").textContent = clock.summary() + (clock.first === null ? "" : note); });
  if (text) {
    history.push({ role: "assistant", content: text });
  } else {
    history.pop();
    message.remove();
    giveBack(asked, question);
    if (ending === "Ready") ending = "The model gave an empty answer";
  }
  if (failure) addError(failure);
  setStatus(ending);
  refresh();
  page.prompt.focus();
}

function giveBack(asked, question) {
  asked.remove();
  if (page.prompt.value === "") page.prompt.value = question;
  fitPrompt();
}

function newChat() {
  running?.abort();
  running = null;
  history = [];
  page.messages.replaceChildren();
  setStatus(model === null ? "" : "Ready");
  refresh();
  page.prompt.focus();
}

function showSettings(shown) {
  page.settings.hidden = !shown;
  page.settingsButton.setAttribute("aria-expanded", String(shown));
}

function showTemperature() {
  page.temperatureValue.textContent = Number(page.temperature.value).toFixed(2);
}

async function connect() {
  setStatus("Connecting …");
  try {
    const response = await fetch("/v1/models");
    if (!response.ok) throw new ApiError((await response.json()).error);
    const [first] = (await response.json()).data;
    model = first.id;
    page.model.textContent = `${first.id} · ${first.max_model_len.toLocaleString("en")} tokens`;
    page.maxTokens.max = first.max_model_len;
    page.maxTokens.value = Math.max(1, Math.min(512, Math.floor(first.max_model_len / 4)));
    setStatus("Ready");
  } catch (error) {
    setStatus("No connection to the server; load the page again");
    addError(error);
  }
  refresh();
}

function addExample({ lang, text }) {
  const button = element("button", "example", text);
  button.type = "button";
  button.lang = lang;
  button.addEventListener("click", () => {
    page.prompt.value = text;
    send();
  });
  page.examples.append(button);
}

page.send.addEventListener("click", send);
page.stop.addEventListener("click", () => running?.abort());
page.newChat.addEventListener("click", newChat);
page.temperature.addEventListener("input", showTemperature);
page.prompt.addEventListener("input", () => { fitPrompt(); refresh(); });
page.prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
page.settingsButton.addEventListener("click", () => showSettings(page.settings.hidden));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});

EXAMPLES.forEach(addExample);
showTemperature();
connect();
