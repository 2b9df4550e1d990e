"""``generate``, ``chat``, ``inspect`` and ``serve`` on a tiny model."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mixtral
from mixtral.bench.random_model import create_model
from mixtral.build import build_engine
from mixtral.cli import chat, main, output
from mixtral.config import MixtralConfig
from mixtral.engine.loop import EngineThread
from mixtral.errors import CapacityError
from mixtral.model.mixtral import Mixtral
from mixtral.ops import devices
from mixtral.tokenizer import ToolCall
from mixtral.weights import save_compact, save_model
from mixtral.weights.vocab import row_map

Capture = pytest.CaptureFixture[str]
CONFIG = MixtralConfig(
    vocab_size=32768,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    num_local_experts=2,
    num_experts_per_tok=2,
    max_position_embeddings=128,
)
GREEDY = ["--temperature", "0", "--max-tokens", "9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(3)
    model = Mixtral(CONFIG, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    folder = tmp_path_factory.mktemp("models") / "town"
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> mixtral.LLM:
    return mixtral.load(folder)


def types(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_generate_text_json_and_stream_agree(folder: Path, llm: mixtral.LLM, capsys: Capture) -> None:
    expected = llm.generate("hello", temperature=0.0, max_tokens=9)
    command = ["generate", "--model", str(folder), "--prompt", "hello", *GREEDY]
    shown = "".join(output._CONTROL.get(ord(c), c) for c in expected.text)
    assert main(command) == 0
    assert capsys.readouterr().out == shown + "\n"
    assert main([*command, "--stream"]) == 0
    assert capsys.readouterr().out == shown + "\n"
    assert main([*command, "--json", "--seed", "7", "--logprobs", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["text"], found["ids"], found["seed"]) == (expected.text, expected.ids, 7)
    assert (found["prompt_tokens"], found["completion_tokens"]) == (expected.prompt_tokens, 9)
    assert [token["top"][0]["id"] for token in found["logprobs"]] == expected.ids
    assert main([*command, "--json", "--stream"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "".join(line["text"] for line in lines) == expected.text
    assert [line["finish_reason"] for line in lines] == [None] * 8 + ["length"]


def test_generate_from_ids_and_standard_input(
    folder: Path, llm: mixtral.LLM, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["generate", "--model", str(folder), "--json", *GREEDY]
    assert main([*command, "--ids", "1 5 9"]) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == llm.generate([1, 5, 9], temperature=0.0, max_tokens=9).ids
    types(monkeypatch, "hello")
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == llm.generate("hello", temperature=0.0, max_tokens=9).ids


def test_generate_shows_logprobs_as_lines(folder: Path, capsys: Capture) -> None:
    command = ["generate", "--model", str(folder), "--ids", "1", "--logprobs", "2", *GREEDY]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()[-9:]
    assert all(line.count(" -") == 3 and "  |  " in line for line in lines)


def test_generate_without_tokenizer_shows_ids(tmp_path: Path, capsys: Capture) -> None:
    model = Mixtral(CONFIG.replace(vocab_size=40), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
    save_model(model, tmp_path / "ids")
    command = ["generate", "--model", str(tmp_path / "ids"), "--ids", "1", *GREEDY, "--logprobs", "0"]
    assert main(command) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert [int(word) for word in first.split()] == [int(line.split()[0]) for line in rest]
    assert main([*command, "--stream"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == first.split()


def test_packed_weights_are_kept_and_used(tmp_path: Path, capsys: Capture) -> None:
    config = CONFIG.replace(vocab_size=96, hidden_size=256, intermediate_size=256, head_dim=128)
    create_model(config, tmp_path / "x.gguf", form="q4_k_s", name="x", vocabulary=lambda size: {})
    command = ["generate", "--model", str(tmp_path / "x.gguf"), "--ids", "1", *GREEDY]
    assert main(command) == 0
    expected, cache = capsys.readouterr().out, tmp_path / "cache"
    for _ in range(2):
        assert main([*command, "--packed-cache", str(cache)]) == 0
        assert capsys.readouterr().out == expected
    assert sorted(path.suffix for path in cache.iterdir()) == [".known", ".safetensors"]
    assert main([*command, "--packed-cache", str(cache), "--reference"]) == 2
    assert "packed_cache is for compiled kernels" in capsys.readouterr().err


def test_chat_holds_a_conversation(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    types(monkeypatch, "hello\n/system Be brief.\nhello\n/help\n\n/nonsense\n/reset\n/quit\nnever read\n")
    assert main(["chat", "--model", str(folder), "--max-tokens", "5"]) == 0
    captured = capsys.readouterr()
    assert chat.HELP in captured.out
    assert captured.err == "unknown command /nonsense; /help lists them\n"


class Talker:
    """Answers with scripted deltas; an exception in the script is raised."""

    name = "talker"

    def __init__(self, *script: Any) -> None:
        self.script = list(script)
        self.seen: list[list[dict[str, Any]]] = []

    def chat(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        self.seen.append([dict(message) for message in messages])
        for step in self.script.pop(0):
            if isinstance(step, BaseException):
                raise step
            yield step if isinstance(step, mixtral.ChatDelta) else mixtral.ChatDelta(step)


def roles(conversation: chat.Conversation) -> list[str]:
    return [message["role"] for message in conversation.messages]


def test_conversation_remembers_and_forgets(capsys: Capture) -> None:
    talker = Talker(["Hel", "lo"], ["Bye"], ["Again"])
    conversation = chat.Conversation(talker, "Be brief.", {})  # type: ignore[arg-type]
    assert conversation.take("hi")
    assert conversation.take("  ")
    assert conversation.take("bye")
    assert roles(conversation) == ["system", "user", "assistant", "user", "assistant"]
    assert talker.seen[1][2] == {"role": "assistant", "content": "Hello"}
    conversation.take("/reset")
    assert roles(conversation) == ["system"]
    conversation.take("/system")
    assert roles(conversation) == []
    conversation.take("/system Speak French.")
    conversation.take("encore")
    assert talker.seen[2][0] == {"role": "system", "content": "Speak French."}
    assert not conversation.take("/quit")
    assert capsys.readouterr().out == "Hello\nBye\nAgain\n"


def test_control_c_stops_the_answer_only(capsys: Capture) -> None:
    talker = Talker(["Hel", KeyboardInterrupt()], [KeyboardInterrupt()], ["Bye"])
    conversation = chat.Conversation(talker, "", {})  # type: ignore[arg-type]
    assert conversation.take("hi")
    assert conversation.messages[-1] == {"role": "assistant", "content": "Hel"}
    assert conversation.take("and?")
    assert roles(conversation) == ["user", "assistant"]
    assert conversation.take("bye")
    assert roles(conversation) == ["user", "assistant", "user", "assistant"]
    assert capsys.readouterr().out == "Hel (stopped)\n (stopped)\nBye\n"


def test_cut_answers_and_calls_are_shown(capsys: Capture) -> None:
    call = ToolCall("abcdefghi", "hours", '{"place": "Castle"}')
    talker = Talker([mixtral.ChatDelta("Hel", [], "length")], [mixtral.ChatDelta("", [call], "tool_calls")])
    conversation = chat.Conversation(talker, "", {})  # type: ignore[arg-type]
    conversation.take("hi")
    conversation.take("open?")
    assert capsys.readouterr().out == 'Hel (cut: --max-tokens)\n[hours {"place": "Castle"}]\n'


def test_an_error_ends_a_script_but_not_a_person(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    talker = Talker([CapacityError("too long")], [CapacityError("too long")])
    conversation = chat.Conversation(talker, "", {})  # type: ignore[arg-type]
    with pytest.raises(CapacityError):
        conversation.take("hi")
    assert conversation.messages == []
    monkeypatch.setattr(output, "interactive", lambda: True)
    assert conversation.take("hi")
    assert conversation.messages == []
    assert capsys.readouterr().err == "mixtral: error: too long\n"


def test_an_error_begins_a_line_of_its_own(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "interactive", lambda: True)
    conversation = chat.Conversation(Talker(["Hel", CapacityError("full")]), "", {})  # type: ignore[arg-type]
    assert conversation.take("hi")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("Hel\n", "mixtral: error: full\n")
    assert conversation.messages == []


def test_threads_are_set_for_the_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    # The reference path, because the compiled one lends torch's threads to the kernels in every step.
    assert main(["generate", "--model", str(folder), "--ids", "1", *GREEDY, "--reference", "--threads", "3"]) == 0
    assert main(["generate", "--model", str(folder), "--ids", "1", *GREEDY, "--reference"]) == 0
    assert seen == [3]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for cores in (2, 4, 8):  # by default what the process may use, but no more than torch has been given
        monkeypatch.setattr(devices, "usable_cores", lambda cores=cores: cores)
        assert main(["generate", "--model", str(folder), "--ids", "1", *GREEDY, "--reference"]) == 0
    assert seen == [3, 2]


def test_inspect_reads_a_folder_without_loading_it(folder: Path, capsys: Capture) -> None:
    assert main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    files = found["files"]
    assert (files["layout"], files["tensors"], files["dtypes"], files["shards"]) == ("per-expert", 16, {"F32": 16}, 1)
    assert files["bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert found["parameters"]["total"] == sum(p.numel() for p in Mixtral(CONFIG, device="meta").parameters())
    assert main(["inspect", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "16 x F32" in text
    assert "per-expert" in text


def test_inspect_a_compact_folder(tmp_path: Path, capsys: Capture) -> None:
    config = CONFIG.replace(hidden_size=32, intermediate_size=32, num_attention_heads=4)
    model = Mixtral(config, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    save_compact(model, tmp_path / "c", row_of_id=row_map(range(9), 32768), respell={}, metadata={})
    assert main(["inspect", str(tmp_path / "c"), "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert files["layout"].startswith("compact")
    assert set(files["dtypes"]) == {"I8", "F16", "F32", "I32"}


def test_inspect_a_folder_with_a_config_only(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == {}


def test_serve_hands_the_model_to_the_server(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def serve(engine: Any, config: Any, *, grammar: Any, on_ready: Any) -> None:
        async def ready() -> None:
            await engine.start()
            await engine.until_ready()
            grammar.check(grammar.text_constraint({"type": "json_object"}))  # with the vocabulary of the engine
            grammar.close()
            seen.extend((engine, config))
            on_ready("http://127.0.0.1:1234")
            logging.getLogger("mixtral.server").info("a request")
            await engine.close()

        asyncio.run(ready())

    monkeypatch.setattr("mixtral.server.serve", serve)
    monkeypatch.setattr("mixtral.server.process", lambda start: lambda: EngineThread(lambda: build_engine(start)))
    options = {
        "--model": str(folder),
        "--port": "1234",
        "--served-model-name": "desk",
        "--allowed-host": "a.b",
        "--max-model-len": "100",
        "--max-num-seqs": "3",
        "--kv-cache-memory": "1M",
    }
    assert main(["serve", *(word for option in options.items() for word in option)]) == 0
    engine, config = seen
    assert (engine.name, engine.context, engine.tokenizer.version) == ("desk", 100, "v3")
    assert engine.cache_tokens % 64 == 0
    assert (config.port, config.host, config.allowed_hosts) == (1234, "127.0.0.1", ("a.b",))
    shown = capsys.readouterr().err
    assert "desk is ready: http://127.0.0.1:1234" in shown
    assert shown.endswith(" a request\n")
    assert logging.getLogger("mixtral").level == logging.NOTSET
