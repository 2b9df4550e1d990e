"""Every layout, each written by another tool than ours, gives the same logits; and so does what it is converted to.

transformers writes both of Hugging Face's layouts, torch and safetensors Mistral's (after their description), the
``gguf`` package all of GGUF.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import test_gguf_model
import test_layouts
import torch
from transformers import MixtralConfig as TheirConfig
from transformers import MixtralForCausalLM

import mixtral
from mixtral.model.mixtral import Mixtral
from mixtral.weights.convert import convert, convert_to_gguf
from mixtral.weights.load import load_model
from mixtral.weights.names import Layout

CONFIG = test_gguf_model.CONFIG
IDS = [1, *range(5, 50)]
TARGETS: tuple[Layout, ...] = ("per-expert", "fused", "consolidated", "gguf")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> MixtralForCausalLM:
    """A random model of transformers, whose values float16 and bfloat16 hold."""
    keys = CONFIG.to_dict().keys() - {"architectures", "model_type"}
    config = TheirConfig(**{key: CONFIG.to_dict()[key] for key in keys})
    torch.manual_seed(3)
    model = MixtralForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn_like(parameter) * 0.2).half().bfloat16())
    return model


@pytest.fixture(scope="module")
def ours(theirs: MixtralForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Mixtral:
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return load_model(folder, device="cpu")


def hugging_face(original: bool) -> Callable[[MixtralForCausalLM, Mixtral, Path], Path]:
    def write(theirs: MixtralForCausalLM, ours: Mixtral, path: Path) -> Path:
        theirs.save_pretrained(path, save_original_format=original)
        return path

    return write


def mistral(layout: str) -> Callable[[MixtralForCausalLM, Mixtral, Path], Path]:
    return lambda theirs, ours, path: test_layouts.write(ours, layout, path)


def by_gguf(kind: str, form: str = "F32", parts: int = 1) -> Callable[[MixtralForCausalLM, Mixtral, Path], Path]:
    def write(theirs: MixtralForCausalLM, ours: Mixtral, path: Path) -> Path:
        path.mkdir()
        found = test_gguf_model.tensors(ours, kind)
        test_gguf_model.write(path / "m.gguf", found, lambda name: "F32" if "norm" in name else form, parts=parts)
        return path

    return write


WRITERS: dict[str, Callable[[MixtralForCausalLM, Mixtral, Path], Path]] = {
    "per-expert": hugging_face(original=True),
    "fused": hugging_face(original=False),
    "consolidated": mistral("safetensors"),
    "consolidated shards": mistral("sharded"),
    "consolidated pth": mistral("pth"),
    "eight-file": mistral("eight"),
    "gguf": by_gguf("gguf"),
    "gguf bf16": by_gguf("gguf", "BF16"),
    "gguf parts": by_gguf("gguf", parts=7),
    "gguf-split": by_gguf("gguf-split"),
    "gguf-gate-up": by_gguf("gguf-gate-up"),
}


def logits(path: Path) -> torch.Tensor:
    return mixtral.load(path, dtype="float32", unpickle=True).logits(IDS)


@pytest.mark.parametrize("name", WRITERS)
def test_every_layout_to_every_other_and_back(
    name: str, theirs: MixtralForCausalLM, ours: Mixtral, tmp_path: Path
) -> None:
    source = WRITERS[name](theirs, ours, tmp_path / "source")
    expected = logits(source)
    with torch.no_grad():
        torch.testing.assert_close(expected, theirs(torch.tensor([IDS])).logits[0].float(), rtol=0, atol=1e-4)
    folder = tmp_path / "per-expert"
    theirs.save_pretrained(folder)
    assert torch.equal(expected, logits(folder))
    for target in TARGETS:
        moved = tmp_path / f"to-{target}"
        back = tmp_path / f"back-{target}"
        if target == "gguf":
            moved = moved.with_suffix(".gguf")
            convert_to_gguf(source, moved, vocabulary=lambda count: {}, unpickle=True)
        else:
            convert(source, moved, layout=target, unpickle=True)
        assert torch.equal(logits(moved), expected), target
        convert(moved, back, layout="fused", dtype=torch.float32)
        assert torch.equal(logits(back), expected), target
