// Asking for one answer: sends the conversation, follows the stream, and keeps the message and its view up to date.

import { Trace } from "./experts.js";
import { bodyOf } from "./request.js";
import { Answer, ApiError, call, errorData, events } from "./stream.js";

/** Calls `work` once per frame at most, and less often when it takes long, so that a long answer stays cheap. */
export class Pacer {
  constructor(work) {
    this.work = work;
    this.waiting = false;
    this.notBefore = 0;
  }

  request() {
    if (this.waiting) return;
    this.waiting = true;
    const run = () =>
      requestAnimationFrame(() => {
        this.waiting = false;
        const began = performance.now();
        this.work();
        const end = performance.now();
        this.notBefore = end + 3 * (end - began);
      });
    const pause = this.notBefore - performance.now();
    if (pause > 16) setTimeout(run, pause);
    else run();
  }
}

/** A message for an answer that is still to come. */
export function newAnswer(format) {
  return {
    role: "assistant",
    content: "",
    calls: [],
    format,
    finish: null,
    statistics: null,
    error: null,
    experts: null,
  };
}

/** One answer on its way. `view` may be null: the answer goes on while another conversation is shown. */
export class Run {
  constructor(conversation, message, { model, key, server, continues, onStatus }) {
    Object.assign(this, { conversation, message, model, key, server, continues, onStatus });
    this.controller = new AbortController();
    this.answer = new Answer();
    this.before = message.content; // an answer that goes on keeps what it has
    this.view = null;
    this.pacer = new Pacer(() => this.#show());
    this.ended = false;
  }

  stop() {
    this.controller.abort();
  }

  /** Follow the stream to its end. Errors end up in the message. */
  async follow() {
    const { message } = this;
    message.error = null;
    message.finish = null;
    try {
      const response = await this.#ask();
      this.answer.seed = response.headers.get("x-mixtral-seed");
      for await (const event of events(response)) {
        this.#take(event);
        this.pacer.request();
      }
      message.finish = this.answer.finish;
    } catch (error) {
      if (error.name === "AbortError") message.finish = "stopped";
      else message.error = errorData(error);
    }
    this.ended = true;
    message.experts?.settle({ promptTokens: this.answer.usage?.prompt_tokens, calls: message.calls.length > 0 });
    if (this.answer.first !== null) message.statistics = this.answer.statistics();
  }

  /** A server that does not report experts says so once; then it is not asked again. */
  async #ask() {
    const { conversation, message, model, key, server, continues } = this;
    const wanted = conversation.settings.experts && server.experts;
    if (wanted) {
      message.experts ??= new Trace();
      message.experts.begin();
    }
    const send = (experts) =>
      call("/v1/chat/completions", {
        key,
        body: bodyOf(conversation, { model, experts, continues }),
        signal: this.controller.signal,
      });
    try {
      return await send(wanted);
    } catch (error) {
      const refused = error instanceof ApiError && error.param?.split(".")[0] === "mixtral";
      if (!wanted || !refused) throw error;
      if (["unknown_parameter", "unsupported_parameter"].includes(error.code)) server.experts = false;
      this.onStatus(`Experts are not shown: ${error.message}`);
      if (message.experts.empty) message.experts = null; // an answer that goes on keeps those that it has
      return await send(false);
    }
  }

  #take(event) {
    const { message, answer } = this;
    const tokens = answer.take(event);
    message.content = this.before + answer.content;
    message.calls = answer.calls.map((made) => ({ ...made, result: null }));
    if (!message.experts) return;
    message.experts.addTokens(tokens);
    if (!event.mixtral?.routing) return;
    try {
      message.experts.addRouting(event.mixtral.routing);
      message.experts.settle({ promptTokens: null, calls: message.calls.length > 0 });
    } catch (error) {
      message.experts = null; // the answer itself is as good as without
      this.onStatus(`Experts are not shown: ${error.message}`);
    }
  }

  #show() {
    if (!this.ended && this.view) this.view.update(this.answer.statistics());
  }
}
