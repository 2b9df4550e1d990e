"""Vocabularies, segments and their bytes (D1, D2, D4, D5)."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral.errors import TokenizerError
from mixtral.tokenizer import Tokenizer

module = importlib.import_module("mixtral.tokenizer.tokenizer")

V1, V2, V3 = (Tokenizer.from_version(version) for version in ("v1", "v2", "v3"))
ALL = [V1, V2, V3]
by_version = pytest.mark.parametrize("tokenizer", ALL, ids=["v1", "v2", "v3"])
SPECIAL = ("<s>", "</s>", "<unk>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
MORE_SPECIAL = (
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[IMG]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[control_12]",
    "<0x0A>",
)
texts_with_names = st.lists(st.one_of(st.sampled_from(SPECIAL + MORE_SPECIAL), st.text(max_size=5))).map("".join)


def test_golden_ids_of_special_names_in_text() -> None:
    """D4, D5: such names are ordinary text, but v3's user-defined pieces do match."""
    assert V3.encode("[INST]") == [1501, 17057, 29561]
    assert V1.encode("[INST]") == [733, 16289, 28793]
    assert V3.encode("[REFERENCE_DOC_3]") == [29473, 767]
    assert V3.decode([29473, 767]) == "[REFERENCE_DOC_3]"
    assert (V1.encode("Hi"), V2.encode("Hi"), V3.encode("Hi")) == ([15359], [16127], [16127])
    assert V3.encode("Hi", bos=True, eos=True) == [1, 16127, 2]


def test_v1_pieces_are_those_of_v2_and_v3_shifted_by_768() -> None:
    """D1"""
    for id in range(3, 32000):
        assert V1.piece(id) == V2.piece(id + 768) == V3.piece(id + 768)
        assert V1.token_bytes(id) == V3.token_bytes(id + 768)
        assert V1._model.get_score(id) == V2._model.get_score(id + 768) == V3._model.get_score(id + 768)


def test_control_ids() -> None:
    names = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"]
    for tokenizer in (V2, V3):
        assert [tokenizer.control_id(name) for name in [*names, "[/TOOL_RESULTS]"]] == list(range(3, 10))
        assert (tokenizer.control_id("<s>"), tokenizer.control_id("</s>")) == (1, 2)
    assert [V3.control_id(name) for name in ("[IMG]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[control_748]")] == [
        *range(10, 14),
        750,
    ]
    for tokenizer, name in ((V1, "[INST]"), (V2, "[PREFIX]"), (V3, "Hello"), (V3, "[REFERENCE_DOC_3]"), (V3, "")):
        with pytest.raises(TokenizerError, match="no control token"):
            tokenizer.control_id(name)


@by_version
def test_kinds_of_pieces(tokenizer: Tokenizer) -> None:
    expected = {"v1": (32000, 256, 2), "v2": (32768, 256, 770), "v3": (32768, 256, 750)}[tokenizer.version]
    ids = range(tokenizer.vocab_size)
    found = (tokenizer.vocab_size, sum(map(tokenizer.is_byte, ids)), sum(map(tokenizer.is_control, ids)))
    assert found == expected
    assert {id for id in ids if not tokenizer.token_bytes(id)} == {id for id in ids if tokenizer.is_control(id)}
    first_byte = 3 if tokenizer.version == "v1" else 771
    assert [tokenizer.token_bytes(first_byte + value) for value in range(256)] == [
        bytes([value]) for value in range(256)
    ]
    assert max(len(tokenizer.token_bytes(id).decode("utf-8", "replace")) for id in ids) <= 18


@by_version
@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=texts_with_names)
def test_no_text_gives_a_control_id(tokenizer: Tokenizer, text: str) -> None:
    """D4"""
    assert not any(tokenizer.is_control(id) for id in tokenizer.encode(text))


@by_version
@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_text_survives_and_the_bytes_of_tokens_add_up(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    surface = text.replace("▁", " ")  # SentencePiece writes a space as ▁ and cannot tell them apart
    assert tokenizer.decode(ids) == surface
    assert b"".join(map(tokenizer.token_bytes, ids)) == (b" " if text else b"") + surface.encode()
    assert tokenizer.fewest_tokens(text) <= len(ids)


def test_an_upper_bound_of_characters_per_token_is_reached() -> None:
    assert V3.fewest_tokens("[REFERENCE_DOC_19]" * 50) == 50 == len(V3.encode("[REFERENCE_DOC_19]" * 50)) - 1


@by_version
def test_control_ids_have_no_text(tokenizer: Tokenizer) -> None:
    hello = tokenizer.encode("Hello you")
    assert tokenizer.decode([1, *hello[:1], 2, *hello[1:], 1]) == "Hello you"
    assert tokenizer.decode([]) == ""


def test_lone_surrogates_become_replacement_characters() -> None:
    assert V3.decode(V3.encode("a\ud83db")) == "a\ufffdb"
    assert V3.encode("\ud83d\ude00") == V3.encode("😀")


@by_version
@pytest.mark.parametrize("id", [-1, 32768, 10**12])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, id: int) -> None:
    for use in (tokenizer.piece, tokenizer.token_bytes, lambda id: tokenizer.decode([5, id])):
        with pytest.raises(TokenizerError, match=f"{id}; expected 0 to {tokenizer.vocab_size - 1}"):
            use(id)


def test_the_vocabulary_is_chosen_by_the_size_of_the_embedding() -> None:
    """D2"""
    assert Tokenizer.for_vocab_size(32000).version == "v1"
    assert Tokenizer.for_vocab_size(32768).version == "v3"
    with pytest.raises(TokenizerError, match=r"32001.*32000 \(v1\) or 32768 \(v3\)"):
        Tokenizer.for_vocab_size(32001)
    with pytest.raises(TokenizerError, match="'v7'; expected one of v1, v2, v3"):
        Tokenizer.from_version("v7")


def test_a_changed_vocabulary_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """D2: a file is known by its sha256."""
    name, _, pieces = module._FILES["v3"]
    monkeypatch.setitem(module._FILES, "v3", (name, "0" * 64, pieces))
    with pytest.raises(TokenizerError, match="sha256 9addc8bdce59"):
        module._load.__wrapped__("v3")
    monkeypatch.setitem(module._FILES, "v3", ("missing.model", "0" * 64, pieces))
    with pytest.raises(TokenizerError, match=r"data/missing\.model"):
        module._load.__wrapped__("v3")


def test_respelled_ids() -> None:
    """An id that a model has not learnt is replaced by others with the same surface."""
    (hello,) = V3.encode("Hello")
    parts = (V3.encode("H")[0], *(id for id in V3.encode("xello")[1:]))
    tokenizer = Tokenizer.from_version("v3", respell={hello: parts})
    ids = tokenizer.encode("Hello you", bos=True)
    assert ids == [1, *parts, *V3.encode("Hello you")[1:]]
    assert tokenizer.decode(ids) == "Hello you"
    assert V3.encode("Hello") == [hello]
    for bad in ({5: ()}, {5: (32768,)}, {-1: (5,)}):
        with pytest.raises(TokenizerError):
            Tokenizer.from_version("v3", respell=bad)


def test_importing_is_light() -> None:
    heavy = ("torch", "numpy", "sentencepiece", "mistral_common")
    code = f"import sys, mixtral.tokenizer; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
