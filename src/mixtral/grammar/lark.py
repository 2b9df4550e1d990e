"""Grammars and regular expressions that a client writes: size, nesting, and what they may use."""

from __future__ import annotations

import re

import llguidance

from mixtral.errors import GrammarError
from mixtral.grammar.patterns import check_nesting
from mixtral.grammar.source import lark_grammar

__all__ = ["check_lark", "check_regex"]

REGEX_BYTES = 4 * 1024
LARK_BYTES = 32 * 1024
_REGEX_DEPTH = 32
_LARK_DEPTH = 64

_DIRECTIVE = re.compile(r"%\s*([A-Za-z_]+)")
_DIRECTIVES = ("ignore", "import")
# Named everywhere, in strings too: these change how the grammar is read, and no reading of strings is worth that risk.
_OPTIONS = re.compile(r"%\s*(?:llguidance|json|lark|regex|if)\b")
_ATTRIBUTES = re.compile(r"^[ \t]*[?!]?[A-Za-z_][\w-]*[ \t]*\[([^\[\]]*)\][ \t]*:", re.MULTILINE)
_ATTRIBUTE = re.compile(r"[A-Za-z_]+")
_KNOWN_ATTRIBUTES = frozenset({"capture", "lazy", "suffix"})


def check_regex(regex: object, where: str) -> str:
    """The grammar of the texts that a regular expression (syntax of Rust) matches as a whole.

    Raises:
        GrammarError: regex_invalid for what is no text or too long (what else is wrong, look-around and back-references
            too, is found when the grammar is tried); grammar_too_complex for one that nests too deep.
    """
    code = "regex_invalid"
    text = _text(regex, where, most=REGEX_BYTES, code=code)
    check_nesting(text, opening="([", most=_REGEX_DEPTH, where=where, code="grammar_too_complex")
    return lark_grammar(f"start: /{llguidance.regex_to_lark(text)}/")


def check_lark(definition: object, where: str) -> str:
    """The grammar that a client wrote in the library's dialect of Lark, with ``start`` as its first rule.

    Raises:
        GrammarError: grammar_invalid for what is no text, too long, or uses a directive other than %ignore and %import,
            a token by name or number, another grammar, or an attribute other than capture, lazy and suffix;
            grammar_too_complex for one that nests too deep.
    """
    code = "grammar_invalid"
    text = _text(definition, where, most=LARK_BYTES, code=code)
    check_nesting(text, opening="([{", most=_LARK_DEPTH, where=where, code="grammar_too_complex")
    bare = _names_and_signs(text)
    used = [match.group() for match in _OPTIONS.finditer(text)]
    used += [match.group() for match in _DIRECTIVE.finditer(bare) if match.group(1) not in _DIRECTIVES]
    used += [f"{sign} (tokens and grammars cannot be named)" for sign in "<@" if sign in bare]
    for listed in _ATTRIBUTES.findall(bare):
        used += [f"[{name}]" for name in _ATTRIBUTE.findall(listed) if name not in _KNOWN_ATTRIBUTES]
    if used:
        raise GrammarError(
            f"{where} uses {used[0]}; allowed are rules, terminals, %ignore, %import common, and the attributes "
            f"{', '.join(sorted(_KNOWN_ATTRIBUTES))}",
            param=where,
            code=code,
        )
    return lark_grammar(text)


def _names_and_signs(text: str) -> str:
    """The text without strings, regular expressions and comments. One pass, whatever is left open."""
    kept: list[str] = []
    closing, hidden = "", False  # of the part that is being left out: "\n" for a comment
    for place, character in enumerate(text):
        if closing:
            if character == "\n":
                closing = ""
                kept.append(character)
            elif hidden:
                hidden = False
            elif character == "\\":
                hidden = closing != "\n"
            elif character == closing:
                closing = ""
        elif character in '"/#':
            is_comment = character == "#" or text.startswith("//", place)
            closing, hidden = "\n" if is_comment else character, False
            kept.append(" ")
        else:
            kept.append(character)
    return "".join(kept)


def _text(value: object, where: str, *, most: int, code: str) -> str:
    if not isinstance(value, str) or not value:
        shown = repr(value)
        raise GrammarError(f"{where} is {shown:.64}; expected text", param=where, code=code)
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise GrammarError(f"{where} holds half of a character", param=where, code=code) from None
    if size > most:
        raise GrammarError(f"{where} has {size:,} bytes; the limit is {most:,}", param=where, code=code)
    return value
