// Shows markdown: elements from the tree of markdown.js, and a view that renews only the end of a growing text.

import { copyButton, element } from "./dom.js";
import { inline, parse } from "./markdown.js";

/** Elements of all blocks; `growing` says that the last one may go on. */
export function blockElements(blocks, growing = false) {
  const made = document.createDocumentFragment();
  blocks.forEach((block, place) => made.append(blockElement(block, growing && place === blocks.length - 1)));
  return made;
}

function blockElement(block, growing) {
  switch (block.type) {
    case "heading":
      // The page has headings of its own above those of an answer.
      return element(`h${Math.min(6, block.level + 2)}`, {}, inlineNodes(block.text, growing));
    case "rule":
      return element("hr");
    case "code":
      return codeElement(block);
    case "quote":
      return element("blockquote", {}, blockElements(block.blocks, growing));
    case "list":
      return listElement(block, growing);
    case "table":
      return tableElement(block);
    default:
      return element("p", {}, inlineNodes(block.text, growing));
  }
}

function codeElement({ language, text }) {
  const caption = element(
    "figcaption",
    {},
    element("span", {}, language || "text"),
    copyButton(() => text),
  );
  const code = element("pre", { tabIndex: 0 }, element("code", {}, text));
  code.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
  return element("figure", { class: "code" }, caption, code);
}

function listElement({ first, loose, items }, growing) {
  const list = element(first === null ? "ul" : "ol");
  if (first !== null && first !== 1) list.start = first;
  items.forEach(({ checked, blocks }, place) => {
    const item = element("li");
    const last = growing && place === items.length - 1;
    if (checked !== null) {
      item.className = "task";
      item.append(element("input", { type: "checkbox", disabled: true, checked, "aria-label": "Task" }), " ");
    }
    blocks.forEach((block, order) => {
      const open = last && order === blocks.length - 1;
      const inLine = !loose && block.type === "paragraph";
      item.append(inLine ? inlineNodes(block.text, open) : blockElement(block, open));
    });
    list.append(item);
  });
  return list;
}

function tableElement({ head, aligns, rows }) {
  const cell = (tag, text, column) => element(tag, { class: aligns[column] ?? "" }, inlineNodes(text));
  const line = (tag, cells) => element("tr", {}, ...cells.map((text, column) => cell(tag, text, column)));
  const top = element("thead", {}, line("th", head));
  const body = element("tbody");
  for (const row of rows) body.append(line("td", row));
  return element(
    "div",
    { class: "scroll", tabIndex: 0, role: "group", "aria-label": "Table" },
    element("table", {}, top, body),
  );
}

function inlineNodes(text, growing = false) {
  return fragment(inline(text, growing));
}

function fragment(nodes) {
  const made = document.createDocumentFragment();
  for (const node of nodes) made.append(inlineElement(node));
  return made;
}

function inlineElement(node) {
  switch (node.type) {
    case "text":
      return document.createTextNode(node.text);
    case "break":
      return element("br");
    case "code":
      return element("code", {}, node.text);
    case "link":
      return linkElement(node);
    default:
      return element(node.type, {}, fragment(node.children));
  }
}

/** A link is its text and its address, both to read: nothing can be loaded or followed by mistake. */
function linkElement({ address, image, children }) {
  const label = fragment(children);
  if (!image && label.textContent === address) return element("span", { class: "link" }, label);
  return element(
    "span",
    { class: "link" },
    label,
    " ",
    element("span", { class: "address" }, image ? `(picture: ${address})` : `(${address})`),
  );
}

/**
 * A text in `root` that grows at its end. Blocks that cannot change any more stay as they are; `onSettled` gets each of
 * them once, and the rest at the end.
 */
export class MarkdownView {
  constructor(root, onSettled = () => {}) {
    this.root = root;
    this.onSettled = onSettled;
    this.settled = 0; // characters whose elements are final
    this.kept = 0; // final elements
  }

  /** Show `text`, which begins with all of the text shown before. */
  update(text, finished = false) {
    const rest = text.slice(this.settled);
    const { blocks, lines } = parse(rest);
    while (this.root.childElementCount > this.kept) this.root.lastElementChild.remove();
    this.root.append(blockElements(blocks, !finished));
    // How a block begins depends on at most two lines: one that has two whole lines ends what came before.
    const last = finished ? -1 : blocks.findLastIndex((block) => block.line + 2 < lines);
    const final = finished ? blocks.length : Math.max(0, last);
    for (let place = this.kept; place < this.kept + final; place += 1) this.onSettled(this.root.children[place]);
    if (final > 0) {
      this.settled += finished ? rest.length : blocks[final].start;
      this.kept += final;
    }
  }
}
