// JSON that a person types: read with an explanation of what is wrong, for function schemas and answer schemas.

const FUNCTION_NAME = /^[a-zA-Z0-9_-]{1,64}$/;

/** `{ value }`, or `{ problem }`: what is wrong and where. */
export function readJson(text) {
  try {
    return { value: JSON.parse(text), problem: null };
  } catch (error) {
    return { problem: explain(text, error.message) };
  }
}

function explain(text, message) {
  const place = /position (\d+)/.exec(message);
  if (!place || message.includes("line ")) return `Not JSON: ${message}`;
  const before = text.slice(0, Number(place[1])).split("\n");
  return `Not JSON: ${message} (line ${before.length} column ${before.at(-1).length + 1})`;
}

/** A JSON schema that describes an object, as it is needed for the arguments of a function. */
export function readParameters(text) {
  if (text.trim() === "") return { value: { type: "object", properties: {} }, problem: null };
  const read = readSchema(text);
  if (read.problem) return read;
  if (read.value.type !== "object")
    return { problem: 'The arguments of a function are an object: "type" must be "object".' };
  return read;
}

/** A JSON schema. The server says which keywords it knows. */
export function readSchema(text) {
  if (text.trim() === "") return { problem: "Write a JSON schema." };
  const read = readJson(text);
  if (read.problem) return read;
  const { value } = read;
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    return { problem: "A JSON schema is an object: it begins with { and ends with }." };
  }
  return read;
}

/** What is wrong with a function: `{ name, parameters }`, each a message or null. */
export function toolProblems(tool, tools) {
  let name = null;
  if (!FUNCTION_NAME.test(tool.name)) {
    name = "A name has 1 to 64 letters, digits, - or _.";
  } else if (tools.some((other) => other !== tool && other.enabled && other.name === tool.name)) {
    name = "Another function has this name.";
  }
  return { name, parameters: readParameters(tool.parameters).problem };
}

/** Stop strings as lines: a line break, a tab and a backslash inside one are written \n, \t and \\. */
export function stopLines(stop) {
  const signs = { "\\": "\\\\", "\n": "\\n", "\t": "\\t" };
  return stop.map((text) => text.replace(/[\\\n\t]/g, (sign) => signs[sign])).join("\n");
}

/** The stop strings that lines spell. */
export function readStops(lines) {
  const signs = { "\\\\": "\\", "\\n": "\n", "\\t": "\t" };
  return lines
    .split("\n")
    .filter((line) => line !== "")
    .map((line) => line.replace(/\\[\\nt]/g, (sign) => signs[sign]));
}
