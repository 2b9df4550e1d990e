// The official JavaScript client against a server: node openai.mjs http://127.0.0.1:8000, after npm install openai.

import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2] ?? "http://127.0.0.1:8000"}/v1`, apiKey: "none", maxRetries: 0 });
const model = "embedded";

// Models.
for await (const each of client.models.list()) console.log("model:", each.id);

// An answer, whole and streamed.
const messages = [{ role: "user", content: "When does breakfast start?" }];
const whole = await client.chat.completions.create({ model, messages, temperature: 0 });
console.log("whole:", whole.choices[0].message.content);
let text = "";
let pieces = 0;
for await (const chunk of await client.chat.completions.create({ model, messages, temperature: 0, stream: true })) {
  text += chunk.choices[0].delta.content ?? "";
  pieces += 1;
}
console.log("streamed:", text, pieces > 3 ? "in pieces" : "at once");

// A function: the helper calls it and sends back what it returned.
const book_bike = ({ days, date }) => {
  console.log("called:", days, date);
  return { status: "full", next_date: "2026-07-16" };
};
const parameters = {
  type: "object",
  properties: { days: { type: "integer" }, date: { type: "string" } },
  required: ["days", "date"],
};
const runner = client.chat.completions.runTools({
  model,
  messages: [{ role: "user", content: "Could you reserve a bike for 8 days on 2026-05-20, please?" }],
  temperature: 0,
  tools: [
    {
      type: "function",
      function: { function: book_bike, parse: JSON.parse, name: "book_bike", description: "Book a bike", parameters },
    },
  ],
});
console.log("answered:", await runner.finalContent());

// An answer in a form.
const schema = {
  type: "object",
  properties: { name: { type: "string" }, room: { type: "integer" } },
  required: ["name", "room"],
  additionalProperties: false,
};
const formed = await client.chat.completions.create({
  model,
  messages: [
    {
      role: "user",
      content: `Turn this text into JSON.\n\nSchema: ${JSON.stringify(schema)}\n\nMy name is Eva Novak. It is room 12.`,
    },
  ],
  temperature: 0,
  response_format: { type: "json_schema", json_schema: { name: "guest", schema, strict: true } },
});
console.log("formed:", Object.keys(JSON.parse(formed.choices[0].message.content)).join(" "));

// Errors have a code and name the field.
try {
  await client.chat.completions.create({ model, messages, store: true });
} catch (error) {
  console.log("refused:", error.status, error.code, error.param);
}
