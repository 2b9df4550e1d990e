"""Streamed text equals the text of all ids, for every split, with and without stop strings (D8, H4)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral.errors import RequestError, TokenizerError
from mixtral.tokenizer import TextStream, Tokenizer

V1, V3 = Tokenizer.from_version("v1"), Tokenizer.from_version("v3")
FIRST_BYTE = 771

any_ids = st.lists(
    st.one_of(
        st.integers(0, V3.vocab_size - 1),
        st.integers(FIRST_BYTE, FIRST_BYTE + 255),
        st.sampled_from([0, 1, 2, 5, 767, 29473, 1027, 16127, FIRST_BYTE + 32]),
        st.sampled_from([FIRST_BYTE + byte for byte in "😀é日\ud7ff\U0010ffff".encode()]),
    ),
    max_size=12,
)
texts = st.text(st.sampled_from("ab \n.é😀\U0001fae8"), max_size=12)


def streamed(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, stop=stop)
    deltas = [stream.push(id) for id in ids]
    return [*deltas, stream.finish()], stream.stopped


@settings(max_examples=600, deadline=None, derandomize=True)
@given(ids=any_ids)
def test_deltas_of_any_ids_add_up_to_their_text(ids: list[int]) -> None:
    assert "".join(streamed(V3, ids)[0]) == V3.decode(ids)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text())
def test_deltas_of_text_add_up_and_never_hold_half_a_character(text: str) -> None:
    for tokenizer in (V1, V3):
        ids = tokenizer.encode(text)
        deltas, _ = streamed(tokenizer, ids)
        assert "".join(deltas) == tokenizer.decode(ids)
        assert "".join(deltas).count("\ufffd") == tokenizer.decode(ids).count("\ufffd")
        assert deltas[-1] == ""


def test_a_character_comes_with_its_last_byte() -> None:
    ids = V3.encode("\U0001fae8")
    assert len(ids) == 5  # a space and four bytes
    assert streamed(V3, ids)[0] == ["", "", "", "", "\U0001fae8", ""]
    assert streamed(V3, ids[:3])[0] == ["", "", "", "\ufffd\ufffd"]
    assert streamed(V3, [*ids[:3], 16127])[0] == ["", "", "", "\ufffd\ufffd Hi", ""]


def test_only_the_first_space_is_dropped_and_none_of_a_continued_text() -> None:
    ids = V3.encode("Hi Hi")
    assert streamed(V3, ids)[0] == ["Hi", " Hi", ""]
    assert streamed(V3, [1, *ids])[0] == ["", "Hi", " Hi", ""]
    stream = TextStream(V3, continues=True)
    assert [stream.push(id) for id in ids] == [" Hi", " Hi"]


@settings(max_examples=600, deadline=None, derandomize=True)
@given(text=texts, cut=st.integers(0, 12), stop=st.lists(texts.filter(bool), min_size=1, max_size=3))
def test_text_ends_where_the_first_stop_string_begins(text: str, cut: int, stop: list[str]) -> None:
    """H4: also across tokens and inside multi-byte characters; the split of the text into tokens does not matter."""
    for ids in (
        V3.encode(text),
        V3.encode(text[:cut]) + V3.encode(text[cut:]),
        [FIRST_BYTE + b for b in text.encode()],
    ):
        whole = V3.decode(ids)
        places = [place for word in stop if (place := whole.find(word)) >= 0]
        deltas, stopped = streamed(V3, ids, tuple(stop))
        assert "".join(deltas) == whole[: min(places, default=len(whole))]
        assert stopped == bool(places)


def test_text_is_held_back_no_longer_than_it_can_be_a_stop_string() -> None:
    stream = TextStream(V3, stop=("END",))
    ids = [FIRST_BYTE + byte for byte in b"aEbENcEND!"]
    assert [stream.push(id) for id in ids] == ["a", "", "Eb", "", "", "ENc", "", "", "", ""]
    assert stream.stopped
    assert stream.finish() == ""
    unfinished = TextStream(V3, stop=("END",))
    assert [unfinished.push(id) for id in ids[:5]] == ["a", "", "Eb", "", ""]
    assert (unfinished.finish(), unfinished.stopped) == ("EN", False)


def test_the_earliest_start_wins_even_if_another_stop_string_is_complete_first() -> None:
    ids = [FIRST_BYTE + byte for byte in b"xabc"]
    assert streamed(V3, ids, ("b", "abc")) == (["x", "", "", "", ""], True)
    assert streamed(V3, ids[:3], ("b", "abc")) == (["x", "", "", "a"], True)


def test_bad_input_is_refused() -> None:
    with pytest.raises(RequestError, match=r"stop\[1\] is empty"):
        TextStream(V3, stop=("a", ""))
    for id in (-1, 32768):
        with pytest.raises(TokenizerError, match="expected 0 to 32767"):
            TextStream(V3).push(id)
