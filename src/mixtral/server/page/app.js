// The chat page: connects conversations, settings, answers and the server.

import { newAnswer, Run } from "./chat.js";
import { Connection } from "./connection.js";
import { byId, fitHeight, saveFile } from "./dom.js";
import { showExamples } from "./examples.js";
import { AnswerView, UserView } from "./messages.js";
import { closeMenus, Panels } from "./panels.js";
import { problemOf, waitingCalls } from "./request.js";
import { SettingsPanel } from "./settings.js";
import { showConversations } from "./sidebar.js";
import { newConversation, Store, titleOf } from "./store.js";
import { fileName, fromJson, toJson, toMarkdown } from "./transfer.js";

let undo = null; // puts back what was deleted last
let trouble = null; // what the store reported before there was anybody to see it
let running = null; // the Run of the answer that is being written
const store = new Store(
  () => window.localStorage,
  (problem) => {
    trouble = problem;
    setStatus(problem);
  },
);
const server = new Connection();
let conversations = store.all();
let current = newConversation(store.settings() ?? undefined);
let views = []; // of the messages of `current`, in their order

const panels = new Panels(() => settingsPanel.fit());
const settingsPanel = new SettingsPanel(() => keepSettings());

function setStatus(text, undoing = null) {
  undo = undoing;
  byId("status-text").textContent = text;
  byId("undo").hidden = undo === null;
}

/** Settings that were changed, for this conversation and for those that will be begun. */
function keepSettings() {
  if (isKept(current)) save(current);
  store.keepSettings(current.settings);
}

/** A conversation is kept, and listed, once something was said in it. */
function isKept(conversation) {
  return conversations.includes(conversation);
}

function save(conversation) {
  store.save(conversation);
  conversations.sort((one, other) => other.updated - one.updated);
  showConversations(conversations, current, choose);
}

function touch(conversation) {
  if (!isKept(conversation)) conversations.push(conversation);
  conversation.updated = Date.now();
  save(conversation);
}

// What is shown

function refresh() {
  const busy = running !== null;
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  byId("send").disabled = !server.isReady || byId("prompt").value.trim() === "";
  byId("welcome").hidden = current.messages.length > 0;
  byId("unanswered").hidden = busy || current.messages.at(-1)?.role !== "user";
  byId("title").textContent = current.title;
  document.title = current.title === "New chat" ? "Mixtral" : `${current.title} · Mixtral`;
  byId("messages").classList.toggle("busy", busy && running.conversation === current);
}

/** Do something that makes the conversation longer, and stay at its end unless the reader has scrolled up. */
function atEnd(grow) {
  const main = byId("main");
  const below = main.scrollHeight - main.scrollTop - main.clientHeight;
  grow();
  if (below < 80) main.scrollTop = main.scrollHeight;
}

function viewOf(message) {
  const owner = current;
  const place = () => owner.messages.indexOf(message);
  if (message.role === "user") {
    return new UserView(message, {
      edit: (text) => editTurn(owner, place(), text),
      remove: () => removeTurn(owner, place()),
    });
  }
  const view = new AnswerView(message, {
    regenerate: () => regenerate(owner, place()),
    proceed: () => proceed(owner, place()),
    remove: () => removeFrom(owner, place(), place() + 1, "Answer deleted"),
    results: () => {
      touch(owner);
      generate(owner);
    },
  });
  // What a text grows by arrives between frames: stay at its end.
  const { update } = view;
  view.update = (statistics) => atEnd(() => update.call(view, statistics));
  return view;
}

function addView(message) {
  const view = viewOf(message);
  views.push(view);
  byId("messages").append(view.element);
  return view;
}

function showMessages() {
  views = [];
  byId("messages").replaceChildren();
  for (const message of current.messages) {
    const view = addView(message);
    if (running?.message === message) {
      running.view = view;
      view.begin();
    } else if (message.role === "assistant") {
      view.finish();
    }
  }
  if (running && running.conversation !== current) running.view = null;
  refresh();
}

function showCurrent() {
  closeMenus();
  settingsPanel.show(current.settings);
  showModels();
  showMessages();
  showConversations(conversations, current, choose);
  byId("main").scrollTop = byId("main").scrollHeight;
}

function choose(conversation) {
  current = conversation;
  panels.leaveSidebar();
  setStatus(running ? `Answering in “${running.conversation.title}”` : "Ready");
  showCurrent();
  byId("prompt").focus();
}

// Turns of a conversation

/** Remove messages of a conversation; they can be put back. */
function removeFrom(conversation, from, to, label) {
  if (running?.conversation === conversation) running.stop();
  const before = [...conversation.messages];
  conversation.messages.splice(from, to - from);
  touch(conversation);
  if (conversation === current) showMessages();
  setStatus(label, () => {
    if (running?.conversation === conversation) running.stop();
    conversation.messages = before;
    touch(conversation);
    if (conversation === current) showMessages();
  });
}

/** The end of the exchange that begins with the question at `from`. */
function turnEnd({ messages }, from) {
  const next = messages.findIndex((message, place) => place > from && message.role === "user");
  return next < 0 ? messages.length : next;
}

