"""Random JSON schemas of the accepted kind, and random function definitions: equal seeds give equal ones."""

from __future__ import annotations

import random
from typing import Any

__all__ = ["random_schema", "random_tools"]

NAMES = [
    "a",
    "b",
    "name",
    "Größe",
    'q"uote',
    "back\\slash",
    "two words",
    "日本",
    "new\nline",
    "x/y",
    "$",
    "a.b",
    "😀",
    "id",
]
TEXTS = [
    "red",
    "green",
    "",
    "été",
    'say "hi"',
    "a\\b",
    "tab\there",
    "line\nbreak",
    "🙂",
    "<tag>",
    "[TOOL_CALLS]",
    " lead",
]
PATTERNS = [
    "^[a-c]{2,4}$", r"^\d{3}-\d{2}$", "x", r"^\w+@\w+\.(com|org)$", "^(ab|cd)*e?$", r"^\S+\s\S+$", "^.{0,3}$", "^[^x]y",
    r"[\w.-]+$", r"^\$\d+\.\d\d$", "^(?:yes|no)$", r"^[A-Z][a-z]*(?: [A-Z][a-z]*)?$", r"^\[\]\{\}\/$", "é", "^$|^a",
]  # fmt: skip
FORMATS = ["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"]
CONSTANTS: list[Any] = [None, True, False, 0, 7, -3, 1.5, -0.25, 10**6, [], [1, "a"], {}, {"k": [None]}, *TEXTS]


def random_schema(seed: int) -> dict[str, Any]:
    """A schema with up to four levels; it may have definitions, some of which are part of themselves."""
    rng = random.Random(seed)
    names = [f"def {number}" for number in range(rng.choice([0, 0, 0, 1, 2]))]
    schema = _Writer(rng, names).schema(3)
    if names:
        schema["$defs"] = {name: _Writer(rng, names, in_definition=True).schema(2) for name in names}
        schema.setdefault("title", "with definitions")
    return schema


def random_tools(seed: int) -> list[dict[str, Any]]:
    """One to four functions; the arguments of each are a random object."""
    rng = random.Random(seed)
    tools = []
    for number in range(rng.randint(1, 4)):
        function: dict[str, Any] = {"name": f"{rng.choice(['get', 'set-it', 'Do_2'])}{number}"}
        if rng.random() < 0.9:
            function["parameters"] = _Writer(rng, []).object(2)
        if rng.random() < 0.5:
            function["description"] = rng.choice(TEXTS)
        tools.append({"type": "function", "function": function})
    return tools


