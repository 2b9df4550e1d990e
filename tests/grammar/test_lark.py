"""Regular expressions and grammars of clients: what they may use, and what they cannot reach."""

from __future__ import annotations

import re

import pytest
from sampling import accepts

from mixtral.errors import GrammarError
from mixtral.grammar import Grammar
from mixtral.grammar.lark import check_lark, check_regex


@pytest.mark.parametrize(
    ("regex", "good", "bad"),
    [
        ("a+b?", "aab", "ba"), (r"\d{4}-\d{2}", "2024-12", "2024-1"), ("(?i)yes|no", "YES", "maybe"),
        ("(yes|no)/x", "no/x", "no"),
        (" a", " a", "a"), ("  a| b", " b", "b"), ("[^a]é", "bé", "aé"), (r"\p{Greek}+", "αβγ", "abc"),
        ("a\nb", "a\nb", "ab"), ('"', '"', "'"),
    ],
)  # fmt: skip
def test_a_regex_matches_the_whole_text(v3: Grammar, regex: str, good: str, bad: str) -> None:
    source = check_regex(regex, "regex")
    for by_bytes in (False, True):
        # Written by bytes no space is dropped: the first byte is no word of its own.
        assert accepts(v3, source, good, by_bytes=by_bytes)
        assert not accepts(v3, source, bad, by_bytes=by_bytes)


@pytest.mark.parametrize("regex", ["", None, 3, "\ud800", "a" * 4097])
def test_a_wrong_regex(regex: object) -> None:
    with pytest.raises(GrammarError) as error:
        check_regex(regex, "regex")
    assert (error.value.code, error.value.param) == ("regex_invalid", "regex")


def test_a_regex_that_nests_deep() -> None:
    for text in ("(" * 33, "[" * 33, "(?:" * 1000):
        with pytest.raises(GrammarError) as error:
            check_regex(text, "regex")
        assert error.value.code == "grammar_too_complex"


GRAMMARS = [
    ('start: "a" | "b" start', "bba", "bb"),
    ("start: sum\nsum: NUMBER (/[+-]/ NUMBER)*\nNUMBER: /[0-9]+/\n%ignore / /", "1 + 2-3", "1 +"),
    ("%import common.INT\nstart: INT", "12", "x"),
    ('start: name "!"\nname[lazy]: /.*x/', "ax!", "a!"),
    ('start: name "!"\nname[capture="n"]: /[a-z]+/', "ab!", "!"),
    ('start: "<[5]>" /<b>@/ // <x> %json\n # @other %foo', "<[5]><b>@", "<b>"),
    ('?start: "a"i ["b"]', "Ab", "c"),
    ('start: "%" "json"', "%json", "%"),
]


@pytest.mark.parametrize(("text", "good", "bad"), GRAMMARS, ids=range(len(GRAMMARS)))
def test_a_grammar(v3: Grammar, text: str, good: str, bad: str) -> None:
    text = text.replace(" %json\n", "\n")
    source = check_lark(text, "definition")
    assert accepts(v3, source, good)
    assert not accepts(v3, source, bad)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("start: <[5]>", "<"), ("start: <s>", "<"), ('start: "a" </s>', "<"), ("start: @other", "@"),
        ('%llguidance {"no_forcing": false}\nstart: "a"', "%llguidance"),
        ('start: %json {"x-guidance": {"lenient": true}}', "%json"),
        ("start: %lark { }", "%lark"), ('start: A\nA: %regex {"substring_chars": "a"}', "%regex"),
        ("start: a\n%declare a", "%declare"),
        ("%override start: a", "%override"), ("start: x\nx[max_tokens=3]: /a*/", "[max_tokens]"),
        ('start: x\nx[stop="b"]: /a*/', "[stop]"),
        ("start: x\nx[temperature=0.5]: /a*/", "[temperature]"), ("start[lazy,max_tokens=3]: /a*/", "[max_tokens]"),
        ('start: "%llguidance {}"', "%llguidance"), ('start: "a" // %llguidance', "%llguidance"),
        ("start: a %if x", "%if"),
    ],
)  # fmt: skip
def test_what_a_grammar_may_not_use(text: str, part: str) -> None:
    with pytest.raises(GrammarError, match=re.escape(part)) as error:
        check_lark(text, "definition")
    assert (error.value.code, error.value.param) == ("grammar_invalid", "definition")


@pytest.mark.parametrize("text", ["", None, [], "\udfff", "a" * 32_769])
def test_a_wrong_grammar(text: object) -> None:
    with pytest.raises(GrammarError) as error:
        check_lark(text, "definition")
    assert error.value.code == "grammar_invalid"


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text",
    [
        '"' + '\\"' * 16_000,
        "/" + "\\/" * 16_000,
        "a[\n" * 10_000,
        "%" + " " * 32_000,
        "[a" * 30,
        '"' * 32_000,
        "a[b" * 60,
    ],
)
def test_hostile_texts_are_checked_in_one_pass(text: str) -> None:
    try:
        check_lark(text, "definition")
    except GrammarError as error:
        assert error.code == "grammar_too_complex"  # noqa: PT017


def test_a_grammar_that_nests_deep() -> None:
    with pytest.raises(GrammarError) as error:
        check_lark("start: " + "(" * 65 + '"a"', "definition")
    assert error.value.code == "grammar_too_complex"
