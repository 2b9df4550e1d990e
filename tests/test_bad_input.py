"""Wrong input of every kind, to the command line, the API and the server: one clear line and exit code 2, or 400."""

from __future__ import annotations

import functools
import json
import shutil
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import load_file, save_file
from threaded import serving_model

import mixtral
from mixtral.cli import main
from mixtral.config import MixtralConfig
from mixtral.errors import MixtralError
from mixtral.model import Mixtral, initialise
from mixtral.weights import save_model

Capture = pytest.CaptureFixture[str]
CONFIG = MixtralConfig(
    vocab_size=32000,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    num_local_experts=2,
    num_experts_per_tok=2,
    max_position_embeddings=64,
)
ONE_TOKEN = ["--prompt", "hello", "--max-tokens", "1"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint of a tiny model with the v1 vocabulary."""
    generator = torch.Generator().manual_seed(0)
    model = Mixtral(CONFIG, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    folder = tmp_path_factory.mktemp("models") / "good"
    save_model(model, folder, shard_size_bytes=2_200_000)
    return folder


@pytest.fixture(scope="module")
def llm(good: Path) -> mixtral.LLM:
    return mixtral.load(good)


@pytest.fixture(scope="module")
def client(llm: mixtral.LLM) -> Iterator[TestClient]:
    with serving_model(llm) as client:
        yield client


def fails(arguments: list[str], message: str, capsys: Capture) -> None:
    """Run a command and check that it ends with code 2 and one line that contains the message."""
    code = main(arguments)
    captured = capsys.readouterr()
    assert code == 2, captured
    assert captured.out == ""
    assert captured.err.startswith("mixtral: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_the_good_folder_works(good: Path, capsys: Capture) -> None:
    assert main(["generate", "--model", str(good), *ONE_TOKEN, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["finish_reason"] == "length"


# --- folders: name -> what is done to a good one, and what the message must say ---------------------------------------


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """All tensors in one file, changed."""

    def damage(folder: Path) -> None:
        tensors = {name: tensor for shard in shards(folder) for name, tensor in load_file(shard).items()}
        for path in (*shards(folder), folder / "model.safetensors.index.json"):
            path.unlink()
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def truncate(folder: Path) -> None:
    shard = shards(folder)[-1]
    shard.write_bytes(shard.read_bytes()[:-100])


def header_lies_about_its_length(folder: Path) -> None:
    shard = shards(folder)[0]
    shard.write_bytes(struct.pack("<Q", 2**62) + shard.read_bytes()[8:])


def header_lies_about_a_tensor(folder: Path) -> None:
    shard = shards(folder)[0]
    data = shard.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"][0] += 1
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def index_leaves_the_folder(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {name: "../" + shard for name, shard in index["weight_map"].items()}
    path.write_text(json.dumps(index))


GATE = "model.layers.0.block_sparse_moe.gate.weight"
FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config missing": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "config not JSON": (write("config.json", b"{"), "not JSON"),
    "config not UTF-8": (write("config.json", b'{"a": "\xff"}'), "not UTF-8"),
    "config not an object": (write("config.json", b"[]"), "expected a JSON object"),
    "config with an unknown key": (edit_config(num_local_expert=2), "did you mean 'num_local_experts'?"),
    "config of another architecture": (edit_config(model_type="llama"), "model_type is 'llama'"),
    "config with a number beyond floats": (edit_config(rope_theta=10**400), "expected a finite number"),
    "config with a number of 5,000 digits": (write("config.json", b'{"vocab_size": ' + b"9" * 5000 + b"}"), "not JSON"),
    "config of quantised weights": (edit_config(quantization_config={"bits": 4}), "quant_method is None"),
    "config with a negative number": (edit_config(num_hidden_layers=-1), "num_hidden_layers is -1"),
    "config with NaN": (edit_config(rope_theta=float("nan")), "rope_theta is nan"),
    "config with a number as text": (edit_config(hidden_size="16"), "hidden_size is '16'"),
    "shard missing": (lambda f: shards(f)[-1].unlink(), ".safetensors"),
    "shard truncated": (truncate, ".safetensors"),
    "shard of other content": (lambda f: shards(f)[0].write_bytes(b"hello"), ".safetensors"),
    "no weights at all": (lambda f: [p.unlink() for p in f.glob("*.safetensors*")], "safetensors"),
    "header longer than the file": (header_lies_about_its_length, ".safetensors"),
    "header with a wrong shape": (header_lies_about_a_tensor, ".safetensors"),
    "index not JSON": (write("model.safetensors.index.json", b"nonsense"), "index.json"),
    "index that leaves the folder": (index_leaves_the_folder, "../"),
    "tensor missing": (edit_tensors(lambda t: t.pop(GATE)), f"missing '{GATE}'"),
    "tensor too much": (edit_tensors(lambda t: t.update(extra=torch.ones(2))), "unexpected 'extra'"),
    "tensor of a wrong shape": (edit_tensors(lambda t: t.update({GATE: torch.ones(3, 16)})), "is [3, 16]"),
    "tensor of integers": (edit_tensors(lambda t: t.update({GATE: t[GATE].int()})), "I32"),
    "bias": (edit_tensors(lambda t: t.update({"lm_head.bias": torch.ones(32000)})), "'lm_head.bias'"),
    "vocabulary that does not match": (edit_config(vocab_size=32768), "vocab_size 32768, but the tensors have 32000"),
    "layers that do not match": (edit_config(num_hidden_layers=2), "num_hidden_layers"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_damaged_folder(kind: str, good: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    damage, message = FOLDERS[kind]
    damage(folder)
    fails(["generate", "--model", str(folder), *ONE_TOKEN], message, capsys)


# --- options of the command line --------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[list[str], str]] = {
    "folder missing": (["generate", "--model", "no/such/folder", *ONE_TOKEN], "no/such/folder: no such folder"),
    "file instead of a folder": (["generate", "--model", "{good}/config.json", *ONE_TOKEN], "is a file"),
    "preset instead of a folder": (["generate", "--model", "8x7b", *ONE_TOKEN], "'8x7b' is a preset"),
    "unknown preset": (["inspect", "8x8b"], "expected a folder"),
    "unknown dtype": (["generate", "--model", "{good}", "--dtype", "int3", *ONE_TOKEN], "dtype is 'int3'"),
    "unknown device": (["generate", "--model", "{good}", "--device", "abacus", *ONE_TOKEN], "device is 'abacus'"),
    "device that is not here": (["generate", "--model", "{good}", "--device", "xpu:9", *ONE_TOKEN], "xpu:9"),
    "meta device": (["generate", "--model", "{good}", "--device", "meta", *ONE_TOKEN], "device is 'meta'"),
    "prompt empty": (["generate", "--model", "{good}", "--prompt", ""], "the prompt is empty"),
    "ids empty": (["generate", "--model", "{good}", "--ids", ""], "empty"),
    "ids no numbers": (["generate", "--model", "{good}", "--ids", "1,x"], "--ids is '1,x'"),
    "id outside the vocabulary": (["generate", "--model", "{good}", "--ids", "32000"], "token id is 32000"),
    "negative id": (["generate", "--model", "{good}", "--ids", "-1"], "token id is -1"),
    "prompt and ids": (["generate", "--model", "{good}", "--ids", "1", "--prompt", "a"], "both given"),
    "prompt longer than the context": (["generate", "--model", "{good}", "--prompt", "one " * 80], "context"),
    "answer longer than the context": (
        ["generate", "--model", "{good}", "--prompt", "a", "--max-tokens", "63"],
        "prompt 2 + max_tokens 63",
    ),
    "negative max tokens": (
        ["generate", "--model", "{good}", "--prompt", "a", "--max-tokens", "-1"],
        "max_tokens is -1",
    ),
    "zero max tokens": (["generate", "--model", "{good}", "--prompt", "a", "--max-tokens", "0"], "max_tokens is 0"),
    "huge max tokens": (
        ["generate", "--model", "{good}", "--prompt", "a", "--max-tokens", "9" * 30],
        "max_tokens is 999",
    ),
    "unknown option": (["generate", "--maxtokens", "3"], "--maxtokens"),
    "no threads": (["generate", "--model", "{good}", "--threads", "0", *ONE_TOKEN], "--threads"),
    "options are checked before the model": (
        ["generate", "--model", "nowhere", "--temperature", "3", *ONE_TOKEN],
        "temperature is 3",
    ),
    "chat: options are checked before the model": (["chat", "--model", "nowhere", "--top-p", "2"], "top_p is 2"),
    "chat: model without a tokenizer": (["chat", "--model", "{new}/ids"], "no tokenizer fits the vocabulary of 40"),
    "serve: port in use": (["serve", "--model", "{good}", "--port", "{port}"], "cannot listen on 127.0.0.1:{port}"),
    "serve: port of 400 digits": (["serve", "--model", "{good}", "--port", "9" * 400], "port is 999"),
    "serve: port out of range": (["serve", "--model", "{good}", "--port", "70000"], "port is 70000"),
    "serve: open to everybody": (["serve", "--model", "{good}", "--host", "0.0.0.0"], "host is '0.0.0.0'"),
    "serve: model missing": (["serve", "--model", "nowhere"], "nowhere: no such folder"),
    "chat: model missing": (["chat", "--model", "nowhere"], "nowhere: no such folder"),
    "inspect: nothing given": (["inspect"], "Missing argument"),
    "no such command": (["generat"], "No such command 'generat'"),
    "train: no command": (["train"], "Missing command"),
    "train: config missing": (["train", "pretrain", "{new}/no.toml", "--out", "{new}/run"], "no.toml: cannot be read"),
    "train: config with an unknown key": (
        ["train", "pretrain", "{new}/unknown.toml", "--out", "{new}/run"],
        "unknown.toml: run: unknown key 'step' (did you mean 'steps'?)",
    ),
    "train: config not TOML": (["train", "pretrain", "{good}/config.json", "--out", "{new}/run"], "not TOML"),
    "train: a file in the place of the run": (
        ["train", "pretrain", "{new}/right.toml", "--out", "{good}/config.json"],
        "config.json: File exists",
    ),
    "train: time below zero": (["train", "pretrain", "a", "--out", "b", "--max-seconds", "-1"], "--max-seconds"),
    "export: folder missing": (["train", "export", "{new}/nothing", "{new}/model"], "nothing: no such folder"),
    "export: folder without states": (["train", "export", "{good}", "{new}/model"], "holds no whole run state"),
    "evaluate: unknown suite": (["evaluate", "--model", "{good}", "--suite", "sums"], "unknown suite 'sums'"),
    "evaluate: count zero": (["evaluate", "--model", "{good}", "--count", "0"], "--count"),
    "evaluate: training split": (["evaluate", "--model", "{good}", "--split", "train"], "--split"),
    "evaluate: no folder for the scores": (["evaluate", "--model", "{good}", "--json", "{new}/a/b.json"], "--json is"),
    "evaluate: model missing": (["evaluate", "--model", "nowhere"], "nowhere: no such folder"),
    "evaluate: model without functions": (
        ["evaluate", "--model", "{good}", "--suite", "calls/none", "--count", "1"],
        "v1",
    ),
}
TRAINING = {
    "right": 'model = { preset = "tiny" }\nrun = { steps = 1 }',
    "unknown": 'model = { preset = "tiny" }\nrun = { steps = 1, step = 1 }',
}
SAMPLING = {
    "negative max tokens": ("--max-tokens", "-1", "max_tokens is -1"),
    "zero max tokens": ("--max-tokens", "0", "max_tokens is 0"),
    "huge max tokens": ("--max-tokens", "9" * 30, "max_tokens is 999"),
    "temperature NaN": ("--temperature", "nan", "temperature is nan"),
    "temperature infinite": ("--temperature", "inf", "temperature is inf"),
    "temperature too high": ("--temperature", "3", "temperature is 3"),
    "temperature negative": ("--temperature", "-1", "temperature is -1"),
    "temperature no number": ("--temperature", "warm", "--temperature"),
    "top_p too high": ("--top-p", "2", "top_p is 2"),
    "top_k not whole": ("--top-k", "-1.5", "--top-k"),
    "top_k negative": ("--top-k", "-1", "top_k is -1"),
    "min_p negative": ("--min-p", "-0.1", "min_p is -0.1"),
    "repetition penalty zero": ("--repetition-penalty", "0", "repetition_penalty is 0"),
    "presence penalty too high": ("--presence-penalty", "5", "presence_penalty is 5"),
    "frequency penalty NaN": ("--frequency-penalty", "nan", "frequency_penalty is nan"),
    "seed no number": ("--seed", "abc", "--seed"),
    "seed too large": ("--seed", str(2**63), f"seed is {2**63}"),
    "seed of 400 digits": ("--seed", "9" * 400, "seed is 999"),
    "logprobs too many": ("--logprobs", "21", "logprobs is 21"),
    "stop empty": ("--stop", "", "stop[0] is empty"),
}
OPTIONS |= {
    name: (["generate", "--model", "{good}", *ONE_TOKEN, flag, value], message)
    for name, (flag, value, message) in SAMPLING.items()
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_wrong_option(kind: str, good: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments, message = OPTIONS[kind]
    for name, text in TRAINING.items():
        (tmp_path / f"{name}.toml").write_text(text)
    ids = Mixtral(CONFIG.replace(vocab_size=40), device="cpu", dtype=torch.float32)
    initialise(ids, seed=0)
    save_model(ids, tmp_path / "ids")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        places = {"{good}": str(good), "{new}": str(tmp_path), "{port}": port}
        filled = [functools.reduce(lambda text, place: text.replace(*place), places.items(), e) for e in arguments]
        fails(filled, message.replace("{port}", port), capsys)


def test_there_are_enough_kinds() -> None:
    assert len(FOLDERS) + len(OPTIONS) >= 30


# --- the Python API ---------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALLS: dict[str, tuple[Callable[[mixtral.LLM], Any], str]] = {
    "unknown parameter": (lambda m: m.generate("a", temprature=1), "did you mean 'temperature'?"),
    "prompt of a wrong type": (lambda m: m.generate(5), "of type int"),  # type: ignore[call-overload]
    "bytes as prompt": (lambda m: m.generate(b"ab"), "of type bytes"),
    "a number among texts": (lambda m: m.generate(["a", 5]), "of type int"),
    "stop that is no text": (lambda m: m.generate("a", stop=[5]), "stop[0] is 5"),
    "stop of a wrong type": (lambda m: m.generate("a", stop=5), "stop is 5"),  # type: ignore[arg-type,call-overload]
    "stop ids of a wrong type": (lambda m: m.generate("a", stop_ids=5), "stop_ids is 5"),
    "stop ids that are no ids": (lambda m: m.generate("a", stop_ids=["x"]), "stop_ids is ['x']"),
    "temperature of 400 digits": (lambda m: m.generate("a", temperature=10**400), "temperature is 1000"),
    "empty stop in a stream": (lambda m: m.chat([USER], stop=[""], stream=True), "stop[0] is empty"),
    "chat stream checks at once": (lambda m: m.chat([USER], stream=True, top_p=2), "top_p is 2"),
    "empty list": (lambda m: m.generate([]), "empty"),
    "empty among prompts": (lambda m: m.generate(["a", ""]), "the prompt is empty"),
    "text among ids": (lambda m: m.generate([1, "a"]), "token id is 'a'"),
    "seed of a wrong type": (lambda m: m.generate("a", seed=1.5), "seed is 1.5"),
    "boolean as number": (lambda m: m.generate("a", top_k=True), "top_k is True"),
    "stream checks at once": (lambda m: m.generate("a", stream=True, max_tokens=0), "max_tokens is 0"),
    "no messages": (lambda m: m.chat([]), "messages"),
    "unknown role": (lambda m: m.chat([{"role": "wizard", "content": "a"}]), "wizard"),
    "assistant speaks last": (lambda m: m.chat([USER, {"role": "assistant", "content": "a"}]), "assistant"),
    "message without content": (lambda m: m.chat([{"role": "user"}]), "content"),
    "tools in v1": (lambda m: m.chat([USER], tools=[TOOL]), "v1"),
    "conversation longer than the context": (lambda m: m.chat([USER | {"content": "one " * 80}]), "64"),
    "logits of nothing": (lambda m: m.logits([]), "empty"),
    "logits of a tensor": (lambda m: m.logits(torch.tensor([1, 2])), "of type Tensor"),  # type: ignore[arg-type]
    "device that is no name": (lambda m: mixtral.load("x", device=None), "device is None"),  # type: ignore[arg-type]
    "dtype that is no name": (lambda m: mixtral.load("x", dtype=[]), "dtype is []"),  # type: ignore[arg-type]
    "no threads": (lambda m: mixtral.load(".", threads=0), "threads is 0"),
    "layout of no file": (lambda m: m.save("x", layout="gguf"), "layout is 'gguf'"),  # type: ignore[arg-type]
    "logits of a wrong id": (lambda m: m.logits([32000]), "token id is 32000"),
    "logits beyond the context": (lambda m: m.logits([1] * 65), "needs 65 tokens"),
}


@pytest.mark.parametrize("kind", CALLS)
def test_wrong_call(kind: str, llm: mixtral.LLM) -> None:
    call, message = CALLS[kind]
    with pytest.raises(MixtralError) as caught:
        call(llm)
    assert message in str(caught.value)
    assert llm.generator.pages_in_use == 0


# --- the server -------------------------------------------------------------------------------------------------------

IMAGE = {"type": "image_url", "image_url": {"url": "a"}}
BODIES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"temprature": 1}, "temprature"),
    "negative max_tokens": ({"max_tokens": -1}, "max_tokens"),
    "max_tokens beyond the context": ({"max_tokens": 1000}, "context"),
    "temperature too high": ({"temperature": 3}, "temperature"),
    "top_p as text": ({"top_p": "1"}, "top_p"),
    "unknown role": ({"messages": [{"role": "wizard", "content": "a"}]}, "wizard"),
    "no messages": ({"messages": []}, "messages"),
    "image": (
        {"messages": [{"role": "user", "content": [IMAGE]}]},
        "image_url",
    ),
    "tools in v1": ({"tools": [TOOL]}, "v1"),
    "long prompt": ({"messages": [USER | {"content": "one " * 80}]}, "64"),
    "empty stop": ({"stop": [""]}, "stop"),
    "seed not whole": ({"seed": 1.5}, "seed"),
}


@pytest.mark.parametrize("kind", BODIES)
def test_wrong_body(kind: str, client: TestClient) -> None:
    changes, message = BODIES[kind]
    answer = client.post("/v1/chat/completions", json={"model": "good", "messages": [USER]} | changes)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]


@pytest.mark.slow
def test_no_traceback_in_a_real_process(good: Path) -> None:
    """The same through the installed entry point: nothing but the line on standard error."""
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "mixtral", "generate", "--model", str(good / "nothing"), "--prompt", "a"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=Path(mixtral.__file__).parents[1],
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mixtral: error: ")
    assert done.stderr.count("\n") == 1
