"""GPTQ, AWQ and compressed-tensors files, written number by number after the descriptions of their formats."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from mixtral.config import MixtralConfig
from mixtral.model.mixtral import Mixtral
from mixtral.weights.names import parameter_shapes
from mixtral.weights.save import save_model

CONFIG = MixtralConfig(
    vocab_size=80,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=3,
    num_experts_per_tok=2,
    max_position_embeddings=256,
)
Numbers = npt.NDArray[np.int64]
Tensors = dict[str, torch.Tensor]


@dataclass
class Drawn:
    """A random integer matrix: value [o, i] is (codes - zeros) * scales of the group of column i."""

    codes: Numbers
    zeros: Numbers  # [O, G]
    scales: torch.Tensor  # [O, G]
    order: Numbers  # [I]

    @property
    def values(self) -> npt.NDArray[np.float64]:
        scales = self.scales.double().numpy()
        return np.asarray((self.codes - self.zeros[:, self.order]) * scales[:, self.order])


@dataclass
class Form:
    """How a matrix is drawn and written, and what the config says about it."""

    bits: int
    group: int
    write: Callable[[str, Drawn, int], Tensors]
    settings: Mapping[str, Any]
    zeros: bool = False
    order: bool = False
    scale: torch.dtype = torch.float16
    label: str = ""
    beside: str = ""


def draw(form: Form, rows: int, columns: int, rng: np.random.Generator) -> Drawn:
    groups = columns // form.group if form.group else 1
    top = 1 << form.bits
    zeros = rng.integers(1 if form.settings.get("quant_method") == "gptq" else 0, top, (rows, groups))
    order = np.arange(columns) // (columns // groups)
    return Drawn(
        rng.integers(0, top, (rows, columns)),
        zeros if form.zeros else np.full((rows, groups), top // 2),
        torch.from_numpy(rng.uniform(0.01, 0.03, (rows, groups))).to(form.scale),
        rng.permutation(order) if form.order else order,
    )


def words(numbers: Numbers, bits: int) -> torch.Tensor:
    """Rows of numbers as int32 words, one bit after the other: number i of a row begins at bit i * bits."""
    rows, count = numbers.shape
    stream = np.zeros((rows, -(-count * bits // 32) * 32), dtype=np.uint64)
    for i in range(count):
        for bit in range(bits):
            stream[:, i * bits + bit] = numbers[:, i].astype(np.uint64) >> np.uint64(bit) & np.uint64(1)
    weights = np.uint64(1) << np.arange(32, dtype=np.uint64)
    packed = (stream.reshape(rows, -1, 32) * weights).sum(-1).astype(np.uint32).view(np.int32)
    return torch.from_numpy(packed)


def gptq(
    stored: Callable[[Numbers, int], Numbers], bias: bool = False, less: tuple[int, ...] = (0,)
) -> Callable[[str, Drawn, int], Tensors]:
    def write(stem: str, drawn: Drawn, bits: int) -> Tensors:
        qzeros = words(stored(drawn.zeros, bits).T, bits).numpy()
        pattern = np.resize(np.array(less, dtype=np.uint32).view(np.int32), qzeros.shape[1])
        found = {
            f"{stem}.qweight": words(drawn.codes, bits).t().contiguous(),
            f"{stem}.qzeros": torch.from_numpy(qzeros - pattern),
            f"{stem}.scales": drawn.scales.t().contiguous(),
            f"{stem}.g_idx": torch.from_numpy(drawn.order.astype(np.int32)),
        }
        return {**found, f"{stem}.bias": torch.zeros(len(drawn.codes), dtype=torch.float16)} if bias else found

    return write


def less_one(zeros: Numbers, bits: int) -> Numbers:
    return zeros - 1


def as_they_are(zeros: Numbers, bits: int) -> Numbers:
    return zeros


# What GPTQModel takes from the words of its 3-bit zeros when it writes, and adds when it reads.
GPTQMODEL = (
    0b00100100100100100100100100100100,
    0b10010010010010010010010010010010,
    0b01001001001001001001001001001001,
)


def awq(stem: str, drawn: Drawn, bits: int) -> Tensors:
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def mixed(numbers: Numbers) -> torch.Tensor:
        return words(np.concatenate([numbers[:, at : at + 8][:, order] for at in range(0, numbers.shape[1], 8)], 1), 4)

    return {
        f"{stem}.qweight": mixed(drawn.codes.T),
        f"{stem}.qzeros": mixed(drawn.zeros.T),
        f"{stem}.scales": drawn.scales.t().contiguous(),
    }


def packed(stem: str, drawn: Drawn, bits: int) -> Tensors:
    found = {
        f"{stem}.weight_packed": words(drawn.codes, bits),
        f"{stem}.weight_scale": drawn.scales,
        f"{stem}.weight_shape": torch.tensor(drawn.codes.shape),
    }
    if (drawn.zeros != 1 << (bits - 1)).any():
        found[f"{stem}.weight_zero_point"] = words(drawn.zeros.T, bits).t().contiguous()
    if (np.diff(drawn.order) < 0).any():
        found[f"{stem}.weight_g_idx"] = torch.from_numpy(drawn.order.astype(np.int32))
    return found


def int8(stem: str, drawn: Drawn, bits: int) -> Tensors:
    signed = torch.from_numpy((drawn.codes - 128).astype(np.int8))
    found = {f"{stem}.weight": signed, f"{stem}.weight_scale": drawn.scales}
    if (drawn.zeros != 128).any():
        found[f"{stem}.weight_zero_point"] = torch.from_numpy((drawn.zeros - 128).astype(np.int8))
    return found


def g(bits: int, *, sym: bool = True, form: str | None = None, **more: Any) -> dict[str, Any]:
    found = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": True, "sym": sym, **more}
    return found if form is None else {**found, "checkpoint_format": form}


def compressed(bits: int, form: str = "pack-quantized", **group: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, **group}},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


FORMS = {
    "gptq 4": Form(4, 32, gptq(less_one), g(4), label="INT4_G32"),
    "gptq 4, zeros, order": Form(4, 32, gptq(less_one), g(4, sym=False), True, True, label="INT4_G32_ZEROS_ORDER"),
    "gptq 4, bias": Form(4, 32, gptq(less_one, bias=True), g(4), label="INT4_G32"),
    "gptq 8": Form(8, 32, gptq(less_one), g(8, sym=False), True, label="INT8_G32_ZEROS"),
    "gptq 2": Form(2, 32, gptq(less_one), g(2, sym=False), True, label="INT2_G32_ZEROS"),
    "gptq 3": Form(3, 32, gptq(less_one), g(3), label="INT3_G32"),
    "gptq 3, zeros": Form(3, 32, gptq(less_one), g(3, sym=False), True, label="INT3_G32_ZEROS"),
    "gptq 3, gptqmodel": Form(
        3,
        32,
        gptq(as_they_are, less=GPTQMODEL),
        g(3, meta={"quantizer": ["gptqmodel:2.0"]}),
        label="INT3_G32",
    ),
    "gptq v2": Form(4, 16, gptq(as_they_are), g(4, sym=False, form="gptq_v2"), True, label="INT4_G16_ZEROS"),
    "gptq, one group": Form(4, 0, gptq(less_one), g(4), label="INT4_G64"),
    "gptq, old file": Form(4, 32, gptq(less_one), g(4), beside="quantize_config.json", label="INT4_G32"),
    "awq": Form(4, 32, awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}, True, label="INT4_G32_ZEROS"),
    "awq, old file": Form(
        4, 32, awq, {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}, True, beside="quant_config.json"
    ),
    "ct 4": Form(4, 32, packed, compressed(4), scale=torch.bfloat16, label="INT4_G32"),
    "ct 4, zeros, order": Form(4, 32, packed, compressed(4), True, True, label="INT4_G32_ZEROS_ORDER"),
    "ct 8": Form(8, 16, packed, compressed(8), label="INT8_G16"),
    "ct 3": Form(3, 32, packed, compressed(3), True, label="INT3_G32_ZEROS"),
    "ct 5": Form(5, 32, packed, compressed(5), label="INT5_G32"),
    "ct int8": Form(8, 0, int8, compressed(8, "int-quantized"), scale=torch.float32, label="INT8_G64"),
    "ct int8, zeros": Form(8, 32, int8, compressed(8, "int-quantized"), True, label="INT8_G32_ZEROS"),
}


@dataclass
class Written:
    """A checkpoint folder and what it holds, in float64, by the names of the files."""

    folder: Path
    values: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)


def write(folder: Path, form: Form, seed: int = 0) -> Written:
    """A folder whose attention and expert matrices are integers; the rest is float16."""
    rng = np.random.default_rng(seed)
    model = Mixtral(CONFIG, device="cpu", dtype=torch.float16)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in parameter_shapes(CONFIG):
            value = model.get_parameter(name)
            value.copy_((torch.randn(value.shape, generator=generator) * 0.3).half())
    save_model(model, folder)
    written = Written(folder)
    tensors: Tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if ".experts." in name or "_proj" in name:
            drawn = draw(form, value.shape[0], value.shape[1], rng)
            tensors |= form.write(name.removesuffix(".weight"), drawn, form.bits)
            written.values[name] = drawn.values
        else:
            tensors[name] = value
            written.values[name] = value.double().numpy()
    save_file(tensors, folder / "model.safetensors")
    settings = {**form.settings, "desc_act": form.order} if "desc_act" in form.settings else dict(form.settings)
    if form.beside:
        (folder / form.beside).write_text(json.dumps(settings))
    else:
        configure(folder, quantization_config=settings)
    return written


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def expected(written: Written, name: str) -> torch.Tensor:
    """Our parameter of that name, from the values by the names of the files; float32."""
    stem = name.replace(".mlp.", ".block_sparse_moe.")

    def one(expert: int, matrix: str) -> npt.NDArray[np.float64]:
        return written.values[f"{stem.rpartition('.')[0]}.{expert}.{matrix}.weight"]

    if name.endswith("gate_up_proj"):
        found = np.stack([np.concatenate([one(e, "w1"), one(e, "w3")]) for e in range(CONFIG.num_local_experts)])
    elif name.endswith("down_proj"):
        found = np.stack([one(e, "w2") for e in range(CONFIG.num_local_experts)])
    else:
        found = written.values[stem]
    return torch.from_numpy(found).float()
