"""The Python API: loading, text and ids, batches, streams, stop strings, conversations, function calls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from threaded import serving_model

import mixtral
from mixtral import api
from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError, ConfigError, MessagesError, TokenizerError
from mixtral.model.mixtral import Mixtral
from mixtral.tokenizer import Tokenizer, encode_chat
from mixtral.weights import save_compact, save_model
from mixtral.weights.vocab import row_map
from mixtral.wire import SamplingParams, TokenEvent

CONFIG = MixtralConfig(
    vocab_size=32768,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_local_experts=2,
    num_experts_per_tok=2,
    max_position_embeddings=128,
)
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12}
USER = {"role": "user", "content": "When does breakfast start?"}
TOOL = {"type": "function", "function": {"name": "hours", "parameters": {"type": "object", "properties": {}}}}


def random_model(config: MixtralConfig) -> Mixtral:
    generator = torch.Generator().manual_seed(1)
    model = Mixtral(config, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "town"
    save_model(random_model(CONFIG), folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> mixtral.LLM:
    return mixtral.load(folder)


@pytest.fixture
def scripted(llm: mixtral.LLM) -> mixtral.LLM:
    return mixtral.LLM(llm.generator.model, llm.tokenizer, name="scripted")


class Script:
    """Stands in for the generator: gives the ids of a script, whatever the prompt."""

    config = CONFIG

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids
        self.closed = False

    def stream(self, prompts: Any, params: SamplingParams, dropped: Any = (), **options: Any) -> Iterator[TokenEvent]:
        try:
            for place, id in enumerate(self.ids):
                cut = place + 1 == params.max_tokens
                yield TokenEvent(sequence=0, id=id, finish_reason="stop" if id == 2 else "length" if cut else None)
        finally:
            self.closed = True


# --- loading ----------------------------------------------------------------------------------------------------------


def test_load_says_what_it_has(llm: mixtral.LLM) -> None:
    assert (llm.name, llm.config, llm.context, llm.vocab_size) == ("town", CONFIG, 128, 32768)
    assert (llm.tokenizer.version, llm.has_tokenizer, llm.supports_tools) == ("v3", True, True)


def test_load_in_another_dtype_and_name(folder: Path) -> None:
    llm = mixtral.load(folder, dtype="bfloat16", name="other")
    assert llm.name == "other"
    assert llm.generator.model.lm_head.weight.dtype == torch.bfloat16
    assert len(llm.generate("hello", **GREEDY).ids) <= 12


@pytest.mark.parametrize("options", [{"dtype": torch.int8}, {"dtype": "float8"}, {"device": "nothing"}])
def test_wrong_device_or_dtype(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        mixtral.load(folder, **options)


def test_a_missing_embedded_model_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(api, "__file__", str(tmp_path / "api.py"))
    with pytest.raises(CheckpointError, match="no embedded model"):
        mixtral.load("embedded")


def test_presets_have_no_weights() -> None:
    with pytest.raises(ConfigError, match=r"'8x22B' is a preset.*mixtral inspect 8x22B"):
        mixtral.load("8x22B")


def test_compact_folder_brings_its_respelling(tmp_path: Path) -> None:
    model = random_model(CONFIG)
    tokenizer = Tokenizer.from_version("v3")
    rare = tokenizer.encode("breakfast")
    assert len(rare) == 1
    respell = {rare[0]: tuple(tokenizer.encode("b")) + tuple(tokenizer.encode("c"))}
    rows = row_map(range(1000), CONFIG.vocab_size)
    with torch.no_grad():
        for table in (model.model.embed_tokens.weight, model.lm_head.weight):
            table[1000:] = table[1000]
    save_compact(model, tmp_path / "compact", row_of_id=rows, respell=respell, metadata={})
    llm = mixtral.load(tmp_path / "compact")
    assert llm.tokenizer.encode("breakfast") == list(respell[rare[0]])
    assert llm.logits([1, 2, 3]).shape == (3, 32768)


def test_a_vocabulary_without_tokenizer_takes_ids_only(tmp_path: Path) -> None:
    save_model(random_model(CONFIG.replace(vocab_size=300)), tmp_path / "ids")
    llm = mixtral.load(tmp_path / "ids")
    assert not llm.has_tokenizer
    assert not llm.supports_tools
    found = llm.generate([1, 2, 3], **GREEDY)
    assert (found.text, len(found.ids)) == ("", 12)
    for call in (
        lambda: llm.generate("text"),
        lambda: llm.chat([USER]),
        lambda: llm.generate([1], stop=["a"]),
        lambda: llm.tokenizer,
    ):
        with pytest.raises(TokenizerError, match=r"300 entries .*Use token ids"):
            call()


def test_public_names_are_lazy_and_complete() -> None:
    assert mixtral.load is api.load
    assert {"load", "LLM", "SamplingParams"} <= set(dir(mixtral))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mixtral.nonsense


# --- generate ---------------------------------------------------------------------------------------------------------


def test_text_is_ids_with_bos(llm: mixtral.LLM) -> None:
    ids = [1, *llm.tokenizer.encode("hello there")]
    found = llm.generate("hello there", **GREEDY)
    assert found.ids == llm.generate(ids, **GREEDY).ids
    assert (found.prompt_tokens, found.finish_reason, found.logprobs) == (len(ids), "length", None)


def test_the_seed_repeats_an_answer(llm: mixtral.LLM) -> None:
    first = llm.generate("hello", max_tokens=20)
    assert llm.generate("hello", max_tokens=20, seed=first.seed) == first
    assert llm.generate("hello", max_tokens=20).ids != first.ids


def test_streamed_pieces_are_the_whole(llm: mixtral.LLM) -> None:
    whole = llm.generate("hello", max_tokens=30, seed=5, logprobs=2)
    deltas = list(llm.generate("hello", max_tokens=30, seed=5, logprobs=2, stream=True))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [id for delta in deltas for id in delta.ids] == whole.ids
    assert [one for delta in deltas for one in delta.logprobs or ()] == whole.logprobs
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + [whole.finish_reason]
    assert len(whole.logprobs or ()) == len(whole.ids)


def test_greedy_follows_the_logits(llm: mixtral.LLM) -> None:
    found = llm.generate([1, 5, 9], **GREEDY)
    logits = llm.logits([1, 5, 9, *found.ids])
    assert logits.dtype == torch.float32
    assert logits[2:-1].argmax(-1).tolist() == found.ids


def test_a_list_is_a_batch(llm: mixtral.LLM) -> None:
    texts = ["hello", "a much longer text about trains and towns", "x"]
    batch = llm.generate(texts, **GREEDY)
    assert [one.ids for one in batch] == [llm.generate(text, **GREEDY).ids for text in texts]
    assert [one.text for one in batch] == [llm.generate(text, **GREEDY).text for text in texts]
    assert [one.ids for one in llm.generate([[1, 2], [3]], **GREEDY)] == [
        llm.generate(ids, **GREEDY).ids for ids in ([1, 2], [3])
    ]
    assert {delta.sequence for delta in llm.generate(texts, stream=True, **GREEDY)} == {0, 1, 2}


def test_stop_string_ends_one_answer_and_not_the_others(llm: mixtral.LLM) -> None:
    free = llm.generate(["hello", "x"], temperature=0.0, max_tokens=20)
    middle = len(free[0].text) // 2
    stop = free[0].text[middle : middle + 3]
    found = llm.generate(["hello", "x"], temperature=0.0, max_tokens=20, stop=[stop])
    assert found[0].text == free[0].text[: free[0].text.index(stop)]
    assert found[0].finish_reason == "stop"
    assert found[0].ids == free[0].ids[: len(found[0].ids)]
    assert len(found[0].ids) < 20
    if stop not in free[1].text:
        assert found[1] == mixtral.Completion(
            free[1].text, free[1].ids, free[1].finish_reason, free[1].prompt_tokens, found[1].seed
        )
    assert llm.generate("hello", temperature=0.0, max_tokens=20, stop=stop).text == found[0].text


def test_max_tokens_is_what_the_context_leaves(llm: mixtral.LLM) -> None:
    found = llm.generate([1] * 100, temperature=0.0, stop_ids=())
    assert (len(found.ids), found.finish_reason) == (28, "length")
    with pytest.raises(mixtral.MixtralError, match="prompt has 128 tokens and the context of this model is 128"):
        llm.generate([1] * 128)


def test_the_end_token_is_that_of_the_config(llm: mixtral.LLM, tmp_path: Path) -> None:
    free = llm.generate([1, 5, 9], temperature=0.0, max_tokens=9, stop_ids=())
    end = free.ids[4]
    llm.save(tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": end}))
    found = mixtral.load(tmp_path / "other").generate([1, 5, 9], temperature=0.0, max_tokens=9)
    assert found.ids == free.ids[: free.ids.index(end) + 1]
    assert found.finish_reason == "stop"


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_what_is_saved_can_be_loaded(llm: mixtral.LLM, layout: Any, tmp_path: Path) -> None:
    llm.save(str(tmp_path / "copy"), layout=layout)
    ids = [1, 5, 9]
    assert torch.equal(mixtral.load(tmp_path / "copy").logits(ids), llm.logits(ids))
    with pytest.raises(mixtral.MixtralError, match="not empty"):
        llm.save(tmp_path / "copy", layout=layout)
    llm.save(tmp_path / "copy", layout=layout, overwrite=True)


def test_no_stop_strings_may_be_none_as_in_the_openai_client(llm: mixtral.LLM) -> None:
    assert llm.generate("hello", stop=None, **GREEDY).text == llm.generate("hello", **GREEDY).text
    assert llm.chat([USER], stop=None, **GREEDY) == llm.chat([USER], **GREEDY)


def test_closing_a_stream_frees_the_pages(llm: mixtral.LLM) -> None:
    deltas = llm.generate([1] * 70, stream=True, max_tokens=20, stop_ids=())
    next(deltas)
    assert llm.generator.pages_in_use == 2
    deltas.close()  # type: ignore[attr-defined]
    assert llm.generator.pages_in_use == 0


# --- chat -------------------------------------------------------------------------------------------------------------


def test_chat_continues_the_encoded_conversation(llm: mixtral.LLM) -> None:
    prompt = encode_chat(llm.tokenizer, [USER]).ids
    answer = llm.chat([USER], **GREEDY)
    ids = llm.generate(prompt, **GREEDY).ids
    assert answer.usage == mixtral.Usage(len(prompt), len(ids))
    assert (answer.content, answer.tool_calls) == (llm.tokenizer.decode(ids), [])
    streamed = list(llm.chat([USER], stream=True, **GREEDY))
    assert "".join(delta.content for delta in streamed) == answer.content
    assert (streamed[-1].finish_reason, streamed[-1].usage) == (answer.finish_reason, answer.usage)


def test_calls_are_read(scripted: mixtral.LLM) -> None:
    tokenizer = scripted.tokenizer
    text = '[{"name": "hours", "arguments": {"place": "Castle"}}]'
    ids = [*tokenizer.encode("One moment"), tokenizer.control_id("[TOOL_CALLS]"), *tokenizer.encode(text), 2]
    scripted.generator = script = Script(ids)  # type: ignore[assignment]
    answer = scripted.chat([USER], tools=[TOOL])
    assert (answer.content, answer.finish_reason) == ("One moment", "tool_calls")
    assert [(call.name, call.arguments) for call in answer.tool_calls] == [("hours", '{"place": "Castle"}')]
    assert answer.usage.completion_tokens == len(ids)
    assert script.closed
    deltas = list(scripted.chat([USER], tools=[TOOL], stream=True))
    assert "".join(delta.content for delta in deltas) == "One moment"
    assert [len(delta.tool_calls) for delta in deltas[-2:]] == [0, 1]


def test_calls_that_were_cut_short_are_not_read(scripted: mixtral.LLM) -> None:
    ids = [scripted.tokenizer.control_id("[TOOL_CALLS]"), *scripted.tokenizer.encode('[{"name": "ho')]
    scripted.generator = Script(ids)  # type: ignore[assignment]
    answer = scripted.chat([USER], tools=[TOOL], max_tokens=len(ids))
    assert (answer.content, answer.tool_calls, answer.finish_reason) == ("", [], "length")


def test_calls_that_cannot_be_read_are_an_error(scripted: mixtral.LLM) -> None:
    ids = [scripted.tokenizer.control_id("[TOOL_CALLS]"), *scripted.tokenizer.encode("nonsense"), 2]
    scripted.generator = script = Script(ids)  # type: ignore[assignment]
    with pytest.raises(MessagesError, match="nonsense"):
        scripted.chat([USER], tools=[TOOL])
    assert script.closed


def test_stop_strings_in_a_conversation(scripted: mixtral.LLM) -> None:
    scripted.generator = Script([*scripted.tokenizer.encode("Breakfast is at seven."), 2])  # type: ignore[assignment]
    answer = scripted.chat([USER], stop=[" at"])
    assert (answer.content, answer.finish_reason) == ("Breakfast is", "stop")


def test_an_assistant_prefix_is_continued_with_its_space(scripted: mixtral.LLM) -> None:
    scripted.generator = Script([*scripted.tokenizer.encode("at seven."), 2])  # type: ignore[assignment]
    messages = [USER, {"role": "assistant", "content": "Breakfast is", "prefix": True}]
    assert scripted.chat(messages).content == " at seven."
    assert scripted.chat([USER]).content == "at seven."


def test_the_model_is_an_engine_for_the_server(llm: mixtral.LLM) -> None:
    with serving_model(llm) as client:
        body = {"model": "town", "messages": [USER], "temperature": 0, "max_tokens": 12}
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == llm.chat([USER], **GREEDY).content
