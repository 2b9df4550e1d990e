// The editor for functions that the model may call.

import { button, element, fitHeight } from "./dom.js";
import { toolProblems } from "./schema.js";

const EXAMPLE = {
  enabled: true,
  name: "get_hours",
  description: "Opening hours of a place in the town.",
  parameters: JSON.stringify(
    {
      type: "object",
      properties: { place: { type: "string", description: "Name of the place" } },
      required: ["place"],
    },
    null,
    2,
  ),
};

/** Cards for the tools of some settings, in `root`. `onChange` is called after every change. */
export class ToolsEditor {
  constructor(root, onChange) {
    this.root = root;
    this.onChange = onChange;
    this.settings = null;
    this.cards = [];
    this.list = element("div", { class: "tools" });
    this.choice = element("select", { id: "tool-choice", on: { change: () => this.#setChoice() } });
    this.choiceRow = element("label", { class: "field" }, "May the model call?", this.choice);
    root.append(
      this.list,
      element(
        "div",
        { class: "row" },
        button("Add a function", () => this.#add({ enabled: true, name: "", description: "", parameters: "" }), {
          id: "add-tool",
        }),
        button("Add an example", () => this.#add(EXAMPLE), { id: "add-example-tool", class: "quiet" }),
      ),
      this.choiceRow,
    );
  }

  /** Edit these settings from now on. */
  show(settings) {
    this.settings = settings;
    this.list.replaceChildren();
    this.cards = [];
    settings.tools.forEach((tool) => this.#addCard(tool));
    this.#refresh();
  }

  #add(tool) {
    this.settings.tools.push({ ...tool });
    const card = this.#addCard(this.settings.tools.at(-1));
    this.#changed();
    card.name.focus();
  }

  #addCard(tool) {
    const card = { tool };
    const place = this.cards.length;
    const bind = (field, member) => {
      field.addEventListener("input", () => {
        tool[member] = field.value;
        if (field.localName === "textarea") fitHeight(field);
        this.#changed();
      });
      return field;
    };
    card.name = bind(
      element("input", { type: "text", value: tool.name, spellcheck: false, autocomplete: "off", maxLength: 64 }),
      "name",
    );
    card.description = bind(element("textarea", { rows: 1, value: tool.description }), "description");
    card.parameters = bind(
      element("textarea", {
        rows: 4,
        value: tool.parameters,
        spellcheck: false,
        class: "code",
        placeholder: '{"type": "object", "properties": {}}',
      }),
      "parameters",
    );
    card.nameProblem = element("span", { class: "problem", role: "status" });
    card.parametersProblem = element("span", { class: "problem", role: "status" });
    card.enabled = element("input", {
      type: "checkbox",
      checked: tool.enabled,
      on: {
        change: () => {
          tool.enabled = card.enabled.checked;
          this.#changed();
        },
      },
    });
    card.summary = element("legend");
    card.element = element(
      "fieldset",
      { class: "tool" },
      card.summary,
      element(
        "div",
        { class: "row spread" },
        element("label", { class: "check" }, card.enabled, "Offer it to the model"),
        button("Remove", () => this.#remove(card), { class: "quiet" }),
      ),
      element("label", { class: "field" }, "Name", card.name, card.nameProblem),
      element("label", { class: "field" }, "What it does", card.description),
      element("label", { class: "field" }, "Arguments, as a JSON schema", card.parameters, card.parametersProblem),
    );
    this.cards.push(card);
    this.list.append(card.element);
    this.#number();
    this.cards[place].element.querySelectorAll("textarea").forEach((field) => fitHeight(field));
    return card;
  }

  #remove(card) {
    this.settings.tools.splice(this.cards.indexOf(card), 1);
    this.cards.splice(this.cards.indexOf(card), 1);
    card.element.remove();
    this.#number();
    this.#changed();
    this.root.querySelector("#add-tool").focus();
  }

  #number() {
    this.cards.forEach((card, place) => {
      card.name.id = `tool-${place}-name`;
      card.parameters.id = `tool-${place}-parameters`;
    });
  }

  #changed() {
    this.#refresh();
    this.onChange();
  }

  #refresh() {
    this.cards.forEach(({ tool, ...card }, place) => {
      const problems = tool.enabled ? toolProblems(tool, this.settings.tools) : { name: null, parameters: null };
      card.summary.textContent = tool.name || `Function ${place + 1}`;
      // An empty name of a function that was just added is no mistake yet; sending it is.
      const fresh = tool.name === "" && tool.description === "" && tool.parameters === "";
      card.nameProblem.textContent = fresh ? "" : (problems.name ?? "");
      card.name.setAttribute("aria-invalid", String(!fresh && problems.name !== null));
      card.parametersProblem.textContent = problems.parameters ?? "";
      card.parameters.setAttribute("aria-invalid", String(problems.parameters !== null));
    });
    const names = this.settings.tools.filter((tool) => tool.enabled && tool.name).map(({ name }) => name);
    const options = [
      ["auto", "As it likes"],
      ["none", "No"],
      ["required", "It must"],
      ...names.map((name) => [`=${name}`, `It must call ${name}`]),
    ];
    this.choice.replaceChildren(...options.map(([value, label]) => element("option", { value }, label)));
    if (!options.some(([value]) => value === this.settings.tool_choice)) this.settings.tool_choice = "auto";
    this.choice.value = this.settings.tool_choice;
    this.choiceRow.hidden = names.length === 0;
  }

  #setChoice() {
    this.settings.tool_choice = this.choice.value;
    this.onChange();
  }
}
