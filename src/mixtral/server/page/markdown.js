// Markdown as data: text in, a tree of plain objects out. Linear in the text; nesting is limited.

const BLOCK_DEPTH = 8; // quotes and lists inside each other; what is deeper stays text
const OPEN_MARKS = 16; // emphasis and brackets that are open at once
const ADDRESS_CHARACTERS = 2048;
const PUNCTUATION = /[!-/:-@[-`{-~\p{P}\p{S}]/u;
const SPACE = /\s/;
const MARKER = /^( *)([-+*]|\d{1,9}[.)])( +|$)/;

/**
 * The blocks of a text, in order. `start` is the character at which a block begins, and `line` its line.
 * Raw HTML is text like any other.
 */
export function parse(text) {
  const lines = text.split("\n");
  const starts = [];
  let at = 0;
  for (const line of lines) {
    starts.push(at);
    at += line.length + 1;
  }
  const blocks = blocksOf(
    lines.map((line) => (line.endsWith("\r") ? line.slice(0, -1) : line)),
    0,
  );
  for (const block of blocks) block.start = starts[block.line];
  return { blocks, lines: lines.length };
}

function blocksOf(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const { block, next } = readBlock(lines, at, depth);
    block.line = at;
    blocks.push(block);
    at = next;
  }
  return blocks;
}

function readBlock(lines, at, depth) {
  return (
    readFence(lines, at) ??
    readHeading(lines, at) ??
    readRule(lines, at) ??
    (depth < BLOCK_DEPTH ? (readQuote(lines, at, depth) ?? readList(lines, at, depth)) : null) ??
    readTable(lines, at) ??
    readParagraph(lines, at, depth)
  );
}

function isBlank(line) {
  return line.trim() === "";
}

function indentOf(line) {
  let width = 0;
  for (const character of line) {
    if (character === " ") width += 1;
    else if (character === "\t") width += 4;
    else break;
  }
  return width;
}

/** The line without its first `width` columns of space. */
function dedent(line, width) {
  const kept = Math.max(0, indentOf(line) - width);
  return " ".repeat(kept) + line.trimStart();
}

function fenceOf(line) {
  const found = /^( {0,3})(`{3,}|~{3,})([^]*)$/.exec(line);
  if (!found || (found[2][0] === "`" && found[3].includes("`"))) return null;
  return { indent: found[1].length, mark: found[2], language: found[3].trim().split(SPACE)[0] };
}

function readFence(lines, at) {
  const fence = fenceOf(lines[at]);
  if (!fence) return null;
  const inside = [];
  let next = at + 1;
  let closed = false;
  for (; next < lines.length && !closed; next += 1) {
    const bare = lines[next].trim();
    closed = bare.length >= fence.mark.length && isAll(bare, fence.mark[0]) && indentOf(lines[next]) < 4;
    if (!closed) inside.push(fence.indent ? lines[next].replace(/^ {1,3}/, "") : lines[next]);
  }
  return { block: { type: "code", language: fence.language, text: inside.join("\n"), closed }, next };
}

function isAll(text, character) {
  for (const each of text) if (each !== character) return false;
  return true;
}

