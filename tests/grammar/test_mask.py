"""The matcher: which ids it allows, where an answer begins and ends, and that it is never led past its end."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from random_schemas import random_schema
from sampling import accepts, allowed, answer, text_of, validate

from mixtral.errors import GrammarError, MatcherError, TokenizerError
from mixtral.grammar import Grammar, Matcher, calls_constraint, text_constraint
from mixtral.grammar.source import lark_grammar
from mixtral.tokenizer import Tokenizer
from mixtral.wire import Constraint

EOS, TRIGGER = 2, 5
CALLS = calls_constraint([{"type": "function", "function": {"name": "f"}}]).text
YES_NO = lark_grammar('start: "yes" | "no"')
DIGITS = lark_grammar("start: /[0-9]+/")


def ids_of(grammar: Grammar, matcher: Matcher) -> set[int]:
    return set(allowed(matcher, grammar.tokenizer).tolist())


def follow(matcher: Matcher, ids: list[int], *, masks: Tokenizer | None = None) -> None:
    for id in ids:
        if masks:
            allowed(matcher, masks)
        matcher.advance(id)


def pieces(grammar: Grammar, matcher: Matcher) -> set[str]:
    return {grammar.tokenizer.piece(id) for id in ids_of(grammar, matcher)}


def test_the_first_space_is_the_one_that_decoding_drops(v3: Grammar, v1: Grammar) -> None:
    for grammar in (v3, v1):
        matcher = grammar.matcher(Constraint(text=YES_NO))
        found = pieces(grammar, matcher)
        assert {"▁yes", "▁no", "▁", "▁y", "yes", "no", "<0x79>"} <= found
        assert not {"▁▁", "<0x20>", "</s>", "▁Yes"} & found
        matcher.advance(grammar.tokenizer.encode("yes")[0])
        assert ids_of(grammar, matcher) == {EOS}
        matcher.advance(EOS)
        assert matcher.finished


def test_a_lone_space_first_is_dropped_as_well(v3: Grammar) -> None:
    """Digits are tokens of their own, so a number begins with the bare space."""
    assert v3.tokenizer.piece(v3.tokenizer.encode("12")[0]) == "▁"
    assert accepts(v3, DIGITS, "12")
    matcher = v3.matcher(Constraint(text=YES_NO))
    matcher.advance(v3.tokenizer.encode("12")[0])
    assert "yes" in pieces(v3, matcher)
    assert not {"▁yes", "▁", "</s>"} & pieces(v3, matcher)
    empty = v3.matcher(Constraint(text=lark_grammar('start: ""')))
    assert ids_of(v3, empty) == {EOS}


def test_an_answer_that_continues_keeps_its_space(v3: Grammar) -> None:
    matcher = v3.matcher(Constraint(text=YES_NO, continues=True))
    assert {"yes", "no", "y", "n"} <= pieces(v3, matcher)
    assert not any(piece.startswith("▁") for piece in pieces(v3, matcher))
    spaced = v3.matcher(Constraint(text=lark_grammar('start: " yes"'), continues=True))
    assert {"▁yes", "▁", "<0x20>"} <= pieces(v3, spaced)


def test_only_text_and_trained_ids_are_allowed(v3: Grammar) -> None:
    anything = lark_grammar("start: /(?s:.*)/")
    found = ids_of(v3, v3.matcher(Constraint(text=anything)))
    tokenizer = v3.tokenizer
    ids = range(1, tokenizer.vocab_size)
    assert found == {EOS, *(id for id in ids if not tokenizer.is_control(id) and not _is_part(tokenizer, id))}
    rare = {tokenizer.encode("yes")[0]: (tokenizer.encode("y")[0],)}
    small = Grammar(Tokenizer("v3", respell=rare))
    assert found - ids_of(small, small.matcher(Constraint(text=anything))) == set(rare)


def _is_part(tokenizer: Tokenizer, id: int) -> bool:
    """Bytes that begin no character."""
    surface = tokenizer.token_bytes(id)
    return len(surface) == 1 and (0x80 <= surface[0] < 0xC2 or surface[0] > 0xF4)


def test_a_grammar_cannot_reach_control_ids(v3: Grammar) -> None:
    """Even one that was never checked: numbered tokens and negated bytes are masked."""
    matcher = v3.matcher(Constraint(text=lark_grammar('start: "a" | <[3-9]> | A\nA: ~/b/')))
    tokenizer = v3.tokenizer
    assert not any(tokenizer.is_control(id) for id in ids_of(v3, matcher) - {EOS})
    dead = v3.matcher(Constraint(text=lark_grammar('start: "a" <[3]>')))
    dead.advance(tokenizer.encode("a")[0])
    with pytest.raises(MatcherError, match="no token"):
        allowed(dead, tokenizer)


def test_bytes_that_cannot_be_written_are_an_error() -> None:
    tokenizer = Tokenizer("v3")
    byte = next(
        id for id in range(tokenizer.vocab_size) if tokenizer.is_byte(id) and tokenizer.token_bytes(id) == b"\xf0"
    )
    with pytest.raises(TokenizerError, match="0xf0"):
        Grammar(Tokenizer("v3", respell={byte: (tokenizer.encode("x")[0],)}))


def test_the_first_token_decides(v3: Grammar) -> None:
    auto = Constraint(text=YES_NO, calls=CALLS, trigger=TRIGGER)
    matcher = v3.matcher(auto)
    assert TRIGGER in ids_of(v3, matcher)
    assert "▁yes" in pieces(v3, matcher)
    matcher.advance(TRIGGER)
    assert {"▁[", "["} <= pieces(v3, matcher)
    assert TRIGGER not in ids_of(v3, matcher)
    for id in [*v3.tokenizer.encode('[{"name": "f", "arguments": {}}]'), EOS]:
        assert id in ids_of(v3, matcher)
        matcher.advance(id)
    assert matcher.finished
    other = v3.matcher(auto)
    other.advance(v3.tokenizer.encode("yes")[0])
    assert ids_of(v3, other) == {EOS}


def test_free_text_is_anything_but_calls(v3: Grammar) -> None:
    every = set(range(v3.tokenizer.vocab_size))
    auto = v3.matcher(Constraint(calls=CALLS, trigger=TRIGGER))
    assert ids_of(v3, auto) == every
    auto.advance(77)
    assert ids_of(v3, auto) == every - {TRIGGER}
    none = v3.matcher(Constraint(trigger=TRIGGER))
    assert ids_of(v3, none) == every - {TRIGGER}
    with pytest.raises(MatcherError):
        none.advance(TRIGGER)
    auto.advance(EOS)
    assert auto.finished


def test_calls_can_be_forced(v3: Grammar) -> None:
    matcher = v3.matcher(Constraint(text=YES_NO, calls=CALLS, trigger=TRIGGER, forced=True))
    assert ids_of(v3, matcher) == {TRIGGER}
    with pytest.raises(MatcherError):
        matcher.advance(v3.tokenizer.encode("yes")[0])


def test_end_ids_are_allowed_at_the_end_alone(v3: Grammar) -> None:
    stops = (EOS, 40, v3.tokenizer.encode("yes")[0])
    matcher = v3.matcher(Constraint(text=DIGITS), stop_ids=stops)
    assert not ids_of(v3, matcher) & set(stops)
    with pytest.raises(MatcherError, match="ends the answer before"):
        matcher.advance(EOS)
    matcher = v3.matcher(Constraint(text=DIGITS), stop_ids=stops)
    matcher.advance(v3.tokenizer.encode("7")[1])
    assert set(stops) <= ids_of(v3, matcher)
    matcher.advance(40)
    assert matcher.finished
    word = v3.matcher(Constraint(text=YES_NO), stop_ids=stops)
    assert "▁yes" not in pieces(v3, word)  # an id that ends the answer is no text


def test_a_finished_answer_takes_nothing_more(v3: Grammar) -> None:
    matcher = v3.matcher(Constraint(text=YES_NO))
    for id in (*v3.tokenizer.encode("no"), EOS):
        matcher.advance(id)
    for id in (EOS, TRIGGER, 1000):
        with pytest.raises(MatcherError, match="after the end"):
            matcher.advance(id)
    with pytest.raises(MatcherError, match="finished"):
        allowed(matcher, v3.tokenizer)


def test_a_token_that_is_not_allowed_is_an_error(v3: Grammar) -> None:
    for first in ("maybe", " yes", "[INST]", "yesno"):
        with pytest.raises(MatcherError):
            follow(v3.matcher(Constraint(text=YES_NO)), v3.tokenizer.encode(first))
    after = v3.matcher(Constraint(text=YES_NO))
    after.advance(v3.tokenizer.encode("yes")[0])
    with pytest.raises(MatcherError):
        after.advance(v3.tokenizer.encode("no")[0])


def test_a_mask_of_another_shape_is_refused(v3: Grammar) -> None:
    matcher = v3.matcher(Constraint(text=YES_NO))
    whole = np.zeros(2048, np.uint32)
    for out in (whole[:1023], whole[:1024].view(np.int32), whole[:1024].reshape(1, -1), whole[::2]):
        with pytest.raises(MatcherError, match="uint32"):
            matcher.mask(out)


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint(calls=CALLS),
        Constraint(forced=True, trigger=TRIGGER),
        Constraint(trigger=EOS),
        Constraint(trigger=99_999),
    ],
)
def test_a_constraint_that_contradicts_itself(v3: Grammar, constraint: Constraint) -> None:
    with pytest.raises(MatcherError):
        v3.matcher(constraint)
    with pytest.raises(MatcherError):
        v3.matcher(Constraint(), stop_ids=())
    with pytest.raises(MatcherError):
        v3.matcher(Constraint(), stop_ids=(-1,))


@pytest.mark.parametrize(
    "text", ["", "start: start", "start: x", 'start: "a', "start: /(a)\\1/", "start: A\nA: /a/ & /b/"]
)
def test_a_grammar_that_cannot_be_compiled(v3: Grammar, text: str) -> None:
    with pytest.raises(GrammarError) as error:
        v3.matcher(Constraint(text=lark_grammar(text)))
    assert error.value.param == "text"
    with pytest.raises(GrammarError) as error:
        v3.matcher(Constraint(calls=lark_grammar(text), trigger=TRIGGER))
    assert error.value.param == "calls"


def test_one_that_fails_later_is_an_error_of_its_answer(v3: Grammar) -> None:
    bomb = json.dumps({"type": "string", "pattern": "^((((a{1,100}){1,100}){1,100}){1,100}){1,100}$"})
    matcher = v3.matcher(Constraint(text=lark_grammar(f"start: %json {bomb}")))
    with pytest.raises(MatcherError, match="the grammar failed"):
        follow(matcher, v3.tokenizer.encode('"' + "a" * 200), masks=v3.tokenizer)
    other = v3.matcher(Constraint(text=YES_NO))
    assert "▁yes" in pieces(v3, other)


def test_answers_do_not_share_their_place(v3: Grammar) -> None:
    first, second = (v3.matcher(Constraint(text=YES_NO)) for _ in range(2))
    first.advance(v3.tokenizer.encode("yes")[0])
    assert "▁no" in pieces(v3, second)
    assert ids_of(v3, first) == {EOS}


def test_the_cache_is_bounded() -> None:
    grammar = Grammar(Tokenizer("v3"), cache_bytes=300_000)
    for number in range(20):
        grammar.matcher(Constraint(text=lark_grammar(f'start: "{number}"')))
        assert 0 < grammar.cache_bytes <= 300_000
    kept = grammar.compile(lark_grammar('start: "19"'), "text")
    assert grammar.compile(lark_grammar('start: "19"'), "text") is kept
    grammar.matcher(Constraint(text=lark_grammar("start: " + '"x" ' * 2000)))
    assert grammar.compile(lark_grammar('start: "19"'), "text") is not kept


def check_random_answers(grammar: Grammar, seeds: range) -> tuple[int, int]:
    """Draw an answer for each random schema and validate it; how many were finished, and how many were refused."""
    finished = refused = 0
    for seed in seeds:
        schema = random_schema(seed % 500)
        source = text_constraint({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
        assert source is not None
        try:
            ids = answer(grammar, Constraint(text=source.text), seed)
        except GrammarError:
            refused += 1
            continue
        if ids is not None:
            finished += 1
            validate(schema, text_of(grammar.tokenizer, ids))
    return finished, refused


def test_random_answers_are_valid(v3: Grammar) -> None:
    finished, refused = check_random_answers(v3, range(60))
    assert finished > 50
    assert refused < 4


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", ["v1", "v3"])
def test_all_random_answers_are_valid(version: str) -> None:
    """500 schemas, each with ten seeds and two vocabularies."""
    finished, refused = check_random_answers(Grammar(Tokenizer.from_version(version)), range(5000))
    assert finished > 4800
    assert refused < 150


def test_random_steps_never_pass_the_end(v3: Grammar) -> None:
    """Every id of a mask is taken, no id outside it is, and nothing comes after the end."""
    rng = random.Random(0)
    for seed in range(12):
        source = text_constraint({"type": "json_schema", "json_schema": {"name": "x", "schema": random_schema(seed)}})
        assert source is not None
        constraint = Constraint(text=source.text)
        taken: list[int] = []
        matcher = v3.matcher(constraint)
        for _ in range(12):
            found = ids_of(v3, matcher)
            for id in rng.sample(range(v3.tokenizer.vocab_size), 3):
                probe = v3.matcher(constraint)
                for before in taken:
                    probe.advance(before)
                if id in found:
                    probe.advance(id)
                else:
                    with pytest.raises(MatcherError):
                        probe.advance(id)
            taken.append(rng.choice(sorted(found)))
            matcher.advance(taken[-1])
            if matcher.finished:
                break
