// The server as this page knows it: its models, the key, and whether it reports experts.

import { byId, element } from "./dom.js";
import { call, errorData } from "./stream.js";

/** `models`, `key` and `experts` are read by whoever sends a request. The key is kept in memory alone. */
export class Connection {
  constructor() {
    this.models = [];
    this.key = "";
    this.experts = true; // until the server says that it does not report them
  }

  get isReady() {
    return this.models.length > 0;
  }

  /** Ask which models there are. Gives null, or what went wrong as data of an ApiError. */
  async connect() {
    this.experts = true;
    try {
      const response = await call("/v1/models", { key: this.key });
      this.models = (await response.json()).data;
      return null;
    } catch (error) {
      this.models = [];
      return errorData(error);
    }
  }

  /** Fill the picker, with `wanted` chosen if the server has it. */
  showModels(wanted) {
    const picker = byId("model");
    picker.replaceChildren(
      ...this.models.map(({ id, parent }) =>
        element("option", { value: id }, parent ? `${id} (adapter of ${parent})` : id),
      ),
    );
    if (this.models.some(({ id }) => id === wanted)) picker.value = wanted;
    picker.disabled = !this.isReady;
  }

  /** The model that is chosen, as the server describes it; undefined if there is none. */
  get chosen() {
    return this.models.find(({ id }) => id === byId("model").value);
  }
}
