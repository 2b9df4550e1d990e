// Shows the function calls of an answer, with a box for what each of them returned.

import { copyButton, element, fitHeight } from "./dom.js";
import { isAnswerable } from "./request.js";
import { readJson } from "./schema.js";

/** Arguments as they are easy to read: indented if they are JSON, else as the model wrote them. */
function pretty(text) {
  const { value, problem } = readJson(text);
  return problem ? text : JSON.stringify(value, null, 2);
}

/** The view of the calls of one answer. `onResults` is called once every box was filled in and sent. */
export class CallsView {
  constructor(message, onResults) {
    this.message = message;
    this.onResults = onResults;
    this.element = element("div", { class: "calls" });
    this.cards = [];
  }

  /** Show the calls as far as they are known; boxes for results come with `finished`. */
  update(finished) {
    const { calls } = this.message;
    while (this.cards.length < calls.length) this.#addCard();
    calls.forEach((made, place) => {
      this.cards[place].name.textContent = made.name;
      this.cards[place].code.textContent = finished ? pretty(made.arguments) : made.arguments;
    });
    if (finished) this.#showResults();
  }

  #addCard() {
    const place = this.cards.length;
    const name = element("code", { class: "name" });
    const code = element("code");
    const head = element(
      "div",
      { class: "call-head" },
      element("span", { class: "label" }, "Call"),
      name,
      copyButton(() => this.message.calls[place].arguments),
    );
    const pre = element("pre", { tabIndex: 0 }, code);
    pre.setAttribute("aria-label", "Arguments");
    const card = element("div", { class: "call" }, head, pre);
    this.cards.push({ name, code, card });
    this.element.append(card);
  }

  #showResults() {
    this.element.querySelectorAll(".result, .results").forEach((old) => old.remove());
    if (!isAnswerable(this.message)) {
      if (this.message.calls.length > 0) {
        this.element.append(
          element("p", { class: "results note" }, "The call is not whole, so it cannot get a result."),
        );
      }
      return;
    }
    const { calls } = this.message;
    if (calls.every(({ result }) => result !== null)) {
      calls.forEach(({ result }, place) => {
        const shown = element("pre", { tabIndex: 0 }, element("code", {}, pretty(result)));
        shown.setAttribute("aria-label", "Result");
        this.cards[place].card.append(
          element("div", { class: "result" }, element("span", { class: "label" }, "Result"), shown),
        );
      });
      return;
    }
    this.fields = calls.map((made, place) => this.#addField(made, place));
    const send = element(
      "button",
      { type: "button", class: "primary send-results", on: { click: () => this.#send() } },
      "Send results",
    );
    this.element.append(
      element(
        "div",
        { class: "results" },
        send,
        element("span", { class: "note" }, "The model goes on when every call has its result."),
      ),
    );
  }

  #addField(made, place) {
    const field = element("textarea", {
      rows: 2,
      value: made.result ?? "",
      spellcheck: false,
      "aria-label": `Result of ${made.name}`,
      on: {
        input: () => fitHeight(field),
        keydown: (event) => {
          if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.#send();
        },
      },
    });
    this.cards[place].card.append(
      element("label", { class: "result" }, element("span", { class: "label" }, "Result"), field),
    );
    return field;
  }

  /** Move to the first box that is empty. */
  focus() {
    (this.fields?.find((field) => field.value === "") ?? this.fields?.[0])?.focus();
  }

  #send() {
    if (this.fields.some((field) => field.value.trim() === "")) {
      this.focus();
      return;
    }
    this.fields.forEach((field, place) => {
      this.message.calls[place].result = field.value;
    });
    this.#showResults();
    this.onResults();
  }
}
