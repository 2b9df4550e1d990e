// Conversations as files: JSON, out and in, and Markdown, out.

import { Trace } from "./experts.js";
import { readConversation } from "./store.js";

const FORMAT = "mixtral-chat";
const VERSION = 1;

/** Conversations as JSON text, with the experts of answers as far as this page has them. */
export function toJson(conversations) {
  const listed = conversations.map((conversation) => ({
    ...conversation,
    messages: conversation.messages.map((message) =>
      message.experts ? { ...message, experts: message.experts.empty ? null : message.experts.data() } : message,
    ),
  }));
  return JSON.stringify({ format: FORMAT, version: VERSION, conversations: listed }, null, 1);
}

/** Conversations out of the text of a file. Throws an error that says what is wrong with it. */
export function fromJson(text) {
  let given;
  try {
    given = JSON.parse(text);
  } catch (error) {
    throw new TypeError(`The file is not JSON: ${error.message}`);
  }
  if (given?.format !== FORMAT || given.version !== VERSION || !Array.isArray(given.conversations)) {
    throw new TypeError(`The file is not an export of this page (format "${FORMAT}", version ${VERSION}).`);
  }
  return given.conversations.map((item, place) => {
    const conversation = readConversation(item, `conversations[${place}]`);
    for (const message of conversation.messages) if (message.experts) message.experts = Trace.fromData(message.experts);
    return conversation;
  });
}

/** A fence longer than any run of backticks inside. */
function fenced(language, text) {
  const longest = Math.max(0, ...[...text.matchAll(/`+/g)].map(([run]) => run.length));
  const fence = "`".repeat(Math.max(3, longest + 1));
  return `${fence}${language}\n${text}\n${fence}`;
}

function answerLines(message) {
  const lines = [];
  if (message.content) lines.push(message.format === "text" ? message.content : fenced("", message.content));
  for (const made of message.calls) {
    lines.push(`Call of \`${made.name}\`:`, fenced("json", made.arguments));
    if (made.result !== null) lines.push("Result:", fenced("", made.result));
  }
  if (message.error) lines.push(`Error: ${message.error.message}`);
  return lines;
}

/** One conversation as Markdown. */
export function toMarkdown(conversation) {
  const parts = [`# ${conversation.title}`];
  if (conversation.settings.system) parts.push("## Instructions", conversation.settings.system);
  for (const message of conversation.messages) {
    if (message.role === "user") parts.push("## You", message.content);
    else parts.push("## Mixtral", ...answerLines(message));
  }
  return `${parts.join("\n\n")}\n`;
}

/** A title as the name of a file. */
export function fileName(title, ending) {
  const safe =
    title
      .replace(/[^\p{L}\p{N} _-]+/gu, "")
      .trim()
      .slice(0, 60) || "chat";
  return `${safe}.${ending}`;
}