function removeTurn(conversation, place) {
  removeFrom(conversation, place, turnEnd(conversation, place), "Question and answer deleted");
}

function editTurn(conversation, place, text) {
  if (running || !checkSettings()) return;
  removeFrom(conversation, place, conversation.messages.length, "Edited; what came after was replaced");
  ask(conversation, text, undo);
}

function regenerate(conversation, place) {
  if (running || !checkSettings()) return;
  removeFrom(conversation, place, conversation.messages.length, "The former answer was replaced");
  generate(conversation, { undoing: undo });
}

function proceed(conversation, place) {
  if (running || !checkSettings({ continues: true })) return;
  if (place < conversation.messages.length - 1) removeFrom(conversation, place + 1, conversation.messages.length, "");
  generate(conversation, { continues: true });
}

function ask(conversation, text, undoing = null) {
  const message = { role: "user", content: text };
  conversation.messages.push(message);
  if (!conversation.named && conversation.messages.length === 1) conversation.title = titleOf(text);
  touch(conversation);
  if (conversation === current) addView(message);
  generate(conversation, { undoing });
}

/** Whether the settings can be sent; if not, the place that is wrong is shown. A text that goes on has no form. */
function checkSettings({ continues = false } = {}) {
  const wrong = settingsPanel.wrongNumber();
  const problem = wrong
    ? { where: wrong.id, message: `Wrong value for ${wrong.labels[0].firstChild.textContent}` }
    : continues
      ? null
      : problemOf(current.settings);
  if (!problem) return true;
  panels.show("settings");
  const field = byId(problem.where);
  field.closest("details").open = true;
  field.scrollIntoView({ block: "center" });
  field.focus();
  setStatus(problem.message);
  return false;
}

/** Ask for the next answer and show it while it is written. */
async function generate(conversation, { continues = false, undoing = null } = {}) {
  if (running || (conversation === current && !checkSettings({ continues }))) {
    refresh();
    return;
  }
  const message = continues ? conversation.messages.at(-1) : newAnswer(conversation.settings.format);
  if (!continues) conversation.messages.push(message);
  const run = new Run(conversation, message, {
    model: byId("model").value,
    key: server.key,
    server,
    continues,
    onStatus: (text) => {
      byId("status-text").textContent = text;
    },
  });
  running = run;
  if (conversation === current) {
    run.view = continues ? views.at(-1) : addView(message);
    run.view.begin();
    byId("main").scrollTop = byId("main").scrollHeight;
  }
  setStatus("Answering …", undoing);
  refresh();
  await run.follow();
  running = null;
  settle(run, undoing);
}

const ENDINGS = {
  length: "The answer was cut at the longest allowed length",
  stopped: "Stopped",
  tool_calls: "The model called a function: type what it returned",
};

function settle({ conversation, message, view }, undoing) {
  const { messages } = conversation;
  const empty = message.content === "" && message.calls.length === 0 && !message.error;
  const kept = messages.includes(message);
  if (empty && kept) messages.splice(messages.indexOf(message), 1);
  if (isKept(conversation)) touch(conversation);
  if (!kept) {
    refresh(); // it was deleted meanwhile; what deleted it has said so
    return;
  }
  if (conversation === current) {
    if (empty) showMessages();
    else atEnd(() => view.finish());
  }
  const ending = message.error ? "Failed" : (ENDINGS[message.finish] ?? "Ready");
  setStatus(empty && message.finish !== "stopped" ? "The model gave an empty answer" : ending, undoing);
  refresh();
  if (conversation !== current) return;
  if (waitingCalls(conversation)) view.calls.focus();
  else if (document.activeElement === document.body) byId("prompt").focus();
}

function send() {
  const text = byId("prompt").value.trim();
  if (text === "" || running || !server.isReady || !checkSettings()) return;
  if (waitingCalls(current)) {
    setStatus("The function calls above wait for their results");
    views.at(-1).calls.focus();
    return;
  }
  byId("prompt").value = "";
  fitHeight(byId("prompt"));
  ask(current, text);
}

// Conversations

function startChat() {
  choose(newConversation(current.settings));
}

function removeConversation() {
  const removed = current;
  if (!isKept(removed)) return;
  if (running?.conversation === removed) running.stop();
  conversations = conversations.filter((conversation) => conversation !== removed);
  store.remove(removed.id);
  choose(newConversation(removed.settings));
  setStatus(`“${removed.title}” deleted`, () => {
    conversations.push(removed);
    save(removed);
    choose(removed);
  });
}

function rename() {
  closeMenus();
  const field = byId("rename");
  field.value = current.title;
  field.hidden = false;
  byId("title").hidden = true;
  field.focus();
  field.select();
}

function endRename(keep) {
  const field = byId("rename");
  if (field.hidden) return;
  const title = field.value.trim();
  field.hidden = true;
  byId("title").hidden = false;
  if (keep && title !== "" && title !== current.title) {
    current.title = title;
    current.named = true;
    if (isKept(current)) save(current);
  }
  refresh();
}

