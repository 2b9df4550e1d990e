// Shows the experts of an answer: a strip with a cell per token, the experts of one token, and a map of all layers.

import { button, element } from "./dom.js";
import { Trace } from "./experts.js";

let ids = 0;
let lastLayer = 0; // place of the layer that was looked at last; a new strip begins with it

const percent = (share) => `${Math.round(100 * share)} %`;
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");

/** A value below 1 as steps of 5 %, for a class of the style sheet. */
const shade = (share) => `shade s${Math.round(20 * Math.min(1, share))}`;

/** The view of one trace. `update` shows what the trace has got meanwhile. */
export class ExpertsView {
  constructor(trace) {
    this.trace = trace;
    this.name = `experts-${(ids += 1)}`;
    this.layer = Math.min(lastLayer, trace.layers.length - 1);
    this.cells = [];
    this.options = []; // elements of the strip
    this.chosen = null; // place of the token that is looked at
    this.fixed = false; // by a click or a key, not by the pointer passing over
    this.alignment = null;
    this.#build();
    this.update();
  }

  #build() {
    const { layers } = this.trace;
    const options = layers.map((layer, place) => element("option", { value: String(place) }, `Layer ${layer}`));
    this.picker = element(
      "select",
      { "aria-label": "Layer that colours the strip", on: { change: () => this.#setLayer(Number(this.picker.value)) } },
      ...options,
    );
    this.picker.value = String(this.layer);
    this.mapButton = button("Heat map", () => this.#toggleMap(), {
      class: "quiet map-button",
      "aria-expanded": "false",
    });
    this.wordsButton = button("Words", () => this.#toggleWords(), {
      class: "quiet words-button",
      "aria-pressed": "false",
    });
    this.strip = element("div", {
      class: "strip",
      id: this.name,
      tabIndex: 0,
      role: "listbox",
      "aria-label": "Tokens and their first expert. Left and right: token. Up and down: layer.",
      on: {
        keydown: (event) => this.#onKey(event),
        mouseover: (event) => this.#onPoint(event, false),
        click: (event) => this.#onPoint(event, true),
        mouseleave: () => {
          if (!this.fixed) this.#choose(null);
        },
        focus: () => {
          if (this.chosen === null) this.#choose(0, true);
        },
      },
    });
    this.detail = element("div", { class: "detail", role: "group", "aria-label": "Experts of one token" });
    this.map = element("div", {
      class: "heat",
      hidden: true,
      role: "group",
      tabIndex: 0,
      "aria-label": "Tokens for each layer and expert",
    });
    this.element = element(
      "section",
      { class: "experts", "aria-label": "Experts" },
      element(
        "div",
        { class: "experts-bar" },
        element("span", { class: "label" }, "Experts"),
        this.picker,
        this.wordsButton,
        this.mapButton,
      ),
      this.strip,
      this.detail,
      this.map,
    );
    this.#buildDetail();
  }

  update() {
    this.cells = this.trace.cells();
    const { alignment } = this.trace;
    if (alignment !== this.alignment || this.options.length > this.cells.length) {
      this.alignment = alignment;
      this.options = [];
      this.strip.replaceChildren();
    }
    // A row comes with the token after it, so the last cells shown may have been without.
    const from = Math.max(0, this.options.findLastIndex((option) => !option.classList.contains("none")) + 1);
    for (let place = from; place < this.cells.length; place += 1) this.#paint(place);
    this.#showDetail();
    if (!this.map.hidden) this.#showMap();
  }

  #paint(place) {
    const { text, row } = this.cells[place];
    if (place === this.options.length) {
      const made = element(
        "span",
        { id: `${this.name}-${place}`, role: "option", "data-place": place },
        element("b", { "aria-hidden": "true" }),
        element("span", { class: "word" }, visible(text)),
      );
      this.options.push(made);
      this.strip.append(made);
    }
    const option = this.options[place];
    const [top] = row ? this.trace.choices(row, this.layer) : [];
    option.className = top ? `cell e${top.expert % 8}` : "cell none";
    option.firstChild.textContent = top ? top.expert : "·";
    option.setAttribute("aria-label", this.#spoken(place));
    option.setAttribute("aria-selected", String(place === this.chosen));
  }

  #spoken(place) {
    const { text, row } = this.cells[place];
    if (!row) return `${JSON.stringify(text)}: not computed`;
    const named = this.trace
      .choices(row, this.layer)
      .map(({ expert, weight }) => `expert ${expert} ${percent(weight)}`);
    return `${JSON.stringify(text)}: layer ${this.trace.layers[this.layer]}, ${named.join(", ")}`;
  }

  #setLayer(place) {
    this.layer = lastLayer = place;
    this.picker.value = String(place);
    for (let cell = 0; cell < this.cells.length; cell += 1) this.#paint(cell);
    this.#showDetail();
  }

  #toggleWords() {
    const on = this.strip.classList.toggle("words");
    this.wordsButton.setAttribute("aria-pressed", String(on));
  }

  #toggleMap() {
    this.map.hidden = !this.map.hidden;
    this.mapButton.setAttribute("aria-expanded", String(!this.map.hidden));
    if (!this.map.hidden) this.#showMap();
  }

  #onPoint(event, fixed) {
    const option = event.target.closest(".cell");
    if (option && (fixed || !this.fixed)) this.#choose(Number(option.dataset.place), fixed);
  }

  #onKey(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -Infinity, End: Infinity };
    const layers = { ArrowUp: -1, ArrowDown: 1 };
    if (event.key in steps) {
      const wanted = (this.chosen ?? 0) + steps[event.key];
      this.#choose(Math.max(0, Math.min(this.cells.length - 1, wanted)), true);
      this.options[this.chosen]?.scrollIntoView({ block: "nearest" });
    } else if (event.key in layers) {
      this.#setLayer(Math.max(0, Math.min(this.trace.layers.length - 1, this.layer + layers[event.key])));
    } else if (event.key === "Escape" && this.fixed) {
      this.#choose(null);
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  }

  #choose(place, fixed = false) {
    this.options[this.chosen]?.setAttribute("aria-selected", "false");
    this.chosen = place;
    this.fixed = fixed && place !== null;
    if (this.fixed) this.element.classList.add("opened");
    const option = this.options[place];
    option?.setAttribute("aria-selected", "true");
    if (option) this.strip.setAttribute("aria-activedescendant", option.id);
    else this.strip.removeAttribute("aria-activedescendant");
    this.#showDetail();
    if (!this.map.hidden) this.#markMap();
  }

  /** A table with a column for each layer and a row for each of the token's experts. It always has its full size. */
  #buildDetail() {
    const { layers, perToken } = this.trace;
    this.token = element("p", { class: "token" });
    const ranks = Array.from({ length: perToken }, (_, rank) => ["First", "Second"][rank] ?? `No. ${rank + 1}`);
    this.slots = ranks.map(() => layers.map(() => element("td")));
    this.heads = layers.map((layer) => element("th", { scope: "col" }, layer));
    const head = element("tr", {}, element("th", { scope: "col" }, "Layer"), ...this.heads);
    const rows = ranks.map((name, rank) =>
      element("tr", {}, element("th", { scope: "row" }, name), ...this.slots[rank]),
    );
    const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
    this.detail.append(
      this.token,
      element("div", { class: "scroll", tabIndex: 0, role: "group", "aria-label": "Experts by layer" }, table),
    );
  }

  /** The chosen token; without one the latest that was computed. */
  #showDetail() {
    const place = this.chosen ?? this.cells.findLastIndex(({ row }) => row !== null);
    const cell = this.cells[place] ?? null;
    const row = cell?.row;
    const chance = cell?.probability == null ? "" : ` · probability ${percent(cell.probability)}`;
    const none = cell && !row ? " · nothing was made from it, so it has no experts" : "";
    this.token.replaceChildren(
      element("code", {}, visible(cell?.text ?? "")),
      cell ? ` token ${place + 1}${chance}${none}` : "",
    );
    this.trace.layers.forEach((_, layer) => {
      const choices = row ? this.trace.choices(row, layer) : [];
      this.heads[layer].className = layer === this.layer ? "current" : "";
      this.slots.forEach((slots, rank) => {
        const choice = choices[rank];
        slots[layer].replaceChildren(
          element("b", { class: choice ? `e${choice.expert % 8}` : "none" }, choice ? choice.expert : "·"),
          element("span", {}, choice ? percent(choice.weight) : "–"),
        );
      });
    });
  }

  #showMap() {
    const counts = this.trace.counts(this.cells);
    const most = Math.max(1, ...counts.flat());
    const { layers } = this.trace;
    if (this.mapSlots?.[0].length !== counts[0].length) this.#buildMap(counts[0].length);
    counts.forEach((row, place) =>
      row.forEach((count, expert) => {
        const slot = this.mapSlots[place][expert];
        slot.textContent = count;
        slot.className = shade(count / most);
        slot.title = `Layer ${layers[place]}, expert ${expert}: ${count} tokens`;
      }),
    );
    this.mapTokens.textContent = this.cells.filter(({ row }) => row).length;
    this.#markMap();
  }

  #buildMap(experts) {
    const { layers } = this.trace;
    this.mapSlots = layers.map(() => Array.from({ length: experts }, () => element("td")));
    this.mapTokens = element("span");
    const head = element(
      "tr",
      {},
      element("th", { scope: "col" }, "Layer"),
      ...layers.map((layer) => element("th", { scope: "col" }, layer)),
    );
    const rows = Array.from({ length: experts }, (_, expert) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, `Expert ${expert}`),
        ...layers.map((__, place) => this.mapSlots[place][expert]),
      ),
    );
    this.map.replaceChildren(
      element(
        "table",
        {},
        element("caption", {}, "How many of the ", this.mapTokens, " computed tokens used each expert"),
        element("thead", {}, head),
        element("tbody", {}, ...rows),
      ),
    );
  }

  /** Outline the experts of the chosen token in the map. */
  #markMap() {
    for (const slot of this.map.querySelectorAll(".chosen")) slot.classList.remove("chosen");
    const row = this.chosen === null ? null : this.cells[this.chosen]?.row;
    if (!row) return;
    this.trace.layers.forEach((_, place) => {
      for (const { expert } of this.trace.choices(row, place)) this.mapSlots[place][expert].classList.add("chosen");
    });
  }
}

/** Whether a trace can be shown. */
export function isShowable(trace) {
  return trace instanceof Trace && !trace.empty && trace.cells().length > 0;
}
