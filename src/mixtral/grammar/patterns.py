"""Patterns of JSON Schema (ECMA-262 regular expressions) in the syntax of the grammar library (Rust's)."""

from __future__ import annotations

import re

from mixtral.errors import GrammarError

__all__ = ["check_nesting", "rewrite_pattern"]

DEPTH = 32  # of groups
_DIGITS = 4  # of a repeat count

# Programs differ in what they call white space. Whatever is matched here is white space, or is none, for all of them.
_SPACE = r" \t\n\r\f\x0b"
_MAYBE_SPACE = r"\s\x85\x1c-\x1f\u180e\ufeff"
_ESCAPES = frozenset("nrtf")
_PUNCTUATION = frozenset("\\.^$|?*+()[]{}/-\"'#&,:;=@_~!% `")
_COUNT = re.compile(r"\{(\d+)(?:,(\d*))?\}")
_HEX = re.compile(r"x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}")
_CATEGORY = re.compile(r"[pP]\{[A-Za-z_]+(?:=[A-Za-z_]+)?\}")
_GROUP_NAME = re.compile(r"\(\?<[A-Za-z_][A-Za-z0-9_]*>")


def check_nesting(text: str, *, opening: str, most: int, where: str, code: str) -> None:
    """Refuse a text whose brackets nest deeper than ``most``; ``\\`` hides the character after it. Uses no recursion.

    Raises:
        GrammarError: with ``code``.
    """
    closing = "".join({"(": ")", "[": "]", "{": "}"}[each] for each in opening)
    depth, hidden = 0, False
    for character in text:
        if hidden:
            hidden = False
        elif character == "\\":
            hidden = True
        elif character in opening:
            depth += 1
            if depth > most:
                raise GrammarError(
                    f"{where} has brackets that nest deeper than {most}; make it simpler", param=where, code=code
                )
        elif character in closing:
            depth = max(0, depth - 1)


def rewrite_pattern(pattern: str, where: str) -> str:
    """A pattern that matches, in the grammar library, only what the given one matches in every ECMA-262 program.

    Raises:
        GrammarError: schema_unsupported for look-around, back-references, word boundaries and other parts that have no
            counterpart; schema_invalid for a pattern that is wrong; grammar_too_complex for one that nests too deep.
    """
    check_nesting(pattern, opening="(", most=DEPTH, where=where, code="grammar_too_complex")
    return _Rewriter(pattern, where).rewrite()


class _Rewriter:
    """One pass from left to right; ``place`` is the next character."""

    def __init__(self, pattern: str, where: str) -> None:
        self.text = pattern
        self.where = where
        self.place = 0
        self.out: list[str] = []
        self.repeatable = False  # whether a quantifier may come next

    def rewrite(self) -> str:
        while self.place < len(self.text):
            character = self.text[self.place]
            if character in "*+?{":
                self._quantifier()
            elif character == "(":
                self._group()
            elif character == "[":
                self._class()
            elif character == "\\":
                self._take(self._escape(" "))
            elif character == ".":
                self._take(r"[^\n\r\u2028\u2029]", 1)
            elif character in "|^$":
                self._take(character, 1, repeatable=False)
            else:
                self._take("\\" + character if character in "]}" else character, 1)
        return "".join(self.out)

    def _take(self, written: str, length: int = 0, *, repeatable: bool = True) -> None:
        self.out.append(written)
        self.place += length
        self.repeatable = repeatable

    def _quantifier(self) -> None:
        written = self.text[self.place]
        if written == "{":
            match = _COUNT.match(self.text, self.place)
            if match is None:
                raise self._wrong("a brace that is no repeat count; write \\{ for the character itself")
            if max(map(len, match.groups(""))) > _DIGITS:
                raise self._wrong(f"a repeat count of more than {_DIGITS} digits", code="grammar_too_complex")
            written = match.group()
        if not self.repeatable:
            raise self._wrong(f"{written!r} with nothing before it to repeat")
        self._take(written, len(written), repeatable=False)
        # Lazy or not, the same texts match as a whole.
        if self.text[self.place : self.place + 1] == "?":
            self.place += 1

    def _group(self) -> None:
        rest = self.text[self.place : self.place + 4]
        if rest.startswith(("(?=", "(?!", "(?<=", "(?<!")):
            raise self._unsupported("look-around")
        if rest.startswith("(?:"):
            self._take("(?:", 3, repeatable=False)
        elif match := _GROUP_NAME.match(self.text, self.place):
            self._take("(?:", len(match.group()), repeatable=False)
        elif rest.startswith("(?"):
            raise self._unsupported(f"the group {rest[:3]!r}")
        else:
            self._take("(?:", 1, repeatable=False)

    def _escape(self, inside: str) -> str:
        """What an escape becomes. ``inside``: "" in a class, "^" in a negated one, " " outside."""
        rest = self.text[self.place + 1 : self.place + 40]
        letter = rest[:1]
        self.place += 2
        if letter in "dDwW" and letter:
            return f"\\{letter}"
        if letter in "sS" and letter:
            return _white(letter, inside)
        if letter in _ESCAPES or letter in _PUNCTUATION:
            return f"\\{letter}"
        for known in (_HEX, _CATEGORY):
            if match := known.match(rest):
                self.place += len(match.group()) - 1
                return f"\\{match.group()}"
        if letter in "bB" and letter:
            raise self._unsupported(f"\\{letter}")
        if letter.isdigit() or letter == "k":
            raise self._unsupported("a back-reference")
        raise self._wrong(f"the escape \\{letter}")

    def _class(self) -> None:
        negated = self.text[self.place + 1 : self.place + 2] == "^"
        self.place += 1 + negated
        parts = ["[^" if negated else "["]
        start = self.place
        while (character := self.text[self.place : self.place + 1]) != "]":
            if not character:
                raise self._wrong("a [ without its ]")
            first, single = self._member(negated)
            is_range = (
                self.text[self.place : self.place + 1] == "-" and self.text[self.place + 1 : self.place + 2] != "]"
            )
            if not is_range:
                parts.append(first)
                continue
            self.place += 1
            last, other_single = self._member(negated)
            if not (single and other_single):
                raise self._wrong("a range from or to a class of characters")
            parts.append(f"{first}-{last}")
        if self.place == start:
            raise self._unsupported("an empty class")
        self.place += 1
        self._take("".join(parts) + "]")

    def _member(self, negated: bool) -> tuple[str, bool]:
        """One member of a class, and whether it is a single character."""
        character = self.text[self.place : self.place + 1]
        if character == "\\":
            single = self.text[self.place + 1 : self.place + 2] not in tuple("dDwWsSpP")
            return self._escape("^" if negated else ""), single
        if not character:
            raise self._wrong("a [ without its ]")
        self.place += 1
        return ("\\" + character if character in "[]^&~-" else character), True

    def _unsupported(self, what: str) -> GrammarError:
        return GrammarError(
            f"{self.where} uses {what}, which is not supported in patterns; say it without",
            param=self.where,
            code="schema_unsupported",
        )

    def _wrong(self, what: str, code: str = "schema_invalid") -> GrammarError:
        return GrammarError(f"{self.where} has {what}, at character {self.place}", param=self.where, code=code)


def _white(letter: str, inside: str) -> str:
    """``\\s`` or ``\\S``: as narrow as possible, or as wide as possible in a negated class."""
    if letter == "s":
        return {"": _SPACE, "^": _MAYBE_SPACE, " ": f"[{_SPACE}]"}[inside]
    return f"[^{_SPACE}]" if inside == "^" else f"[^{_MAYBE_SPACE}]"
