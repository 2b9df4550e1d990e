"""A grammar in the library's language, and how the parts of one are written there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Kind", "Source", "json_grammar", "lark_grammar"]

Kind = Literal["schema", "regex", "grammar", "choice"]

# The library would otherwise choose the tokens of text that can be written in one way only; the model does that better.
_OPTION = '\n%llguidance {"no_forcing": true}\n'
_OPTIONS = {
    "coerce_one_of": False,
    "lenient": False,
    # With one way to write each character, no name of a member can be hidden behind an escape.
    "json_allowed_escapes": 'nrbtf\\"',
}


@dataclass(frozen=True, slots=True)
class Source:
    """A grammar that has not been compiled. ``kind`` and ``param`` say what a client gave, and where."""

    text: str
    kind: Kind
    param: str


def json_grammar(schema: dict[str, Any], *, space: str) -> str:
    """The grammar of JSON texts that a checked schema allows, with ``space`` (a pattern) between their parts.

    There is none before and after the text.
    """
    options = {**_OPTIONS, "whitespace_pattern": space}
    return lark_grammar("start: %json " + json.dumps({**schema, "x-guidance": options}))


def lark_grammar(rules: str) -> str:
    """A grammar from rules in the library's dialect of Lark."""
    return rules + _OPTION  # behind them, so that messages tell the lines of the rules