function exportOne(kind) {
  closeMenus();
  if (kind === "md") saveFile(fileName(current.title, "md"), "text/markdown", toMarkdown(current));
  else saveFile(fileName(current.title, "json"), "application/json", toJson([current]));
}

async function importFile() {
  const [file] = byId("import-file").files;
  if (!file) return;
  try {
    const read = fromJson(await file.text());
    for (const conversation of read) {
      if (conversations.some(({ id }) => id === conversation.id)) conversation.id = newConversation().id;
      conversations.push(conversation);
      save(conversation);
    }
    if (read.length > 0) choose(read[0]);
    setStatus(`${read.length} ${read.length === 1 ? "conversation" : "conversations"} imported`);
  } catch (error) {
    setStatus(`Not imported: ${error.message}`);
  }
  byId("import-file").value = "";
}

// The server

function showModels() {
  server.showModels(current.settings.model);
  const { chosen } = server;
  byId("context").textContent = chosen ? `${chosen.max_model_len.toLocaleString("en")} tokens` : "";
  if (chosen) settingsPanel.limitTokens(chosen.max_model_len);
}

async function connect() {
  setStatus("Connecting …");
  byId("connect").hidden = true;
  const problem = await server.connect();
  showModels();
  setStatus(problem ? `No connection: ${problem.message}` : (trouble ?? "Ready"));
  trouble = null;
  byId("connect").hidden = problem === null;
  if (problem?.status === 401) {
    setStatus("This server asks for a key");
    panels.show("settings");
    byId("key").closest("details").open = true;
    byId("key").focus();
  }
  refresh();
}

// Everything is bound once

function bindButtons() {
  const clicks = {
    send,
    stop: () => running?.stop(),
    "new-chat": startChat,
    undo: () => {
      const back = undo;
      setStatus("Put back");
      back?.();
      refresh();
    },
    "try-again": () => generate(current),
    "rename-chat": rename,
    "export-md": () => exportOne("md"),
    "export-json": () => exportOne("json"),
    "delete-chat": removeConversation,
    "export-all": () => saveFile("mixtral-chats.json", "application/json", toJson(conversations)),
    import: () => byId("import-file").click(),
    connect,
    help: () => byId("shortcuts").showModal(),
    "close-shortcuts": () => byId("shortcuts").close(),
  };
  for (const [id, work] of Object.entries(clicks)) byId(id).addEventListener("click", work);
  byId("import-file").addEventListener("change", importFile);
  byId("model").addEventListener("change", () => {
    current.settings.model = byId("model").value;
    keepSettings();
    showModels();
  });
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    server.key = byId("key").value.trim();
    connect();
  });
  byId("rename").addEventListener("blur", () => endRename(true));
  byId("rename").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.stopPropagation();
    endRename(event.key === "Enter");
  });
  byId("theme").value = store.choice("theme") ?? "auto";
  byId("theme").addEventListener("change", () => {
    document.documentElement.dataset.theme = byId("theme").value;
    store.choose("theme", byId("theme").value);
  });
}

function bindKeys() {
  const prompt = byId("prompt");
  prompt.addEventListener("input", () => {
    fitHeight(prompt);
    refresh();
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    } else if (event.key === "ArrowUp" && prompt.value === "" && !running) {
      event.preventDefault();
      views.findLast((view) => view instanceof UserView)?.edit();
    }
  });
  const shortcuts = {
    KeyN: startChat,
    KeyC: () => panels.toggle("sidebar"),
    KeyO: () => panels.toggle("settings"),
    KeyR: () => {
      const place = current.messages.length - 1;
      if (current.messages[place]?.role === "assistant") regenerate(current, place);
    },
    KeyK: () => byId("shortcuts").showModal(),
  };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.defaultPrevented) {
      if (closeMenus() || byId("shortcuts").open || panels.closeTop()) return;
      running?.stop();
    } else if (event.altKey && !event.ctrlKey && !event.metaKey && event.code in shortcuts) {
      event.preventDefault();
      shortcuts[event.code]();
    }
  });
}

/**
 * What another window of this page changed. Other conversations stay as they are, with experts and open editors; so
 * does the one that is shown, while an answer is written.
 */
function onStorage({ key }) {
  if (!Store.isConversation(key)) return;
  const shown = current.id;
  const mine = running ? [running.conversation, current] : [];
  const isChanged = ({ id }) => Store.isOf(key, id);
  const read = store.all().filter(isChanged);
  conversations = conversations.filter((conversation) => !isChanged(conversation));
  conversations.push(...read.map((changed) => mine.find(({ id }) => id === changed.id) ?? changed));
  conversations.sort((one, other) => other.updated - one.updated);
  const again = conversations.find(({ id }) => id === shown);
  if (again && again !== current) {
    current = again;
    showCurrent();
  } else {
    showConversations(conversations, current, choose);
  }
}

showExamples((text) => {
  byId("prompt").value = text;
  send();
});
bindButtons();
bindKeys();
window.addEventListener("storage", onStorage);
showCurrent();
connect();
