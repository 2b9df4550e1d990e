"""C9, C11, C13, A3, A9: what is loaded, what is refused, and how it is told."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError, ConfigError, MixtralError
from mixtral.files.safetensors import SINGLE_NAME
from mixtral.model.mixtral import Mixtral
from mixtral.weights.load import load_model
from mixtral.weights.names import Layout, is_router
from mixtral.weights.save import save_model

Make = Callable[..., Mixtral]
LAYOUTS: list[Layout] = ["per-expert", "fused"]
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_dtypes(
    layout: Layout, file_dtype: torch.dtype, dtype: torch.dtype | None, make: Make, tmp_path: Path
) -> None:
    model = make(file_dtype)
    save_model(model, tmp_path, layout=layout)
    loaded = load_model(tmp_path, device="cpu", dtype=dtype)
    for name, value in model.named_parameters():
        expected = value if is_router(name) else value.to(dtype or file_dtype)
        found = loaded.get_parameter(name)
        assert found.dtype == (torch.float32 if is_router(name) else dtype or file_dtype)
        assert torch.equal(found, expected)
        assert found.requires_grad == value.requires_grad
    assert not any(value.is_meta for value in [*loaded.parameters(), *loaded.buffers()])


@pytest.mark.parametrize("router_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_router_is_fp32_whatever_the_file_holds(router_dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    tensors = {
        name: value.to(router_dtype if "moe.gate" in name else torch.bfloat16) for name, value in whole(folder).items()
    }
    rewrite(folder, tensors)
    model = load_model(folder, device="cpu")
    assert model.get_parameter("model.layers.1.mlp.gate.weight").dtype == torch.float32
    assert torch.equal(model.get_parameter("model.layers.1.mlp.gate.weight"), tensors[ROUTER].float())
    assert model.get_parameter("lm_head.weight").dtype == torch.bfloat16


def whole(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / SINGLE_NAME)


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = whole(folder)
        change(tensors)
        rewrite(folder, tensors)

    return apply


def _config(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **changes}))

    return apply


def _add(name: str, value: Tensor) -> Callable[[Path], None]:
    return _tensors(lambda tensors: tensors.__setitem__(name, value))


def _link_config(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to(folder.parent / "config.json")


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "head missing (A9)": (_tensors(lambda t: t.pop("lm_head.weight")), r"missing 'lm_head.weight' \[80, 64\]"),
    "expert missing": (_tensors(lambda t: t.pop(W1)), rf"1 problems\):\n  missing '{W1}' \[96, 64\]"),
    "extra tensor": (_add("model.layers.1.extra", torch.ones(1)), "unexpected 'model.layers.1.extra'$"),
    "bias (A8)": (_add("model.layers.1.self_attn.q_proj.bias", torch.ones(1)), r"q_proj.bias' \(a Mixtral has no bias"),
    "inv_freq": (
        _add("model.layers.1.self_attn.rotary_emb.inv_freq", torch.ones(12)),
        r"rotary_emb.inv_freq' \(positions are computed",
    ),
    "biases before all else": (
        _tensors(lambda t: (t.clear(), t.update({W1: torch.ones(1), "model.layers.1.q_proj.bias": torch.ones(1)}))),
        r"problems\):\n  unexpected 'model.layers.1.q_proj.bias'",
    ),
    "GPTQ": (_add("model.layers.1.self_attn.q_proj.qweight", torch.ones(1)), "GPTQ"),
    "wrong shape": (
        _tensors(lambda t: t.__setitem__(W1, t[W1].T.contiguous())),
        r"w1.weight' is \[64, 96\], expected \[96, 64\]",
    ),
    "wrong dimensions": (_tensors(lambda t: t.__setitem__(W1, t[W1].flatten())), r"is \[6144\], expected \[96, 64\]"),
    "fp8": (_tensors(lambda t: t.__setitem__(W1, t[W1].to(torch.float8_e4m3fn))), "F8_E4M3, expected one of BF16, F16"),
    "fp64": (_tensors(lambda t: t.__setitem__(W1, t[W1].double())), "F64, expected one of BF16"),
    "integer router": (_tensors(lambda t: t.__setitem__(ROUTER, t[ROUTER].int())), "I32, expected one of"),
    "mixed dtypes": (_tensors(lambda t: t.__setitem__(W1, t[W1].bfloat16())), "mixes dtypes .*1 tensors of BF16"),
    "two layouts": (_add("model.layers.0.mlp.experts.down_proj", torch.ones(3, 64, 96)), "two layouts"),
    "another architecture": (
        lambda folder: rewrite(folder, {"model.layers.0.mlp.up_proj.weight": torch.ones(2)}),
        "no Mixtral experts among 1 tensors",
    ),
    "more layers in the config": (_config(num_hidden_layers=3), "num_hidden_layers 3, but the tensors have 2"),
    "a billion layers in the config": (
        _config(num_hidden_layers=10**9),
        "num_hidden_layers is 1000000000; expected at",
    ),
    "fewer layers in the config": (_config(num_hidden_layers=1), "num_hidden_layers 1, but the tensors have 2"),
    "another vocabulary": (_config(vocab_size=32768), "vocab_size 32768, but the tensors have 80"),
    "another width": (_config(hidden_size=128), "hidden_size 128, but the tensors have 64"),
    "more experts in the config": (_config(num_local_experts=1000), "num_local_experts 1000, but .* have 3"),
    "another expert size": (_config(intermediate_size=10**9), r"w1.weight' .*expected \[1000000000, 64\]"),
    "another head size": (_config(head_dim=32), r"q_proj.weight' is \[96, 64\], expected \[128, 64\]"),
    "unknown config key": (_config(num_local_expert=3), "did you mean 'num_local_experts'"),
    "tied embeddings": (_config(tie_word_embeddings=True), "tie_word_embeddings is True"),
    "quantised by another tool": (
        _config(quantization_config={"quant_method": "hqq"}),
        "quant_method is 'hqq'; .* gptq",
    ),
    "quantised by none": (_config(quantization_config=[1]), r"quantization_config is \[1\]; expected an object"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
    "config outside": (_link_config, "leads out of the folder"),
    "truncated": (
        lambda folder: (rewrite(folder, whole(folder)), _cut(folder / SINGLE_NAME))[1],
        f"{SINGLE_NAME}: truncated",
    ),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str, folder: Path) -> None:
    load_model(folder, device="cpu")
    change, told = BAD[case]
    change(folder)
    with pytest.raises(MixtralError, match=told) as caught:
        load_model(folder, device="cpu")
    assert isinstance(caught.value, (CheckpointError, ConfigError))


@pytest.mark.parametrize(("key", "number"), [("num_local_experts", 1000), ("intermediate_size", 10**9)])
def test_fused_sizes_are_compared_with_the_config_first(key: str, number: int, make: Make, tmp_path: Path) -> None:
    save_model(make(), tmp_path, layout="fused")
    _config(**{key: number})(tmp_path)
    with pytest.raises(CheckpointError, match=f"{key} {number}, but the tensors have"):
        load_model(tmp_path, device="cpu")


def test_mixed_dtypes_load_when_one_is_chosen(folder: Path) -> None:
    BAD["mixed dtypes"][0](folder)
    assert load_model(folder, device="cpu", dtype=torch.float32).get_parameter("lm_head.weight").dtype == torch.float32


def test_the_list_of_problems_is_cut(folder: Path) -> None:
    _tensors(lambda tensors: tensors.update({f"extra.{i}": torch.ones(1) for i in range(30)}))(folder)
    with pytest.raises(CheckpointError, match=r"\(30 problems\)") as caught:
        load_model(folder, device="cpu")
    assert str(caught.value).endswith("and 10 more")
    assert str(caught.value).count("unexpected") == 20


def test_a_float8_model_is_refused_before_the_files_are_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype is torch.float8_e4m3fn"):
        load_model(tmp_path / "nothing", device="cpu", dtype=torch.float8_e4m3fn)


def test_large_bfloat16_values_do_not_become_float16(folder: Path) -> None:
    _tensors(lambda tensors: tensors[W1].fill_(1e5))(folder)
    with pytest.raises(CheckpointError, match=r"experts.2.w1.weight.*beyond the range of float16"):
        load_model(folder, device="cpu", dtype=torch.float16)


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from mixtral.weights.load import load_model
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_model(Path(sys.argv[1]), device="cpu")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, "sympy" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_is_that_of_the_model(layout: Layout, small: MixtralConfig, tmp_path: Path) -> None:
    """Loading holds the model and one chunk, not the mapped file as well; and computes nothing on the meta device."""
    from mixtral.model.mixtral import Mixtral

    config = small.replace(hidden_size=1024, intermediate_size=3072, num_local_experts=8, num_hidden_layers=3)
    model = Mixtral(config, device="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    save_model(model, tmp_path, layout=layout)
    size = (tmp_path / SINGLE_NAME).stat().st_size
    assert size > 400e6
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True, timeout=100
    )
    extra, imported = run.stdout.split()
    assert int(extra) < 1.1 * size + 60e6
    # The first computation on a meta tensor imports sympy, and takes longer than loading a small model.
    assert imported == "False"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [W1, ROUTER, "model.norm.weight"])
def test_a_number_that_is_none_is_refused(
    layout: Layout, dtype: torch.dtype, number: float, name: str, make: Make, tmp_path: Path
) -> None:
    save_model(make(dtype), tmp_path, layout=layout)
    tensors = load_file(tmp_path / SINGLE_NAME)
    if layout == "fused":
        theirs = {W1: "model.layers.1.mlp.experts.gate_up_proj", ROUTER: "model.layers.1.mlp.gate.weight"}
        name = theirs.get(name, name)
    tensors[name].view(-1)[-3] = number
    save_file(tensors, tmp_path / SINGLE_NAME)
    for wanted in (None, torch.float32):
        with pytest.raises(CheckpointError, match=f"^'{re.escape(name)}' holds NaN or infinities; the weights are dam"):
            load_model(tmp_path, device="cpu", dtype=wanted)


def test_large_numbers_are_numbers(make: Make, tmp_path: Path) -> None:
    """Their sum is not one: of float32 and bfloat16 beyond 3e38, of float16 beyond 65504."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = make(dtype)
        with torch.no_grad():
            model.get_parameter("model.embed_tokens.weight").fill_(torch.finfo(dtype).max)
        save_model(model, tmp_path / str(dtype))
        found = load_model(tmp_path / str(dtype), device="cpu").get_parameter("model.embed_tokens.weight")
        assert torch.equal(found, model.get_parameter("model.embed_tokens.weight"))


def test_sums_beside_the_weights_are_compared(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model(make(torch.float32), tmp_path, shard_size_bytes=30_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files[1:]]
    (tmp_path / "SHA256SUMS").write_text("".join(lines) + f"{'0' * 64}  of-something-else.bin\n")
    with caplog.at_level("INFO", logger="mixtral"):
        load_model(tmp_path, device="cpu")
    assert f"sha256 of {len(files) - 1} files are those of SHA256SUMS" in caplog.text
    content = bytearray(files[1].read_bytes())
    content[-7] ^= 1
    files[1].write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{re.escape(files[1].name)}: sha256 is [0-9a-f]*, not the expected"):
        load_model(tmp_path, device="cpu")
    (tmp_path / "SHA256SUMS").write_text("nonsense\n")
    with pytest.raises(CheckpointError, match="line 1 is 'nonsense'"):
        load_model(tmp_path, device="cpu")
