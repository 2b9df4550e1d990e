"""What a config says about integer weights (``quantization_config``), checked: method, bits, zeros, column order."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mixtral.errors import CheckpointError, ConfigError
from mixtral.files.safetensors import inside, read_json

__all__ = ["CODING_FILES", "Coding", "read_coding"]

CODING_FILES = ("quantize_config.json", "quant_config.json")  # of older AutoGPTQ and AutoAWQ, beside config.json
Zeros = Literal["as they are", "less one", "less a pattern"]
_BITS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True, slots=True)
class Coding:
    """How the integers of a checkpoint are meant. ``stored_zeros`` is what GPTQ files hold in place of a zero point;
    ``symmetric``: every zero point is half of the range; ``ordered``: groups may mix columns."""

    method: Literal["gptq", "awq", "compressed-tensors"]
    bits: tuple[int, ...]
    symmetric: bool = False
    ordered: bool = True
    stored_zeros: Zeros = "as they are"


def read_coding(folder: Path) -> Coding | None:
    """The coding that a checkpoint folder declares, in its config or in a file beside it; None if it declares none.

    Raises:
        ConfigError: a method that is not read here, or settings that make no sense.
    """
    for name, key in (("config.json", "quantization_config"), *((name, None) for name in CODING_FILES)):
        if not os.path.lexists(folder / name):
            continue
        try:
            values = read_json(inside(folder, name), name)
        except CheckpointError as error:
            raise ConfigError(str(error)) from None
        found = values.get(key) if key else values
        if found is None:
            continue
        source = f"{name}: {key}" if key else name
        if not isinstance(found, dict):
            raise ConfigError(f"{source} is {found!r:.80}; expected an object", param="quantization_config")
        return _coding(found, source)
    return None


def _coding(values: Mapping[str, Any], source: str) -> Coding:
    method = values.get("quant_method", "awq" if "w_bit" in values else "gptq" if "desc_act" in values else None)
    readers: Mapping[str, Callable[[Mapping[str, Any], str], Coding]] = {
        "gptq": _gptq,
        "awq": _awq,
        "compressed-tensors": _compressed,
    }
    if not isinstance(method, str) or method not in readers:
        raise ConfigError(
            f"{source}: quant_method is {method!r:.80}; weights of {', '.join(readers)} can be read, and GGUF files",
            param="quant_method",
        )
    return readers[method](values, source)


def _gptq(values: Mapping[str, Any], source: str) -> Coding:
    bits = _number(values, "bits", (2, 3, 4, 8), source)
    form = values.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2") or values.get("is_marlin_format"):
        raise ConfigError(f"{source}: checkpoint_format is {form!r:.80}; gptq and gptq_v2 can be read")
    meta = values.get("meta")
    writer = str(meta.get("quantizer")) if isinstance(meta, dict) else ""
    stored: Zeros = (
        "as they are" if form == "gptq_v2" else "less a pattern" if bits == 3 and "gptqmodel" in writer else "less one"
    )
    return Coding("gptq", (bits,), bool(values.get("sym", True)), bool(values.get("desc_act", True)), stored)


def _awq(values: Mapping[str, Any], source: str) -> Coding:
    bits = _number(values, "w_bit" if "w_bit" in values else "bits", (4,), source)
    version = str(values.get("version", "gemm")).lower()
    if version != "gemm":
        raise ConfigError(f"{source}: version is {version!r:.80}; AWQ weights in the order of 'gemm' can be read")
    return Coding("awq", (bits,), symmetric=False, ordered=False)


def _compressed(values: Mapping[str, Any], source: str) -> Coding:
    groups = values.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ConfigError(f"{source}: expected an object 'config_groups'")
    bits: set[int] = set()
    rounds_inputs = False
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        form = (group.get("format") if isinstance(group, dict) else None) or values.get("format")
        kind = weights.get("type") if isinstance(weights, dict) else None
        if not isinstance(weights, dict) or kind != "int" or form not in ("pack-quantized", "int-quantized"):
            raise ConfigError(
                f"{source}: group {name!r} has weights of type {kind!r:.40} in the format {form!r:.40}; integers in "
                "pack-quantized and int-quantized can be read"
            )
        bits.add(_number(weights, "num_bits", _BITS, f"{source}: group {name!r}"))
        rounds_inputs |= bool(group.get("input_activations"))
    for key, dense in (("kv_cache_scheme", ()), ("sparsity_config", ("dense",))):
        found = values.get(key)
        if found and not (isinstance(found, dict) and found.get("format") in dense):
            raise ConfigError(f"{source}: {key} is {found!r:.80}, which cannot be read")
    if rounds_inputs:
        warnings.warn(
            f"{source}: made to be run with rounded activations; only its weights are rounded here", stacklevel=2
        )
    return Coding("compressed-tensors", tuple(sorted(bits)))


def _number(values: Mapping[str, Any], key: str, allowed: tuple[int, ...], source: str) -> int:
    found = values.get(key)
    if type(found) is not int or found not in allowed:
        raise ConfigError(f"{source}: {key} is {found!r:.80}; expected one of {', '.join(map(str, allowed))}")
    return found
