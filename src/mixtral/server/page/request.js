// From a conversation to the body of a request, and what stands in the way of one.

import { readParameters, readSchema, toolProblems } from "./schema.js";
import { NUMBERS } from "./store.js";

/** Whether the calls of an answer can get results: it is whole, and the model meant to call. */
export function isAnswerable(message) {
  return message.calls.length > 0 && message.error === null && !["length", "stopped"].includes(message.finish);
}

/** The last message, if it has calls whose results are still to come; else null. */
export function waitingCalls(conversation) {
  const last = conversation.messages.at(-1);
  const waits = last?.role === "assistant" && isAnswerable(last) && last.calls.some(({ result }) => result === null);
  return waits ? last : null;
}

/** What keeps these settings from being sent: `{ where, message }`, `where` names the part of the settings; or null. */
export function problemOf(settings) {
  for (const [place, tool] of settings.tools.entries()) {
    if (!tool.enabled) continue;
    const { name, parameters } = toolProblems(tool, settings.tools);
    const message = name ?? parameters;
    if (message)
      return { where: `tool-${place}-${name ? "name" : "parameters"}`, message: `Function ${place + 1}: ${message}` };
  }
  if (settings.format === "json_schema") {
    const { problem } = readSchema(settings.schema);
    if (problem) return { where: "schema", message: `Answer format: ${problem}` };
  }
  if (settings.format === "regex" && settings.regex === "") {
    return { where: "regex", message: "Answer format: write a regular expression." };
  }
  return null;
}

function formatOf({ format, schema, regex }) {
  if (format === "json_schema") {
    return { type: "json_schema", json_schema: { name: "answer", schema: readSchema(schema).value } };
  }
  if (format === "regex") return { type: "regex", regex };
  return { type: format };
}

function toolsOf(settings) {
  const tools = settings.tools
    .filter(({ enabled }) => enabled)
    .map(({ name, description, parameters }) => ({
      type: "function",
      function: { name, description, parameters: readParameters(parameters).value },
    }));
  if (tools.length === 0) return {};
  const { tool_choice: choice } = settings;
  const named = choice.startsWith("=");
  return { tools, tool_choice: named ? { type: "function", function: { name: choice.slice(1) } } : choice };
}

/** The messages of the API. An answer with calls counts once each of them has a result; an empty one never does. */
export function messagesOf({ settings, messages }) {
  const made = settings.system.trim() ? [{ role: "system", content: settings.system.trim() }] : [];
  for (const message of messages) {
    if (message.role === "user") {
      made.push({ role: "user", content: message.content });
    } else if (isAnswerable(message) && message.calls.every(({ result }) => result !== null)) {
      const calls = message.calls.map(({ id, name, arguments: text }) => ({
        id,
        type: "function",
        function: { name, arguments: text },
      }));
      made.push({ role: "assistant", tool_calls: calls });
      for (const { id, name, result } of message.calls) {
        made.push({ role: "tool", tool_call_id: id, name, content: result });
      }
    } else if (message.content !== "" && message.calls.length === 0) {
      made.push({ role: "assistant", content: message.content });
    }
  }
  return made;
}

/**
 * The body of a streamed request for the next answer. With `continues` the last answer, a text, goes on as text: what
 * the settings say of forms and functions is for the next one. With `experts` the server is asked for the experts of
 * every token, and for log-probabilities, because they come with the tokens' texts.
 */
export function bodyOf(conversation, { model, experts, continues }) {
  const { settings } = conversation;
  const messages = messagesOf(conversation);
  if (continues) messages.at(-1).prefix = true;
  const body = { model, messages };
  for (const name of Object.keys(NUMBERS)) if (settings[name] !== null) body[name] = settings[name];
  if (settings.stop.length > 0) body.stop = settings.stop;
  if (!continues) {
    if (settings.format !== "text") body.response_format = formatOf(settings);
    Object.assign(body, toolsOf(settings));
  }
  if (experts) Object.assign(body, { logprobs: true, mixtral: { routing: "weights" } });
  return { ...body, stream: true, stream_options: { include_usage: true } };
}
