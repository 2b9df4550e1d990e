"""Adapter folders in the form of Hugging Face's PEFT, and the single file of mistral-finetune; safetensors only.

Stacked experts are written as PEFT 0.19 and later read them: ``lora_A`` [E * R, I], experts one after the other, and
``lora_B`` [O, R * E], where the expert changes fastest.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtral.adapters.factors import EXPERTS, TARGETS, Factors, check_factors, target_of
from mixtral.adapters.gather import Found, gather, pairs_by_module, split_stack, stack_of
from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError
from mixtral.files.commit import Commit
from mixtral.files.read import DTYPES, ShardReader
from mixtral.files.safetensors import Header, inside, read_header, read_json, record, write_shard
from mixtral.weights.consolidated import PARAMS_NAME
from mixtral.weights.names import DOWN, layer_of, parameter_shapes, pieces
from mixtral.weights.save import to_json

__all__ = [
    "ADAPTER_FILES",
    "CONFIG_NAME",
    "LAYOUT",
    "MISTRAL_NAME",
    "PEFT_PREFIX",
    "WEIGHTS_NAME",
    "AdapterFile",
    "base_of",
    "read_adapter",
    "refuse_folder",
    "write_adapter",
]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MISTRAL_NAME = "lora.safetensors"
ADAPTER_FILES = (CONFIG_NAME, WEIGHTS_NAME, MISTRAL_NAME)
"""Of both forms: where an adapter is written, those of another one go, or readers would not know which is meant."""
LAYOUT = "peft>=0.19 rank-major"
PEFT_PREFIX = "base_model.model."
# Pieces of patterns of names that are taken: nothing that repeats is repeated, as that could match for hours.
_PIECES = re.compile(r"\^?(?:[A-Za-z0-9_.|()]|\\\.|\.\*|\\d\+|\[0-9\]\+)+\$?")
# Features that change what an adapter computes; anything but these values is refused.
_OFF: Mapping[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "bias": ("none", None),
    "corda_config": (None, {}),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None,),
    "loftq_config": (None, {}),
    "lora_bias": (False, None),
    "lora_ga_config": (None, {}),
    "megatron_config": (None,),
    "modules_to_save": (None, []),
    "peft_type": ("LORA",),
    "trainable_token_indices": (None,),
    "use_bdlora": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
}
# First values of the factors that leave the base as it was. PiSSA and its like subtract theirs from it.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# Keys that say how it was trained, where it is used, or what is read here otherwise.
_READ = frozenset(
    {
        *(
            "alpha_pattern",
            "arrow_config",
            "auto_mapping",
            "base_model_name_or_path",
            "ensure_weight_tying",
            "eva_config",
        ),
        *("exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern"),
        *("layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core"),
        *("peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules"),
        *("target_parameters", "task_type", "use_rslora"),
    }
)


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """What a file of an adapter holds: the factors, what wrote it, the base it names, and dropout in its training."""

    factors: dict[str, Factors]
    kind: str
    base: str | None
    dropout: float


def write_adapter(
    folder: Path,
    config: MixtralConfig,
    factors: Mapping[str, Factors],
    *,
    base: str | None = None,
    dropout: float = 0.0,
    overwrite: bool = False,
) -> None:
    """Write a folder that PEFT loads, and ``read_adapter``: complete or not at all, float32.

    PEFT refuses dropout where stacked experts are adapted, so ``dropout`` is written only where none are.

    Raises:
        CheckpointError: the factors do not fit the config, the folder holds an adapter (and not ``overwrite``), or
            cannot be written.
    """
    folder = Path(folder)
    check_factors(config, factors, source="adapter")
    refuse_folder(folder, overwrite=overwrite)
    stacked = any(target_of(name) in (*EXPERTS, "router") for name in factors)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0 if stacked else dropout,
        "use_dora": False,
        "use_rslora": False,
        **_described(config, factors),
    }
    tensors = _tensors(factors)
    try:
        with Commit(folder) as commit:
            records = [record(name, value) for name, value in sorted(tensors.items())]
            write_shard(commit.path(WEIGHTS_NAME), records, {"format": "pt", "layout": LAYOUT})
            commit.path(CONFIG_NAME).write_text(to_json(values), encoding="utf-8")
            commit.finish(remove=ADAPTER_FILES)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror or error})") from None


def refuse_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError for a folder that holds an adapter, unless ``overwrite``, or for what is no folder."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder")
    if not overwrite and any((folder / name).exists() for name in (CONFIG_NAME, MISTRAL_NAME)):
        raise CheckpointError(f"{folder}: holds an adapter; choose another folder, or overwrite it explicitly")


def _tensors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    found = {}
    for parameter, (a, b, _) in factors.items():
        module = parameter.removesuffix(".weight")
        if a.dim() == 3:
            module = parameter.rpartition(".")[0]
            inner = target_of(parameter) == "gate_up" and DOWN.format(l=layer_of(parameter)) in factors
            module += ".base_layer" if inner else ""
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        for part, value in (("A", a), ("B", b)):
            found[f"{PEFT_PREFIX}{module}.lora_{part}.weight"] = value.detach().float().contiguous()
    return found


def _described(config: MixtralConfig, factors: Mapping[str, Factors]) -> dict[str, Any]:
    """Targets, ranks and alphas. A target in all layers is named once; ranks other than the first are patterns."""
    groups: dict[str, list[str]] = {}
    for parameter in factors:
        groups.setdefault(target_of(parameter), []).append(parameter)
    named: dict[str, Factors] = {}  # name in the config -> pair
    for target, parameters in groups.items():
        same = len({(factors[name].rank, factors[name].scale) for name in parameters}) == 1
        if same and len(parameters) == config.num_hidden_layers:
            named[_short(TARGETS[target])] = factors[parameters[0]]
        else:
            named |= {name: factors[name] for name in parameters}
    # PEFT says of patterns for parameters that they match nothing, though they do: better patterns for modules.
    first = next((pair for name, pair in named.items() if "_proj.weight" not in name), next(iter(named.values())))
    ranks = {_module(name): pair.rank for name, pair in named.items() if pair.rank != first.rank}
    alphas = {_module(name): _alpha(pair) for name, pair in named.items() if _alpha(pair) != _alpha(first)}
    return {
        "r": first.rank,
        "lora_alpha": _alpha(first),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": sorted(_module(name) for name in named if "_proj.weight" in name),
        "target_parameters": sorted(name for name in named if "_proj.weight" not in name),
    }


def _short(pattern: str) -> str:
    """What of a name is the same in all layers; of attention, whose names are unique, the last part."""
    name = pattern.partition("{l}.")[2]
    return name.removeprefix("self_attn.")


def _module(name: str) -> str:
    """Modules are named without their parameter, parameters with it."""
    return name.removesuffix(".weight") if "_proj.weight" in name else name


def _alpha(pair: Factors) -> int | float:
    alpha = pair.scale * pair.rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def read_adapter(path: Path, config: MixtralConfig, *, scaling: float | None = None) -> AdapterFile:
    """Read an adapter for a model of this config: a folder of PEFT's (stacked experts, or w1, w2 and w3 of each), or a
    folder with mistral-finetune's ``lora.safetensors``, or that file.

    ``scaling`` is for the latter, where ``params.json`` does not say it.

    Raises:
        CheckpointError: files are missing, damaged or pickled; the folder holds both forms; the adapter has features
            that are not supported, or belongs to another base.

    Warns:
        UserWarning: it was asked to adapt what no Mixtral has, so that was not trained.
    """
    path = Path(path)
    if (path / MISTRAL_NAME).is_file() and (path / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{path}: holds two adapters, {CONFIG_NAME} and {MISTRAL_NAME}; expected one of them: move the other away"
        )
    if path.is_file() or (path / MISTRAL_NAME).is_file():
        return _read_mistral(path, config, scaling)
    if scaling is not None:
        raise CheckpointError(f"{path}: its scale follows from {CONFIG_NAME}; scaling is for {MISTRAL_NAME}")
    if not (path / CONFIG_NAME).is_file():
        raise CheckpointError(f"{path}: no adapter; expected a folder with {CONFIG_NAME}, or {MISTRAL_NAME}")
    if not (path / WEIGHTS_NAME).is_file():
        pickled = [name for name in ("adapter_model.bin", "adapter_model.pt") if (path / name).exists()]
        told = f"{pickled[0]} is pickled and could carry code" if pickled else "there are no weights"
        raise CheckpointError(f"{path}: {told}; expected {WEIGHTS_NAME}. PEFT writes it with safe_serialization=True")
    values = read_json(inside(path, CONFIG_NAME), CONFIG_NAME)
    _check_config(values, path)
    header, tensors = _read_tensors(inside(path, WEIGHTS_NAME))
    return _from_peft(values, header, tensors, config, str(path))


def _read_tensors(path: Path) -> tuple[Header, dict[str, Tensor]]:
    header = read_header(path)
    found = {}
    with ShardReader() as reader:
        for name, entry in header.entries.items():
            if entry.dtype not in ("F32", "F16", "BF16"):
                raise CheckpointError(f"{path.name}: {name!r} is {entry.dtype}; expected F32, F16 or BF16")
            value = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
            reader.read(entry, value)
            found[name] = value
    return header, found


def _check_config(values: Mapping[str, Any], path: Path) -> None:
    for key, value in values.items():
        if key in _OFF and value not in _OFF[key]:
            raise CheckpointError(
                f"{path}: {CONFIG_NAME} says {key} {value!r:.80}; expected {_OFF[key][0]!r}: this is not supported",
                param=key,
            )
        if key not in _OFF and key not in _READ and value not in (None, False, "", 0, [], {}):
            raise CheckpointError(
                f"{path}: {CONFIG_NAME} has {key} {value!r:.80}, which is not known here and might change the result",
                param=key,
            )
    start = values.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{path}: {CONFIG_NAME} says init_lora_weights {start!r:.80}, which may change the base as well: it "
            f"belongs to another one then; expected one of {', '.join(map(str, _PLAIN_STARTS))}. PEFT's "
            "save_pretrained makes plain LoRA of some with path_initial_model_for_weight_conversion",
            param="init_lora_weights",
        )
    if "peft_type" not in values:
        raise CheckpointError(f"{path}: {CONFIG_NAME} lacks peft_type; expected 'LORA'", param="peft_type")
    for key in ("r", "lora_alpha"):
        number = values.get(key)
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < 1e6:
            raise CheckpointError(f"{path}: {CONFIG_NAME} says {key} {number!r}; expected a number above 0", param=key)
    _dropout(values.get("lora_dropout"), path)
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = values.get(key) or {}
        if not isinstance(pattern, dict) or not all(type(v) in (int, float) and v > 0 for v in pattern.values()):
            raise CheckpointError(f"{path}: {CONFIG_NAME} says {key} {pattern!r:.80}; expected numbers", param=key)
        for name in pattern:
            _compiled(name, key, path)


def _from_peft(
    values: Mapping[str, Any], header: Header, tensors: Mapping[str, Tensor], config: MixtralConfig, source: str
) -> AdapterFile:
    modules = pairs_by_module(tensors, source)
    asked = _names(values.get("target_parameters"))

    def scale_of(module: str, rank: int) -> float:
        said = _matched(values.get("rank_pattern"), module, values["r"])
        if said != rank:
            raise CheckpointError(f"{source}: {module!r} has rank {rank}, but {CONFIG_NAME} says {said}; it is damaged")
        alpha = float(_matched(values.get("alpha_pattern"), module, values["lora_alpha"]))
        return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)

    def prefers_down(outer: str) -> bool:
        found = {part for part in ("gate_up_proj", "down_proj") if _is_asked(f"{outer}.{part}", asked)}
        if len(found) != 1:
            raise CheckpointError(f"{source}: {CONFIG_NAME} does not say which parameter of {outer!r} is adapted")
        return "down_proj" in found

    shapes = parameter_shapes(config)
    factors: dict[str, Factors] = {}
    single: dict[str, Found] = {}
    for module, found in modules.items():
        parameter = stack_of(module, modules, prefers_down=prefers_down)
        if parameter is None:
            single[module] = found
        elif parameter not in shapes:
            raise CheckpointError(f"{source}: adapts {parameter!r}, which this model lacks; it belongs to another base")
        else:
            old = _is_old(found, shapes[parameter], values.get("peft_version"), header, source)
            a, b = split_stack(found, shapes[parameter], old=old, source=f"{source}: {parameter!r}")
            factors[parameter] = Factors(a, b, scale_of(parameter, a.shape[1]))
    factors |= gather(config, single, scale_of=_of_experts(scale_of), source=source)
    check_factors(config, factors, source=source)
    _check_targets(values, config, modules, factors, source)
    ordered = {name: factors[name] for name in shapes if name in factors}
    dropout = _dropout(values.get("lora_dropout"), Path(source))
    return AdapterFile(ordered, "PEFT", _named_base(values), dropout)


def base_of(folder: Path) -> str | None:
    """The base that a PEFT folder names; its weights are not read.

    Raises:
        CheckpointError: the config is missing or damaged.
    """
    return _named_base(read_json(inside(folder, CONFIG_NAME), CONFIG_NAME))


def _named_base(values: Mapping[str, Any]) -> str | None:
    base = values.get("base_model_name_or_path")
    return base if isinstance(base, str) else None


def _dropout(value: Any, path: Path) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise CheckpointError(f"{path}: says dropout {value!r:.80}; expected 0 or more and less than 1")
    return float(value)


def _of_experts(scale_of: Any) -> Any:
    """Patterns for the router name its parameter, as those for stacked experts do."""
    return lambda module, rank: scale_of(f"{module}.weight" if module.endswith(".mlp.gate") else module, rank)


def _is_old(found: Found, shape: tuple[int, ...], version: Any, header: Header, source: str) -> bool:
    """Whether a stack is stored as PEFT did before 0.19. Its two widths tell, unless they are equal."""
    _, out, width = shape
    if out != width:
        return found.a.shape[1] == out and found.b.shape[0] == width
    if header.metadata.get("layout") == LAYOUT:
        return False
    match = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    if match is None:
        raise CheckpointError(
            f"{source}: stacked experts are stored in another order before PEFT 0.19 than since then, and the adapter "
            f"does not say which version wrote it; add peft_version to {CONFIG_NAME}"
        )
    return (int(match[1]), int(match[2])) < (0, 19)


def _names(given: Any) -> list[str]:
    return [name for name in given if isinstance(name, str)] if isinstance(given, Sequence) else []


def _is_asked(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _matched(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first pattern that the end of a name matches, as PEFT looks them up."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _check_targets(
    values: Mapping[str, Any],
    config: MixtralConfig,
    modules: Mapping[str, Found],
    factors: Mapping[str, Factors],
    source: str,
) -> None:
    """What the config promises is there: an adapter whose experts are missing is not the one that was trained.

    PEFT trains what a list of targets matches and saves the list as it is. So a name that no Mixtral has, as those for
    Llama's MLP, is no damage; but who trained it may believe that the experts were adapted.
    """
    layouts = [piece.name for layout in ("per-expert", "fused", "consolidated") for piece in pieces(config, layout)]
    known = [name.removesuffix(".weight") for name in layouts if name.endswith(".weight")]
    excluded = values.get("exclude_modules")
    nowhere: list[str] = []
    for key, there, names in (
        ("target_modules", modules, known),
        ("target_parameters", factors, list(parameter_shapes(config))),
    ):
        targets = values.get(key)
        for target in targets if isinstance(targets, list) else []:
            if any(_is_asked(name, [target]) for name in there):
                continue
            meant = [name for name in names if isinstance(target, str) and _is_asked(name, [target])]
            if not isinstance(target, str) or not all(_is_excluded(name, excluded, source) for name in meant):
                raise CheckpointError(
                    f"{source}: {CONFIG_NAME} promises {target!r}, which the weights lack; it is damaged"
                )
            nowhere += [] if meant else [target]
    if nowhere:
        warnings.warn(
            f"{source}: the targets {', '.join(nowhere):.200} in {CONFIG_NAME} matched nothing in a Mixtral; they were "
            "not trained, and what the weights hold is used. Its experts are target_parameters: "
            "mlp.experts.gate_up_proj and mlp.experts.down_proj",
            stacklevel=4,
        )


def _is_excluded(name: str, given: Any, source: str) -> bool:
    """Whether PEFT left a module out though a target matches it: by a list of ends of names, or a pattern."""
    if isinstance(given, str):
        return _compiled(given, "exclude_modules", source).fullmatch(name) is not None
    return _is_asked(name, _names(given))


def _compiled(pattern: str, key: str, source: str | Path) -> re.Pattern[str]:
    """A pattern of the config, if it is of the kind that PEFT's users write."""
    with contextlib.suppress(re.error):
        if len(pattern) <= 200 and pattern.count(".*") <= 2 and _PIECES.fullmatch(pattern):
            return re.compile(pattern)
    raise CheckpointError(
        f"{source}: {CONFIG_NAME} has the {key} {pattern!r:.80}; expected names, perhaps with \\d+, [0-9]+, choices in "
        "brackets, and .* twice at most",
        param=key,
    )


