"""Patterns written anew: the same texts match, what is read differently is narrowed, the rest is refused by name."""

from __future__ import annotations

import json
import random
import re

import pytest
from sampling import accepts

from mixtral.errors import GrammarError
from mixtral.grammar import Grammar, text_constraint
from mixtral.grammar.patterns import check_nesting, rewrite_pattern


def grammar_of(pattern: str) -> str:
    schema = {"type": "string", "pattern": pattern}
    source = text_constraint({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert source is not None
    return source.text


# pattern, a text that it matches, a text that it does not
CASES = [
    ("b", "abc", "ac"), ("^b$", "b", "abc"), ("^a|b$", "xb", "xc"), ("^a+?$", "aaa", "b"), ("^a{2}?$", "aa", "a"),
    (r"^\d{3}-\d{2}$", "123-45", "123-4x"), (r"^\w+$", "a_9", "a-9"), (r"^\s$", " ", "x"), (r"^\S$", "x", " "),
    ("^.$", "é", ""), (r"^\.$", ".", "x"), ("^[a-c]$", "b", "d"), ("^[^a-c]$", "d", "b"), ("^[a-]$", "-", "b"),
    ("^[-a]$", "-", "b"), (r"^[\w.-]+$", "a.b-c", "a b"), (r"^[\s\S]$", "\t", "ab"), (r"^[^\s]$", "x", "\n"),
    ("^[&&~~]$", "~", "a"), ("^[[:alpha:]$", ":", "b"), (r"^\x41\u00e9$", "Aé", "aé"), (r"^\/\-\$\{\}$", "/-${}", "/"),
    ("^(?:a|b)(c)(?<name>d)$", "acd", "ad"), ("^]}$", "]}", "]"), ("^#a b/$", "#a b/", "#ab/"), (r"^\p{Lu}$", "É", "é"),
    ("^$", "", "a"), ("^|a", "x", None), ("^a{0,2}$", "aa", "aaa"), ("^a{2,}$", "aaa", "a"),
    (r"^[\]\\]$", "\\", "a"), (r"^\ \%\`\:$", " %`:", "x"), ("^<>$", "<>", "<"), (r"^[.$^|*+?(){}]$", "(", "a"),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "good", "bad"), CASES, ids=[case[0] for case in CASES])
def test_a_pattern_keeps_its_meaning(v3: Grammar, pattern: str, good: str, bad: str | None) -> None:
    source = grammar_of(pattern)
    assert accepts(v3, source, json.dumps(good, ensure_ascii=False))
    assert bad is None or not accepts(v3, source, json.dumps(bad, ensure_ascii=False))


@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        ("(?=a)a", "look-around"), ("(?!a)b", "look-around"), ("(?<=a)b", "look-around"), ("(?<!a)b", "look-around"),
        (r"(a)\1", "back-reference"), (r"(?<n>a)\k<n>", "back-reference"), (r"\bfoo", r"\b"), (r"foo\B", r"\B"),
        ("(?i)a", "(?i"), ("(?P<n>a)", "(?P"), ("[]", "empty class"), ("[^]", "empty class"), (r"[\b]", r"\b"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_refused_by_name(pattern: str, part: str) -> None:
    with pytest.raises(GrammarError, match=re.escape(part)) as error:
        rewrite_pattern(pattern, "here")
    assert (error.value.code, error.value.param) == ("schema_unsupported", "here")


WRONG = [
    *("a{", "{", "a{,2}", "*a", "a**", "a++", "(*a)", "a|*", "^*", "[a", "[a-", "\\", "[\\", r"\z", r"\é", r"\<"),
    *(r"[\d-x]", r"[a-\w]", "a{2}{3}", r"\c", r"\x4", "a???"),
]


@pytest.mark.parametrize("pattern", WRONG)
def test_a_wrong_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(GrammarError) as error:
        rewrite_pattern(pattern, "here")
    assert (error.value.code, error.value.param) == ("schema_invalid", "here")


def test_large_ones_are_refused_before_any_recursion() -> None:
    for pattern in ("(" * 100_000 + ")" * 100_000, "a{10000}", "(a|" * 33):
        with pytest.raises(GrammarError) as error:
            rewrite_pattern(pattern, "here")
        assert error.value.code == "grammar_too_complex"
    rewrite_pattern("(" * 32 + "a" + ")" * 32, "here")


def test_nesting_does_not_count_what_is_hidden_or_closed() -> None:
    check_nesting(r"\(" * 100 + "()" * 100 + ")" * 50, opening="(", most=1, where="here", code="x")
    with pytest.raises(GrammarError):
        check_nesting("((", opening="(", most=1, where="here", code="x")


@pytest.mark.parametrize("space", ["\x85", "\ufeff", "\u180e", "\x1c"])
def test_doubtful_white_space_is_neither(v3: Grammar, space: str) -> None:
    for pattern in (r"^\s$", r"^\S$", r"^[\s]$", r"^[^\s]$", r"^[\S]$", r"^[^\S]$"):
        assert not accepts(v3, grammar_of(pattern), json.dumps(space, ensure_ascii=False), by_bytes=True)
    for pattern in ("^.$", "^[^x]$"):
        assert accepts(v3, grammar_of(pattern), json.dumps(space, ensure_ascii=False), by_bytes=True) == (
            space > "\x1f"
        )


def test_a_line_end_is_no_dot(v3: Grammar) -> None:
    for end in ("\n", "\r", "\u2028", "\u2029"):
        assert not accepts(v3, grammar_of("^.$"), json.dumps(end, ensure_ascii=False), by_bytes=True)


def test_random_patterns_allow_only_what_another_program_matches(v3: Grammar) -> None:
    rng = random.Random(3)
    atoms = ["a", "b", "[ab]", "[^a]", ".", r"\d", r"\w", r"\s", r"\S", r"\.", "(a|b)", "(?:ab)"]
    seen = 0
    for _ in range(120):
        body = "".join(rng.choice(atoms) + rng.choice(["", "", "*", "+", "?", "{1,2}", "+?"]) for _ in range(3))
        pattern = rng.choice(["", "^"]) + body + rng.choice(["", "$"])
        source = grammar_of(pattern)
        for _ in range(4):
            text = "".join(rng.choice("ab1. \n_") for _ in range(rng.randint(0, 4)))
            if accepts(v3, source, json.dumps(text)):
                seen += 1
                assert re.search(pattern, text), (pattern, text)
            else:
                assert not re.search(pattern, text) or "\n" in text, (pattern, text)
    assert seen > 30
