"""A model folder with one defect: the server does not start, and says in one line what is wrong with which file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import serving, until

from mixtral.build import build_engine
from mixtral.config import MixtralConfig
from mixtral.engine.loop import EngineThread
from mixtral.errors import ConfigError
from mixtral.model import Mixtral, initialise
from mixtral.weights.save import save_model
from mixtral.wire import Start

W1 = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
FILE = "model.safetensors"


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = load_file(folder / FILE)
        change(found)
        save_file(found, folder / FILE)

    return apply


def config(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def data(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: folder.joinpath(FILE).write_bytes(change((folder / FILE).read_bytes())) and None


def flipped_beside_sums(folder: Path) -> None:
    sums = hashlib.sha256((folder / FILE).read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{sums}  {FILE}\n")
    data(lambda found: found[:-9] + bytes([found[-9] ^ 1]) + found[-8:])(folder)


DEFECTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a tensor is missing": (tensors(lambda found: found.pop(W1)), W1),
    "a tensor too many": (tensors(lambda found: found.update(more=torch.zeros(2))), "more"),
    "another shape": (tensors(lambda found: found.update({W1: torch.zeros(3, 5)})), W1),
    "another count of experts": (config(num_local_experts=3), "expert"),
    "another width": (config(hidden_size=48), "hidden_size 48"),
    "a key that is unknown": (config(num_local_expert=4), "num_local_expert"),
    "a vocabulary without a tokenizer": (config(vocab_size=31_000), "31"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "cut in the data": (data(lambda found: found[:-1]), FILE),
    "cut in the header": (data(lambda found: found[:100]), FILE),
    "more than the header says": (data(lambda found: found + b"\x00"), FILE),
    "a bit of the header's length": (data(lambda found: bytes([found[0] ^ 64]) + found[1:]), FILE),
    "a bit of the header": (data(lambda found: found[:20] + bytes([found[20] ^ 4]) + found[21:]), ""),
    "a weight that is not finite": (
        tensors(lambda found: found[W1].view(-1)[5].fill_(torch.nan)),
        f"'{W1}' holds NaN or infinities; the weights are damaged",
    ),
    "a bit of the data, where there are sums": (flipped_beside_sums, f"{FILE}: sha256 is "),
    "no weights": (lambda folder: (folder / FILE).unlink(), "safetensors"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("good")
    model = Mixtral(
        MixtralConfig(
            vocab_size=32_000,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=128,
        ),
        dtype=torch.bfloat16,
    )
    initialise(model, seed=0)
    save_model(model, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def written(good: dict[str, bytes], folder: Path) -> Path:
    for name, content in good.items():
        (folder / name).write_bytes(content)
    return folder


def start(folder: Path) -> Any:
    """An engine as a thread; the same code as its process runs."""
    return lambda: EngineThread(lambda: build_engine(Start(model=str(folder), threads=1)))


def test_the_good_folder_is_served(good: dict[str, bytes], tmp_path: Path) -> None:
    assert FILE in good
    with serving(start(written(good, tmp_path))) as (_, client, server):
        assert client.state == "ready"
        assert server.fault is None


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_ends_the_start(name: str, good: dict[str, bytes], tmp_path: Path) -> None:
    break_it, told = DEFECTS[name]
    break_it(written(good, tmp_path))
    with serving(start(tmp_path), wait=False, fails=True) as (_, client, server):
        until(lambda: server.fault is not None)
        assert client.state == "dead"
    assert isinstance(server.fault, ConfigError)
    assert told in str(server.fault)
    assert client.supervisor.restarts == 0
