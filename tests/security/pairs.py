"""Rows of requests in which every pair of values of any two fields occurs, and the rules that some pairs break."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Body = dict[str, Any]
USER = {"role": "user", "content": "When does breakfast start?"}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "book_bike", "arguments": '{"days": 8}'}}
SCHEMA: Body = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS: list[Body] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Book a bike",
            "parameters": {"type": "object", "properties": {"days": {"type": "integer"}}},
        },
    }
    for name in ("book_bike", "book_boat")
]
PATTERN = "[a-c]{1,3}"
CHOICES = ["yes", "no"]


def _each(name: str, *values: Any) -> list[Body]:
    """The field with each of these values, and left out."""
    return [{}, *({name: value} for value in values)]


_FORMS: list[Body] = [
    {"type": "text"},
    {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}},
    {"type": "regex", "regex": PATTERN},
    {"type": "grammar", "grammar": {"syntax": "lark", "definition": 'start: "a" | "b" start'}},
    {"type": "choice", "choice": CHOICES},
]
_SHARED: dict[str, list[Body]] = {
    "min_tokens": _each("min_tokens", 0, 1),
    "ignore_eos": _each("ignore_eos", False, True),
    "temperature": _each("temperature", 0, 0.001, 2),
    "top_p": _each("top_p", 0, 0.5, 1),
    "top_k": _each("top_k", -1, 1, 32_768),
    "min_p": _each("min_p", 0, 0.1, 1),
    "presence_penalty": _each("presence_penalty", -2, 2),
    "frequency_penalty": _each("frequency_penalty", -2, 2),
    "repetition_penalty": _each("repetition_penalty", 0.5, 2),
    "logit_bias": _each("logit_bias", {}, {"2": -100, "5": 100}, {str(id): -100 for id in range(1000, 2000)}),
    "seed": _each("seed", -(2**63), 0, 2**63 - 1),
    "stop": _each("stop", [], "e", ["\n", "z" * 512]),
    "stream": [{}, {"stream": False}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}],
    "names": [{}, {"user": "ann", "safety_identifier": "a" * 128}],
    "prompt_cache_key": _each("prompt_cache_key", "desk"),
    "priority": _each("priority", -(2**31 - 1), 2**31 - 1),
    "mixtral": _each(
        "mixtral", {"routing": "counts"}, {"routing": "experts", "prompt": True}, {"routing": "weights", "layers": [0]}
    ),
    "response_format": _each("response_format", *_FORMS),
}
CHAT: dict[str, list[Body]] = {
    "messages": [
        {"messages": [USER]},
        {"messages": [{"role": "system", "content": "Be short."}, USER, {"role": "assistant", "content": "Hm."}, USER]},
        {"messages": [USER, {"role": "assistant", "content": "At", "prefix": True}]},
        {
            "messages": [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "abcdefghi", "content": "full"},
            ]
        },
    ],
    "length": [{"max_tokens": 12}, {"max_completion_tokens": 12}, {"max_tokens": 1}],
    "n": _each("n", 1, 3),
    "functions": [
        {},
        {"tools": []},
        {"tools": TOOLS},
        {"tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": False},
        *({"tools": TOOLS, "tool_choice": choice} for choice in ("none", "required", "any")),
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "book_boat"}}},
    ],
    "logprobs": [{}, {"logprobs": False}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 20}],
    **_SHARED,
}
COMPLETIONS: dict[str, list[Body]] = {
    "prompt": [{"prompt": value} for value in ("The castle", "", ["a", "b"], [1, 5, 6], [[1, 5], [7]])],
    "echo": [
        *({"max_tokens": 12}, {"max_tokens": 1, "echo": False}, {"max_tokens": 12, "echo": True}),
        {"max_tokens": 0, "echo": True},
    ],
    "n": [{}, {"n": 2}, {"n": 2, "best_of": 2}],
    "logprobs": _each("logprobs", 0, 5),
    **_SHARED,
}
TABLES = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETIONS}


@dataclass(frozen=True)
class Rule:
    """Two things that do not go together, and the field that the refusal names."""

    one: Callable[[Body], Any]
    other: Callable[[Body], Any]
    param: str

    def broken(self, body: Body) -> bool:
        """Whether a request has both."""
        return bool(self.one(body) and self.other(body))


def _form(body: Body) -> bool:
    return (body.get("response_format") or {}).get("type", "text") != "text"


def _forced(body: Body) -> bool:
    return body.get("tool_choice") not in (None, "auto", "none")


def _calls(body: Body) -> bool:
    return bool(body.get("tools")) and body.get("tool_choice") != "none"


def _continued(body: Body) -> bool:
    return bool(body.get("messages")) and body["messages"][-1]["role"] == "assistant"


def _routed(body: Body) -> bool:
    return (body.get("mixtral") or {}).get("routing", "none") != "none"


RULES = (
    Rule(lambda body: body.get("min_tokens"), _form, "min_tokens"),
    Rule(lambda body: body.get("min_tokens"), _calls, "min_tokens"),
    Rule(lambda body: body.get("min_tokens"), lambda body: body.get("max_tokens") == 0, "min_tokens"),
    Rule(lambda body: body.get("ignore_eos"), _form, "ignore_eos"),
    Rule(lambda body: body.get("ignore_eos"), _calls, "ignore_eos"),
    Rule(lambda body: body.get("stop"), _form, "stop"),
    Rule(lambda body: body.get("max_tokens") == 0, _routed, "mixtral.routing"),
    Rule(_form, _forced, "tool_choice"),
    Rule(_continued, _forced, "tool_choice"),
    Rule(_continued, _form, "response_format"),
    Rule(lambda body: body.get("echo"), lambda body: body.get("stream"), "echo"),
)


def broken(body: Body) -> list[Rule]:
    """The rules that a request breaks."""
    return [rule for rule in RULES if rule.broken(body)]


def merged(parts: Sequence[Body]) -> Body:
    """One request of these fields."""
    return {name: value for part in parts for name, value in part.items()}


def good_rows(table: dict[str, list[Body]]) -> list[tuple[int, ...]]:
    """Rows of places in the table: each pair of values that breaks no rule is in one of them.

    Greedy: a row begins with a pair that is missing, and each further column takes what brings most missing pairs.
    """
    columns = list(table.values())
    places = [(column, place) for column, values in enumerate(columns) for place in range(len(values))]
    pairs = [pair for pair in itertools.combinations(places, 2) if pair[0][0] != pair[1][0]]
    friends = {pair for pair in pairs if not broken(merged([columns[column][place] for column, place in pair]))}
    missing, rows = dict.fromkeys(pair for pair in pairs if pair in friends), []
    while missing:
        row = dict(next(iter(missing)))
        for column in range(len(columns)):
            if column not in row:
                row[column] = max(
                    range(len(columns[column])), key=lambda place: _worth((column, place), row, friends, missing)
                )
        for pair in itertools.combinations(sorted(row.items()), 2):
            missing.pop(pair, None)
        rows.append(tuple(row[column] for column in range(len(columns))))
    return rows


def _worth(one: tuple[int, int], row: dict[int, int], friends: set[Any], missing: dict[Any, None]) -> int:
    """Missing pairs that a value brings to a row; -1 if it breaks a rule with what is there."""
    pairs = [tuple(sorted((one, other))) for other in row.items()]
    return sum(pair in missing for pair in pairs) if all(pair in friends for pair in pairs) else -1


def bodies(table: dict[str, list[Body]]) -> Iterator[Body]:
    """The requests of the rows."""
    for row in good_rows(table):
        yield merged([column[place] for column, place in zip(table.values(), row, strict=True)])


def missing_pairs(table: dict[str, list[Body]], rows: Sequence[tuple[int, ...]]) -> list[str]:
    """Pairs that break no rule and are in no row."""
    columns = list(table.items())
    found = []
    for (left, (name, ones)), (right, (other, others)) in itertools.combinations(enumerate(columns), 2):
        seen = {(row[left], row[right]) for row in rows}
        for place, place2 in itertools.product(range(len(ones)), range(len(others))):
            if (place, place2) not in seen and not broken(merged([ones[place], others[place2]])):
                found.append(f"{name} {json.dumps(ones[place])[:80]} with {other} {json.dumps(others[place2])[:80]}")
    return found


def bad_bodies(table: dict[str, list[Body]]) -> Iterator[tuple[Body, Rule]]:
    """For each rule, requests that break it and no other, with nothing else in them."""
    base = merged([column[0] for column in table.values()])
    for (_, ones), (_, others) in itertools.combinations(table.items(), 2):
        for one, other in itertools.product(ones, others):
            body = base | one | other
            rules = broken(body)
            if len({rule.param for rule in rules}) == 1 and not broken(base | one) and not broken(base | other):
                yield body, rules[0]
