// The settings panel: fields bound to the settings of the conversation that is shown.

import { byId, element, fitHeight } from "./dom.js";
import { readSchema, readStops, stopLines } from "./schema.js";
import { NUMBERS } from "./store.js";
import { ToolsEditor } from "./tools.js";

/** Binds the panel once; `show` changes whose settings it edits. `onChange` is called after every change. */
export class SettingsPanel {
  constructor(onChange) {
    this.onChange = onChange;
    this.settings = null;
    this.numbers = new Map();
    for (const [name, about] of Object.entries(NUMBERS)) this.#addNumber(name, about);
    this.tools = new ToolsEditor(byId("tools"), onChange);
    this.#bind("system", "input", (value) => {
      this.settings.system = value;
    });
    this.#bind("stop-words", "input", (value) => {
      this.settings.stop = readStops(value);
    });
    this.#bind("schema", "input", (value) => {
      this.settings.schema = value;
      this.#checkSchema();
    });
    this.#bind("regex", "input", (value) => {
      this.settings.regex = value;
    });
    this.#bind("format", "change", (value) => {
      this.settings.format = value;
      this.#showFormat();
    });
    const experts = byId("experts");
    experts.addEventListener("change", () => {
      this.settings.experts = experts.checked;
      this.onChange();
    });
  }

  #bind(id, event, set) {
    const field = byId(id);
    field.addEventListener(event, () => {
      set(field.value);
      if (field.localName === "textarea") fitHeight(field);
      this.onChange();
    });
  }

  #addNumber(name, { label, low, high, step, server }) {
    const field = element("input", {
      type: "number",
      id: name,
      min: String(low),
      max: String(high),
      step: step === 1 ? "1" : "any",
      placeholder: server,
      inputMode: step === 1 ? "numeric" : "decimal",
      autocomplete: "off",
    });
    const problem = element("span", { class: "problem", role: "status" });
    field.addEventListener("input", () => {
      this.#checkNumber(field, problem, name);
      if (field.validity.valid) this.settings[name] = field.value === "" ? null : Number(field.value);
      this.onChange();
    });
    this.numbers.set(name, { field, problem });
    byId("numbers").append(element("label", { class: "field" }, label, field, problem));
  }

  #checkNumber(field, problem, name) {
    const { low, high, step } = NUMBERS[name];
    const kind = step === 1 ? "a whole number" : "a number";
    const bounds = high > 1e6 ? (low < 0 ? kind : `${kind}, ${low} or more`) : `${kind} from ${low} to ${high}`;
    problem.textContent = field.validity.valid ? "" : `Expected ${bounds}.`;
    field.setAttribute("aria-invalid", String(!field.validity.valid));
  }

  /** Edit these settings from now on. */
  show(settings) {
    this.settings = settings;
    for (const [name, { field, problem }] of this.numbers) {
      field.value = settings[name] ?? "";
      this.#checkNumber(field, problem, name);
    }
    byId("system").value = settings.system;
    byId("stop-words").value = stopLines(settings.stop);
    byId("schema").value = settings.schema;
    byId("regex").value = settings.regex;
    byId("format").value = settings.format;
    byId("experts").checked = settings.experts;
    this.tools.show(settings);
    this.#showFormat();
    this.#checkSchema();
    this.fit();
  }

  /** Fields as high as their texts; needs the panel to be visible. */
  fit() {
    for (const field of document.querySelectorAll("#settings textarea")) fitHeight(field);
  }

  /** The field that the browser finds wrong, or null. */
  wrongNumber() {
    for (const { field } of this.numbers.values()) if (!field.validity.valid) return field;
    return null;
  }

  /** Bounds that depend on the model. */
  limitTokens(context) {
    this.numbers.get("max_tokens").field.max = String(context);
  }

  #showFormat() {
    byId("schema-row").hidden = this.settings.format !== "json_schema";
    byId("regex-row").hidden = this.settings.format !== "regex";
    this.fit();
  }

  #checkSchema() {
    const { problem } = readSchema(this.settings.schema);
    const empty = this.settings.schema.trim() === "";
    byId("schema-problem").textContent = empty ? "" : (problem ?? "");
    byId("schema").setAttribute("aria-invalid", String(!empty && problem !== null));
  }
}