class _Writer:
    def __init__(self, rng: random.Random, names: list[str], *, in_definition: bool = False) -> None:
        self.rng = rng
        self.names = names
        # Inside a definition a reference stands only where a text can end without it.
        self.in_definition = in_definition

    def schema(self, depth: int, *, optional: bool = False) -> dict[str, Any]:
        kinds = [self.integer, self.number, self.string, self.constant, self.simple]
        if depth:
            kinds += [self.object, self.object, self.array, self.any_of, self.all_of, self.one_of]
        if self.names and (optional or not self.in_definition):
            kinds += [self.reference, self.reference]
        schema = self.rng.choice(kinds)(depth)
        if self.rng.random() < 0.2:
            schema[self.rng.choice(["title", "description", "$comment"])] = "a note"
        return schema

    def reference(self, _depth: int) -> dict[str, Any]:
        return {"$ref": "#/$defs/" + self.rng.choice(self.names).replace(" ", self.rng.choice([" ", "%20"]))}

    def simple(self, _depth: int) -> dict[str, Any]:
        kinds: list[Any] = [{"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"]}, {"type": "string"}, {}]
        return dict(self.rng.choice(kinds))

    def constant(self, _depth: int) -> dict[str, Any]:
        if self.rng.random() < 0.5:
            return {"const": self.rng.choice(CONSTANTS)}
        return {"enum": self.rng.sample(CONSTANTS, self.rng.randint(1, 5))}

    def integer(self, _depth: int) -> dict[str, Any]:
        low = self.rng.randint(-2000, 2000)
        schema: dict[str, Any] = {"type": "integer"}
        if self.rng.random() < 0.5:
            schema["minimum" if self.rng.random() < 0.5 else "exclusiveMinimum"] = low
        if self.rng.random() < 0.5:
            schema["maximum"] = low + self.rng.choice([20, 500, 10**6])
        if self.rng.random() < 0.2:
            schema["multipleOf"] = self.rng.choice([2, 3, 7, 10])
        return schema

    def number(self, _depth: int) -> dict[str, Any]:
        low = round(self.rng.uniform(-100, 100), self.rng.randint(0, 3))
        schema: dict[str, Any] = {"type": "number"}
        if self.rng.random() < 0.4:
            schema["minimum" if self.rng.random() < 0.5 else "exclusiveMinimum"] = low
        if self.rng.random() < 0.4:
            schema["maximum"] = round(low + self.rng.uniform(1, 50), 2)
        if self.rng.random() < 0.2:
            schema["multipleOf"] = self.rng.choice([0.5, 0.25, 0.1, 2])
        return schema

    def string(self, _depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "string"}
        kind = self.rng.random()
        if kind < 0.3:
            schema["pattern"] = self.rng.choice(PATTERNS)
        elif kind < 0.4:
            schema["format"] = self.rng.choice(FORMATS)
        elif kind < 0.8:
            schema["minLength"] = self.rng.randint(0, 5)
            if self.rng.random() < 0.7:
                schema["maxLength"] = schema["minLength"] + self.rng.randint(0, 10)
        return schema

    def array(self, depth: int) -> dict[str, Any]:
        least = self.rng.choice([0, 0, 1, 2])
        schema: dict[str, Any] = {"type": "array", "items": self.schema(depth - 1, optional=not least)}
        if least:
            schema["minItems"] = least
        if self.rng.random() < 0.5:
            schema["maxItems"] = least + self.rng.randint(0, 3)
        if self.rng.random() < 0.2:
            schema["prefixItems"] = [self.schema(depth - 1) for _ in range(self.rng.randint(1, 2))]
        return schema

    def object(self, depth: int) -> dict[str, Any]:
        names = self.rng.sample(NAMES, self.rng.randint(0, 4))
        required = [name for name in names if self.rng.random() < 0.5]
        properties = {name: self.schema(depth - 1, optional=name not in required) for name in names}
        schema: dict[str, Any] = {"type": "object", "properties": properties}
        if required:
            schema["required"] = self.rng.sample(required, len(required))
        kind = self.rng.random()
        if kind < 0.5:
            schema["additionalProperties"] = False
        elif kind < 0.7:
            schema["additionalProperties"] = self.schema(depth - 1, optional=True)
        if self.rng.random() < 0.1:
            schema["patternProperties"] = {"^p_[a-z]+$": self.schema(0, optional=True)}
        if len(required) == len(names) and self.rng.random() < 0.3:
            schema["maxProperties"] = len(required) + self.rng.randint(0, 2)
        if self.rng.random() < 0.1 and (names or kind >= 0.5) and "maxProperties" not in schema:
            schema["minProperties"] = max(1, len(required))
        return schema

    def any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.schema(depth - 1) for _ in range(self.rng.randint(1, 3))]}

    def all_of(self, depth: int) -> dict[str, Any]:
        if self.rng.random() < 0.5:
            return {
                "allOf": [{"type": "number", "minimum": self.rng.randint(-9, 0)}, {"maximum": self.rng.randint(1, 99)}]
            }
        first, second = self.object(depth - 1 or 1), {"type": "object", "properties": {"more": self.schema(0)}}
        return {"allOf": [first, second]} if first.get("additionalProperties") is not False else first

    def one_of(self, depth: int) -> dict[str, Any]:
        options = []
        for number in range(self.rng.randint(1, 3)):
            option = self.object(depth - 1 or 1)
            option["properties"] = {"kind": {"const": f"kind{number}"}, **option["properties"]}
            option["required"] = ["kind", *option.get("required", [])]
            for key in ("maxProperties", "minProperties"):
                option.pop(key, None)
            options.append(option)
        return {"oneOf": options}