def _read_mistral(path: Path, config: MixtralConfig, scaling: float | None) -> AdapterFile:
    file = path if path.is_file() else inside(path, MISTRAL_NAME)
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file}: not safetensors; adapters are read from nothing else")
    beside = file.parent / PARAMS_NAME
    said = read_json(beside, beside.name).get("lora") if beside.is_file() else None
    told = said.get("scaling") if isinstance(said, dict) else None
    scale = scaling if scaling is not None else told
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise CheckpointError(
            f"{file}: the scale of the adapter is {scale!r}; expected a number above 0 in {PARAMS_NAME} beside it, or "
            "as scaling (mistral-finetune's default is 2)",
            param="scaling",
        )
    _, tensors = _read_tensors(file)
    number = float(scale)
    modules = pairs_by_module(tensors, str(file))
    factors = gather(config, modules, scale_of=lambda module, rank: number, source=str(file))
    check_factors(config, factors, source=str(file))
    # mistral-inference wants a pair for every matrix; those of zeros say nothing.
    kept = {name: pair for name, pair in factors.items() if bool(pair.b.any())} or factors
    ordered = {name: kept[name] for name in parameter_shapes(config) if name in kept}
    dropout = _dropout(said.get("dropout") if isinstance(said, dict) else None, beside)
    return AdapterFile(ordered, "mistral-finetune", None, dropout)
