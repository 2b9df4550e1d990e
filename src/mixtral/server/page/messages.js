// Shows one message of a conversation: what the user wrote, or an answer with its calls, errors, numbers and experts.

import { CallsView } from "./calls.js";
import { announce, button, copyButton, element, fitHeight } from "./dom.js";
import { ExpertsView, isShowable } from "./experts-view.js";
import { MarkdownView } from "./markup.js";

/** A message of the user. `actions` has edit(text) and remove(). */
export class UserView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.text = element("div", { class: "text" }, message.content);
    this.editButton = button("Edit", () => this.edit(), { class: "quiet" });
    this.buttons = element(
      "div",
      { class: "actions" },
      copyButton(() => message.content),
      this.editButton,
      button("Delete", () => actions.remove(), { class: "quiet" }),
    );
    this.element = element(
      "li",
      { class: "message user" },
      element("h3", { class: "hidden" }, "You"),
      this.text,
      this.buttons,
    );
  }

  /** A box in place of the text. */
  edit() {
    if (this.editor) return;
    const field = element("textarea", { value: this.message.content, "aria-label": "Your message", rows: 1 });
    const close = () => {
      this.editor.replaceWith(this.text, this.buttons);
      this.editor = null;
      this.editButton.focus();
    };
    const save = () => {
      if (field.value.trim() !== "") this.actions.edit(field.value.trim());
    };
    field.addEventListener("input", () => fitHeight(field));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) save();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.editor = element(
      "div",
      { class: "editor" },
      field,
      element("div", { class: "row" }, button("Save and send", save, { class: "primary" }), button("Cancel", close)),
    );
    this.text.replaceWith(this.editor);
    this.buttons.remove();
    fitHeight(field);
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
}

/** Numbers of an answer in words. */
function statisticsText({
  prompt_tokens: prompt,
  cached_tokens: cached,
  completion_tokens: tokens,
  first_s: first,
  per_s: rate,
  seed,
}) {
  const parts = [];
  if (tokens !== null) parts.push(`${tokens} ${tokens === 1 ? "token" : "tokens"}`);
  if (rate !== null) parts.push(`${rate.toFixed(1)} tokens/s`);
  if (first !== null) parts.push(`first after ${first.toFixed(2)} s`);
  if (prompt !== null) parts.push(`prompt ${prompt} tokens${cached ? `, ${cached} of them cached` : ""}`);
  if (seed !== null) parts.push(`seed ${seed}`);
  return parts.join(" · ");
}

const FINISHES = {
  stop: "stop",
  length: "length: cut at the longest allowed length",
  tool_calls: "tool_calls",
  stopped: "stopped by you",
};

/** What an error was, as it was received. */
function errorElement(error, retry) {
  const facts = [
    error.code && `code ${error.code}`,
    error.param && `field ${error.param}`,
    error.status && `status ${error.status}`,
    error.retryAfter && `retry after ${error.retryAfter} s`,
    error.requestId && `request ${error.requestId}`,
  ].filter(Boolean);
  return element(
    "div",
    { class: "error", role: "alert" },
    element("p", {}, error.message),
    facts.length > 0 && element("p", { class: "facts" }, facts.join(" · ")),
    button("Try again", retry, { class: "retry" }),
  );
}

/** An answer. `actions` has regenerate(), proceed(), remove() and results(). */
export class AnswerView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.text = element("div", { class: "text" });
    this.plain = false; // show the text as the model wrote it
    this.calls = new CallsView(message, () => actions.results());
    this.problems = element("div");
    this.numbers = element("span", { class: "numbers" });
    this.buttons = element("div", { class: "actions" });
    this.routes = element("div", { class: "routes" });
    this.element = element(
      "li",
      { class: "message assistant" },
      element("h3", { class: "who" }, "Mixtral"),
      this.text,
      this.calls.element,
      this.problems,
      element("div", { class: "meta" }, this.numbers),
      this.buttons,
      this.routes,
    );
    this.#restart(false);
  }

  #restart(spoken) {
    this.text.replaceChildren();
    this.text.className = this.#isSource ? "text source" : "text markdown";
    this.markdown = this.#isSource
      ? null
      : new MarkdownView(this.text, (settled) => {
          if (spoken) announce(settled.textContent);
        });
  }

  get #isSource() {
    return this.plain || this.message.format !== "text";
  }

  /** An answer begins: what is written from now on is spoken. */
  begin() {
    this.element.classList.add("streaming");
    this.element.setAttribute("aria-busy", "true");
    this.#restart(true);
    this.update(null);
  }

  /** Show what the message has meanwhile, with live numbers. */
  update(statistics) {
    this.#showText(false);
    this.calls.update(false);
    if (statistics) this.numbers.textContent = statisticsText(statistics);
    this.#showExperts();
  }

  /** Show the message as it is, whole. */
  finish() {
    const { message } = this;
    const live = this.element.classList.contains("streaming");
    this.element.classList.remove("streaming");
    this.element.removeAttribute("aria-busy");
    this.#showText(true);
    if (live && this.#isSource) announce(message.content);
    this.calls.update(true);
    this.problems.replaceChildren(
      ...(message.error ? [errorElement(message.error, () => this.actions.regenerate())] : []),
    );
    const facts = [
      message.statistics && statisticsText(message.statistics),
      message.finish && `finish ${FINISHES[message.finish] ?? message.finish}`,
    ];
    this.numbers.textContent = facts.filter(Boolean).join(" · ");
    this.#showButtons();
    this.#showExperts();
  }

  #showText(finished) {
    if (this.markdown) this.markdown.update(this.message.content, finished);
    else this.text.textContent = this.message.content;
  }

  #showButtons() {
    const { message, actions } = this;
    const unfinished = ["length", "stopped"].includes(message.finish);
    const cut = message.format === "text" && message.content !== "" && message.calls.length === 0 && unfinished;
    const sourceButton = button(
      this.plain ? "Formatted" : "Source",
      () => {
        this.plain = !this.plain;
        this.#restart(false);
        this.finish();
        this.buttons.querySelector(".source-button").focus();
      },
      { class: "quiet source-button" },
    );
    const made = [
      message.content !== "" && copyButton(() => message.content),
      message.content !== "" && message.format === "text" && sourceButton,
      cut && button("Continue", () => actions.proceed(), { class: "quiet" }),
      !message.error && button("Regenerate", () => actions.regenerate(), { class: "quiet" }),
      button("Delete", () => actions.remove(), { class: "quiet" }),
    ];
    this.buttons.replaceChildren(...made.filter(Boolean));
  }

  #showExperts() {
    const { experts } = this.message;
    if (!isShowable(experts)) return;
    if (this.experts?.trace === experts) {
      this.experts.update();
      return;
    }
    this.experts = new ExpertsView(experts);
    this.routes.replaceChildren(this.experts.element);
  }
}