function readHeading(lines, at) {
  const found = /^ {0,3}(#{1,6})(?:[ \t]([^]*))?$/.exec(lines[at]);
  if (!found) return null;
  let text = (found[2] ?? "").trim();
  let end = text.length;
  while (end > 0 && text[end - 1] === "#") end -= 1;
  if (end === 0 || SPACE.test(text[end - 1])) text = text.slice(0, end).trim();
  return { block: { type: "heading", level: found[1].length, text }, next: at + 1 };
}

function isRule(line) {
  if (indentOf(line) > 3) return false;
  const bare = line.replaceAll(" ", "").replaceAll("\t", "");
  return bare.length >= 3 && "-*_".includes(bare[0]) && isAll(bare, bare[0]);
}

function readRule(lines, at) {
  return isRule(lines[at]) ? { block: { type: "rule" }, next: at + 1 } : null;
}

function isQuote(line) {
  return indentOf(line) < 4 && line.trimStart().startsWith(">");
}

function readQuote(lines, at, depth) {
  const inside = [];
  let next = at;
  for (; next < lines.length && isQuote(lines[next]); next += 1) {
    inside.push(lines[next].trimStart().slice(1).replace(/^ /, ""));
  }
  return next === at ? null : { block: { type: "quote", blocks: blocksOf(inside, depth + 1) }, next };
}

/** The list marker at the start of a line: how far it is indented, its kind, and where its text begins. */
function markerOf(line) {
  const found = MARKER.exec(dedent(line, 0));
  if (!found) return null;
  const sign = found[2];
  const spaces = found[3].length;
  const width = found[1].length + sign.length + (spaces > 4 ? 1 : Math.max(1, spaces));
  return {
    indent: found[1].length,
    kind: sign.at(-1),
    number: sign.length > 1 ? Number(sign.slice(0, -1)) : null,
    width,
    text: dedent(line, 0).slice(width),
  };
}

function readList(lines, at, depth) {
  const first = markerOf(lines[at]);
  if (!first || first.indent > 3) return null;
  const inner = first.indent + 2; // what is indented this far belongs to the item
  const items = [];
  let loose = false;
  let width = first.width;
  let next = at;
  while (next < lines.length) {
    const line = lines[next];
    if (isBlank(line)) {
      let after = next;
      while (after < lines.length && isBlank(lines[after])) after += 1;
      if (after === lines.length || !goesOn(lines[after], first, inner)) break;
      loose = true;
      for (; next < after; next += 1) items.at(-1).push("");
      continue;
    }
    const found = markerOf(line);
    if (indentOf(line) >= inner) {
      items.at(-1).push(dedent(line, Math.min(indentOf(line), width)));
    } else if (found && !isRule(line)) {
      if (found.kind !== first.kind) break;
      width = found.width;
      items.push([found.text]);
    } else if (interrupts(lines, next, depth) || isBlank(lines[next - 1])) {
      break;
    } else {
      items.at(-1).push(line.trimStart());
    }
    next += 1;
  }
  const block = { type: "list", first: first.number, loose, items: items.map((item) => itemOf(item, depth)) };
  return { block, next };
}

function goesOn(line, first, inner) {
  if (indentOf(line) >= inner) return true;
  const found = markerOf(line);
  return found !== null && found.kind === first.kind && !isRule(line);
}

function itemOf(lines, depth) {
  const task = /^\[([ xX])\] /.exec(lines[0]);
  const inside = task ? [lines[0].slice(4), ...lines.slice(1)] : lines;
  return { checked: task ? task[1] !== " " : null, blocks: blocksOf(inside, depth + 1) };
}

/** Cells of a table row; `\|` is a bar inside a cell. */
function cellsOf(line) {
  let bare = line.trim();
  if (bare.startsWith("|")) bare = bare.slice(1);
  const cells = [];
  let start = 0;
  for (let at = 0; at < bare.length; at += 1) {
    if (bare[at] === "\\") {
      at += 1;
    } else if (bare[at] === "|") {
      cells.push(bare.slice(start, at));
      start = at + 1;
    }
  }
  if (start < bare.length) cells.push(bare.slice(start));
  return cells.map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function alignsOf(line) {
  if (!line.includes("-") || !line.includes("|") || /[^-|: \t]/.test(line)) return null;
  const cells = cellsOf(line);
  if (!cells.every((cell) => /^:?-+:?$/.test(cell))) return null;
  return cells.map((cell) => {
    const left = cell.startsWith(":");
    if (cell.endsWith(":")) return left ? "center" : "right";
    return left ? "left" : null;
  });
}

/** Alignments of the columns if a table begins here, else null. */
function tableAt(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|")) return null;
  const aligns = alignsOf(lines[at + 1]);
  return aligns !== null && cellsOf(lines[at]).length === aligns.length ? aligns : null;
}

function readTable(lines, at) {
  const aligns = tableAt(lines, at);
  if (aligns === null) return null;
  const rows = [];
  let next = at + 2;
  for (; next < lines.length && !isBlank(lines[next]) && lines[next].includes("|"); next += 1) {
    rows.push(cellsOf(lines[next]).slice(0, aligns.length));
  }
  return { block: { type: "table", head: cellsOf(lines[at]), aligns, rows }, next };
}

/** Whether a block begins at this line even without an empty line before it. */
function interrupts(lines, at, depth) {
  const line = lines[at];
  if (fenceOf(line) || readHeading(lines, at) || isRule(line) || tableAt(lines, at)) return true;
  if (depth >= BLOCK_DEPTH) return false;
  const marker = markerOf(line);
  const begins = marker && marker.indent < 4 && marker.text !== "" && (marker.number ?? 1) === 1;
  return isQuote(line) || Boolean(begins);
}

function readParagraph(lines, at, depth) {
  let next = at + 1;
  while (next < lines.length && !isBlank(lines[next]) && !interrupts(lines, next, depth)) next += 1;
  const text = lines
    .slice(at, next)
    .map((line) => line.trim())
    .join("\n");
  return { block: { type: "paragraph", text }, next };
}

/** Frames of marks that are open, from the outside in. The first one is the text itself. */
class Frames {
  constructor() {
    this.all = [{ mark: "", children: [] }];
  }

  add(node) {
    if (node.type !== "text" || node.text !== "") this.all.at(-1).children.push(node);
  }

  open(mark) {
    if (this.all.length > OPEN_MARKS) this.settle(1); // the one that has waited longest is plain text
    this.all.push({ mark, children: [] });
  }

  /** Turn an open mark back into the text that it is. What is open inside it moves outwards. */
  settle(place) {
    const [frame] = this.all.splice(place, 1);
    const outer = this.all[place - 1].children;
    outer.push({ type: "text", text: frame.mark });
    for (const child of frame.children) outer.push(child);
  }

  /** The children of an open mark, which is closed; marks that are still open inside it become text. */
  close(place) {
    while (this.all.length - 1 > place) this.settle(this.all.length - 1);
    return this.all.pop().children;
  }

  /** The innermost open frame with one of these marks, not beyond an open bracket; -1 if there is none. */
  find(marks) {
    for (let place = this.all.length - 1; place > 0; place -= 1) {
      const { mark, children } = this.all[place];
      if (marks.includes(mark) && (children.length > 0 || place < this.all.length - 1)) return place;
      if (mark === "[" || mark === "![") return -1;
    }
    return -1;
  }

  findBracket() {
    return this.all.findLastIndex(({ mark }) => mark === "[" || mark === "![");
  }
}

const WRAPS = { "*": "em", _: "em", "**": "strong", __: "strong", "~~": "del" };

/**
 * What is inside a paragraph, heading or cell: nodes of type text, break, code, em, strong, del and link.
 * With `growing` the text may go on: bold that is not closed yet is shown as bold.
 */
export function inline(text, growing = false) {
  const frames = new Frames();
  const ticks = tickRuns(text);
  const special = /[\\`*_~[\]!\n]/g;
  let start = 0;
  const flush = (end) => {
    frames.add({ type: "text", text: text.slice(start, end) });
  };
  for (let found = special.exec(text); found; found = special.exec(text)) {
    const at = found.index;
    const step = readSpecial(text, at, frames, ticks, () => flush(at));
    if (step === 0) continue; // an ordinary character after all
    start = at + step;
    special.lastIndex = start;
  }
  flush(text.length);
  while (frames.all.length > 1) {
    const last = frames.all.at(-1);
    if (growing && last.mark === "**" && last.children.length > 0) {
      frames.add({ type: "strong", children: frames.close(frames.all.length - 1) });
    } else {
      frames.settle(frames.all.length - 1);
    }
  }
  return frames.all[0].children;
}

/** Reads what begins at a special character, after `flush` of the text before it. Gives the characters read, or 0. */
function readSpecial(text, at, frames, ticks, flush) {
  switch (text[at]) {
    case "\n":
      flush();
      frames.add({ type: "break" });
      return 1;
    case "\\":
      if (at + 1 >= text.length || !/[!-/:-@[-`{-~]/.test(text[at + 1])) return 0;
      flush();
      frames.add({ type: "text", text: text[at + 1] });
      return 2;
    case "`":
      return readCode(text, at, frames, ticks, flush);
    case "!":
      if (text[at + 1] !== "[") return 0;
      flush();
      frames.open("![");
      return 2;
    case "[":
      flush();
      frames.open("[");
      return 1;
    case "]":
      flush();
      return readLink(text, at, frames);
    default:
      flush();
      return readMarks(text, at, frames);
  }
}

/** Start of every run of backticks, by length, in order: a code span ends at the next run as long as its first. */
function tickRuns(text) {
  const runs = new Map();
  for (const { 0: run, index } of text.matchAll(/`+/g)) {
    if (!runs.has(run.length)) runs.set(run.length, { starts: [], next: 0 });
    runs.get(run.length).starts.push(index);
  }
  return runs;
}

function runLength(text, at) {
  let end = at + 1;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

function readCode(text, at, frames, ticks, flush) {
  const length = runLength(text, at);
  const runs = ticks.get(length);
  // After an escaped backtick a run is shorter than it was counted; it then matches nothing.
  while (runs && runs.next < runs.starts.length && runs.starts[runs.next] <= at) runs.next += 1;
  flush();
  const end = runs?.starts[runs.next];
  if (end === undefined) {
    frames.add({ type: "text", text: text.slice(at, at + length) });
    return length;
  }
  let code = text.slice(at + length, end).replaceAll("\n", " ");
  if (code.startsWith(" ") && code.endsWith(" ") && code.trim() !== "") code = code.slice(1, -1);
  frames.add({ type: "code", text: code });
  return end + length - at;
}

function readMarks(text, at, frames) {
  const sign = text[at];
  const length = runLength(text, at);
  const literal = () => {
    frames.add({ type: "text", text: sign.repeat(length) });
    return length;
  };
  if (length > 3 || (sign === "~" && length !== 2)) return literal();
  const { opens, closes } = flanks(text, at, length);
  let left = length;
  while (closes && left > 0) {
    const marks = left > 1 && sign !== "~" ? [sign + sign, sign] : left > 1 ? [sign + sign] : [sign];
    const place = frames.find(marks);
    if (place < 0) break;
    const { mark } = frames.all[place];
    frames.add({ type: WRAPS[mark], children: frames.close(place) });
    left -= mark.length;
  }
  if (left === 0) return length;
  if (!opens) {
    frames.add({ type: "text", text: sign.repeat(left) });
    return length;
  }
  if (left % 2 === 1) frames.open(sign);
  if (left > 1) frames.open(sign + sign);
  return length;
}

/** Whether marks can open or close: they lean against text, and underscores never inside a word. */
function flanks(text, at, length) {
  const before = text[at - 1] ?? " ";
  const after = text[at + length] ?? " ";
  const left = !SPACE.test(after) && (!PUNCTUATION.test(after) || SPACE.test(before) || PUNCTUATION.test(before));
  const right = !SPACE.test(before) && (!PUNCTUATION.test(before) || SPACE.test(after) || PUNCTUATION.test(after));
  if (text[at] !== "_") return { opens: left, closes: right };
  return {
    opens: left && (!right || PUNCTUATION.test(before)),
    closes: right && (!left || PUNCTUATION.test(after)),
  };
}

function readLink(text, at, frames) {
  const place = frames.findBracket();
  if (place < 0) {
    frames.add({ type: "text", text: "]" });
    return 1;
  }
  const target = text[at + 1] === "(" ? readAddress(text, at + 2) : null;
  if (target === null) {
    while (frames.all.length > place) frames.settle(frames.all.length - 1);
    frames.add({ type: "text", text: "]" });
    return 1;
  }
  const image = frames.all[place].mark === "![";
  frames.add({ type: "link", address: target.address, image, children: frames.close(place) });
  return target.end - at;
}

/** The address from after `(` to `)`, with an optional title, which is dropped. */
function readAddress(text, start) {
  const limit = Math.min(text.length, start + ADDRESS_CHARACTERS);
  let at = start;
  let depth = 0;
  for (; at < limit && !SPACE.test(text[at]) && text[at] !== "["; at += 1) {
    if (text[at] === "(") depth += 1;
    if (text[at] === ")") {
      if (depth === 0) break;
      depth -= 1;
    }
    if (depth > 3) return null;
  }
  const address = text.slice(start, at).replace(/^<(.*)>$/, "$1");
  if (text[at] === ")") return { address, end: at + 1 };
  if (text[at] !== " " || at >= limit) return null;
  const title = /^ +(?:"[^"[]*"|'[^'[]*') *\)/.exec(text.slice(at, at + 200));
  return title ? { address, end: at + title[0].length } : null;
}
