"""What ``mixtral inspect`` calls odd: each kind is planted in a checkpoint that has nothing odd, and is found alone."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral.cli import main
from mixtral.config import PRESETS, MixtralConfig
from mixtral.files.gguf import read_gguf
from mixtral.files.gguf_write import GgufRecord, write_gguf
from mixtral.files.safetensors import INDEX_NAME
from mixtral.model.mixtral import Mixtral
from mixtral.quant.formats import FORMATS
from mixtral.weights.checkpoint import open_checkpoint
from mixtral.weights.convert import convert
from mixtral.weights.names import tensors
from mixtral.weights.oddities import config_oddities, oddities
from mixtral.weights.save import save_model

Capture = pytest.CaptureFixture[str]
CONFIG = MixtralConfig(
    vocab_size=32000,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_local_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=128,
)
WINDOW = "config.json: sliding_window is 4096, which is ignored: Mixtral has no sliding window"


def found_in(path: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return oddities(open_checkpoint(path, unpickle=True))


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "usual"
    model = Mixtral(CONFIG, device="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    save_model(model, folder, shard_size_bytes=2_100_000)
    return folder


@pytest.fixture
def copy(usual: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(usual, tmp_path / "copy"))


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, **changes}))

    return change


def retype(part: str, dtype: torch.dtype) -> Callable[[Path], None]:
    """All tensors with this part in their names, in another dtype."""

    def change(folder: Path) -> None:
        for shard in folder.glob("*.safetensors"):
            values = load_file(shard)
            if any(part in name for name in values):
                save_file({n: v.to(dtype) if part in n else v for n, v in values.items()}, shard)
        sizes = [len(v.untyped_storage()) for s in folder.glob("*.safetensors") for v in load_file(s).values()]
        edit(INDEX_NAME, metadata={"total_size": sum(sizes)})(folder)

    return change


def tokens(count: int) -> Callable[[Path], Any]:
    values = {"model": {"vocab": {f"t{i}": i for i in range(count - 1)}}, "added_tokens": [{"id": count - 1}]}
    return lambda folder: (folder / "tokenizer.json").write_text(json.dumps(values))


def another(source: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        shard = sorted(folder.glob("model*.safetensors"))[0]
        shutil.copy(shard, folder / source)

    return change


ODD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "window": (edit("config.json", sliding_window=4096), WINDOW),
    "theta": (edit("config.json", rope_theta=10000.0), "config.json: rope_theta is 10000.0 and is used, but every"),
    "jitter": (edit("config.json", router_jitter_noise=0.1), "config.json: router_jitter_noise is 0.1, which is ignor"),
    "two dtypes": (retype("w2", torch.float32), "matrices of several dtypes (22 x BF16, 8 x F32); loading needs"),
    "coarse norm": (
        lambda f: (retype("", torch.float32)(f), retype("norm", torch.bfloat16)(f)),
        "norms are stored in 3 x BF16, less than the matrices (30 x F32)",
    ),
    "coarse router": (
        lambda f: (retype("", torch.float32)(f), retype("moe.gate", torch.float16)(f)),
        "routers are stored in 1 x F16, less than the matrices (30 x F32)",
    ),
    "said dtype": (edit("config.json", torch_dtype="float16"), "config.json says the dtype 'float16', but the tensors"),
    "total size": (edit(INDEX_NAME, metadata={"total_size": 5}), "total_size is 5, but the tensors have 4,"),
    "no total size": (edit(INDEX_NAME, metadata=3), "total_size is None, but the tensors have"),
    "stray shard": (another("model-00009-of-00009.safetensors"), "model-00009-of-00009.safetensors beside the shards"),
    "tokenizer": (tokens(32768), "tokenizer.json has 32,768 tokens, but the embedding 32,000 rows"),
    "tokenizer damaged": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json: not JSON"),
    "tokenizer of another form": (lambda f: (f / "tokenizer.json").write_text('{"model": 1}'), "has 0 tokens"),
    "mistral too": (
        another("consolidated.safetensors"),
        "the folder also has a model as consolidated.* (consolidated.s",
    ),
    "archive too": (another("consolidated.00.pth"), "the folder also has a model as consolidated.* (consolidated.00.p"),
    "gguf too": (another("q4.gguf"), "has a model as GGUF (q4.gguf), which was not chosen; read is Hugging Face's"),
    "pickles too": (another("pytorch_model-00001-of-00002.bin"), "has a model as pytorch_model.*"),
    "adapter": (another("adapter_model.safetensors"), "adapter_model.safetensors: an adapter, which is not applied"),
    "left over": (another(".model.safetensors.replaced1"), ".model.safetensors.replaced1: left by a save that was"),
}
USUAL: dict[str, Callable[[Path], Any]] = {
    "as it was written": lambda f: None,
    "fitting tokenizer": tokens(32000),
    "other files": lambda f: (f / "README.md").write_text("hello"),
    "router in float32": retype("moe.gate", torch.float32),
}


@pytest.mark.parametrize("kind", USUAL)
def test_nothing_odd(kind: str, copy: Path) -> None:
    USUAL[kind](copy)
    assert found_in(copy) == []


@pytest.mark.parametrize("kind", ODD)
def test_one_thing_odd(kind: str, copy: Path) -> None:
    change, told = ODD[kind]
    change(copy)
    (said,) = [text for text in found_in(copy) if "says the dtype" not in text or kind == "said dtype"]
    assert told in said


def test_published_sizes(tmp_path: Path) -> None:
    """B4, C1: other numbers than those that Mistral published for a size."""

    def told(config: MixtralConfig) -> list[str]:
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
        return config_oddities(tmp_path, config)

    assert told(PRESETS["8x7b"]) == told(PRESETS["8x22b"]) == []
    assert told(PRESETS["8x22b"].replace(max_position_embeddings=32768, rms_norm_eps=1e-6)) == [
        "a context of 32,768 tokens; Mixtral 8x22b was trained for 65,536",
        "rms_norm_eps is 1e-06; Mixtral 8x22b has 1e-05",
    ]
    assert told(PRESETS["8x7b"].replace(num_local_experts=4, num_experts_per_tok=1, vocab_size=32002)) == [
        "4 experts, of which 1 see a token; every published Mixtral has 8 and 2",
        "a vocabulary of 32,002 entries is neither 32,000 (v1) nor 32,768 (v3): only token ids can be used",
    ]


def test_archives_are_odd_and_safetensors_are_not(usual: Path, tmp_path: Path) -> None:
    convert(usual, tmp_path / "m", layout="consolidated")
    assert found_in(tmp_path / "m") == []
    torch.save(load_file(tmp_path / "m" / "consolidated.safetensors"), tmp_path / "m" / "consolidated.00.pth")
    (tmp_path / "m" / "consolidated.safetensors").unlink()
    (said,) = found_in(tmp_path / "m")
    assert said.startswith("consolidated.00.pth is a pickle, which can carry code; mixtral convert --unpickle")


# --- GGUF: zeros of any format, with the metadata of a usual file -----------------------------------------------------

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "general.file_type": 15,
    "llama.embedding_length": 256,
    "llama.block_count": 1,
    "llama.feed_forward_length": 512,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.dimension_count": 64,
    "llama.expert_count": 8,
    "llama.expert_used_count": 2,
    "llama.context_length": 512,
    "llama.vocab_size": 32000,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e6,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [f"t{number}" for number in range(32000)],
    "tokenizer.ggml.scores": np.zeros(32000, np.float32),
    "tokenizer.ggml.token_type": np.ones(32000, np.int32),
}
WIDE = CONFIG.replace(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64)


def gguf(
    path: Path,
    *,
    layout: str = "gguf",
    form: Callable[[str], str] = lambda name: "Q4_K",
    alignment: int = 32,
    **changes: Any,
) -> Path:
    metadata = {key: value for key, value in (METADATA | changes).items() if value is not None}
    records = []
    for first, *_ in tensors(WIDE, layout):  # type: ignore[arg-type]
        full = len(first.tensor_shape) == 1 or "ffn_gate_inp" in first.name
        kind = form(first.name) if not full or form(first.name) != "Q4_K" else "F32"
        size = FORMATS[kind].size_bytes(first.tensor_shape)
        zeros = torch.zeros(size, dtype=torch.uint8)
        records.append(GgufRecord(first.name, kind, first.tensor_shape, lambda zeros=zeros: [zeros]))
    write_gguf(path, metadata, records, alignment=alignment)
    return path


def only(part: str, kind: str) -> Callable[[str], str]:
    return lambda name: kind if part in name else "Q4_K"


GGUF_ODD: dict[str, tuple[dict[str, Any], str]] = {
    "split": ({"layout": "gguf-split"}, "a tensor for every expert, as before April 2024, which llama.cpp does not"),
    "gate and up": ({"layout": "gguf-gate-up"}, "gate and up in one tensor, which llama.cpp does not read for Mixtral"),
    "file type": ({"general.file_type": 18}, "general.file_type is 18 (q6_k), whose experts are Q6_K, but these are 2"),
    "file type a text": ({"general.file_type": "x"}, "general.file_type is 'x'; expected a number"),
    "router": ({"form": only("gate_inp", "Q8_0")}, "routers are quantised (Q8_0), though they decide which experts"),
    "norms": ({"form": only("ffn_norm", "Q8_0")}, "norms are quantised (Q8_0), though they cost nearly nothing"),
    "alignment": ({"alignment": 64}, "general.alignment is 64; nearly every file has 32"),
    "no tokenizer": ({"tokenizer.ggml.tokens": None}, "no tokenizer in the file; llama.cpp needs one"),
    "scores": ({"tokenizer.ggml.scores": np.zeros(5, np.float32)}, "32,000 tokens, but 5 entries in tokenizer.ggml.sc"),
    "types": ({"tokenizer.ggml.token_type": None}, "32,000 tokens, but 0 entries in tokenizer.ggml.token_type"),
    "types a number": ({"tokenizer.ggml.token_type": 7}, "32,000 tokens, but 0 entries in tokenizer.ggml.token_type"),
    "count": ({"llama.vocab_size": 32768}, "llama.vocab_size is 32768, but there are 32,000 tokens"),
    "other tokenizer": ({"tokenizer.ggml.model": "gpt2"}, "tokenizer.ggml.model is 'gpt2'; that of a Mixtral is"),
    "no BOS": ({"tokenizer.ggml.add_bos_token": False}, "add_bos_token is off; Mixtral was trained with a BOS"),
    "BOS": ({"tokenizer.ggml.bos_token_id": 5}, "tokenizer.ggml.bos_token_id is 5; that of a Mixtral is 1"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn', which is ignored"),
    "scaled": ({"llama.rope.scaling.factor": 4.0}, "llama.rope.scaling.factor is 4.0, which is ignored"),
    "window": ({"llama.attention.sliding_window": 4096}, "llama.attention.sliding_window is 4096, which is ignored"),
    "head": ({"llama.attention.key_length": 128}, "llama.attention.key_length is 128, but heads have 64 values"),
    "theta": ({"llama.rope.freq_base": 1e4}, "m.gguf: rope_theta is 10000.0 and is used, but every published Mixtral"),
    "array where text belongs": (
        {"llama.rope.scaling.type": [1, 2]},
        "llama.rope.scaling.type is 'an array', which is",
    ),
}
GGUF_USUAL: dict[str, dict[str, Any]] = {
    "q4_k_m": {"form": only("down_exps", "Q6_K")},
    "guessed type": {"general.file_type": 15 + 1024},
    "unknown type": {"general.file_type": 31},
    "no type": {"general.file_type": None},
    "silent values": {"llama.rope.scaling.type": "none", "tokenizer.ggml.add_bos_token": True},
}


@pytest.mark.parametrize("kind", GGUF_USUAL)
def test_nothing_odd_in_gguf(kind: str, tmp_path: Path) -> None:
    assert found_in(gguf(tmp_path / "m.gguf", **GGUF_USUAL[kind])) == []
    assert found_in(tmp_path) == []


@pytest.mark.parametrize("kind", GGUF_ODD)
def test_one_thing_odd_in_gguf(kind: str, tmp_path: Path) -> None:
    changes, told = GGUF_ODD[kind]
    (said,) = found_in(gguf(tmp_path / "m.gguf", **changes))
    assert told in said


def test_experts_of_one_layer_in_different_formats(tmp_path: Path) -> None:
    """C6."""
    path = gguf(tmp_path / "m.gguf", layout="gguf-split", form=only("ffn_down.3.", "Q5_K"))
    said = found_in(path)
    assert len(said) == 2
    assert said[0].startswith("experts of one layer in different formats (Q4_K, Q5_K) in 1 layers, the first is 0")


def test_no_value_is_read(usual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf(tmp_path / "m.gguf")
    start = min(entry.start for entry in read_gguf(path).tensors.values())
    assert start < path.stat().st_size / 2

    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("mixtral.files.read.ShardReader._map", fail)
    assert found_in(path) == found_in(usual) == []


def test_the_command_prints_them(copy: Path, capsys: Capture) -> None:
    assert main(["inspect", str(copy)]) == 0
    assert capsys.readouterr().out.rstrip().endswith("odd\n  nothing odd")
    assert main(["inspect", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["odd"] == []
    edit("config.json", sliding_window=4096, num_local_experts=8)(copy)
    edit(INDEX_NAME, metadata={"total_size": 5})(copy)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["inspect", str(copy), "--json"]) == 0
        captured = capsys.readouterr()
        first, second = json.loads(captured.out)["odd"]
        assert first.startswith(WINDOW)
        assert second.startswith(f"{INDEX_NAME}: total_size is 5")
        assert captured.err.count("\n") == 1
        assert main(["inspect", str(copy)]) == 0
    said = capsys.readouterr().out
    assert "odd\n  1  config.json: sliding_window is 4096" in said
    for row in ("layout ", "dtypes ", "version ", "max_position_embeddings ", "rope_theta "):
        assert f"\n  {row}" in said


def test_a_folder_with_a_config_only(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.replace(num_local_experts=4).to_dict()))
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["files"] == {}
    assert said["odd"] == ["4 experts, of which 2 see a token; every published Mixtral has 8 and 2"]


def test_gguf_says_where_it_comes_from(tmp_path: Path, capsys: Capture) -> None:
    path = gguf(tmp_path / "m.gguf", **{"general.name": "town\x1b[31m", "quantize.imatrix.file": "a.dat"})
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert "quantize.imatrix.file  a.dat" in said
    assert "\x1b[31m" not in said
