"""The model's configuration: the numbers that define a Mixtral, under the names of ``config.json``."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral.errors import ConfigError

__all__ = ["PRESETS", "MixtralConfig", "preset", "read_config"]

# Keys of published config.json files that say nothing about the computation, or only repeat what Mixtral is.
IGNORED_KEYS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "quantization_config",  # of the weights: read with them
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)

# Keys that must have one value, because any other value is another architecture.
FIXED_KEYS: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "attention_dropout": (0, 0.0, None),
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "model_type": ("mixtral",),
    "rope_scaling": (None,),
    "tie_word_embeddings": (False,),
}

# Keys that change nothing here, though other programs may act on them: (silent values, why any other has no effect).
REPORTED_KEYS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "router_jitter_noise": ((0, None), "this package adds no noise to the router's input"),
    "sliding_window": ((None,), "Mixtral has no sliding window; early files gave one by mistake"),
}

THETA = 1e6  # of every Mixtral; 10000, the default of other models, ruins the answers

# Far above any model; without a bound a damaged file could make us list billions of tensors.
MOST_BYTES = 16_000_000
MOST = {"num_hidden_layers": 1024, "num_local_experts": 1024}


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtralConfig:
    """Numbers of one Mixtral. Field names are those of ``config.json``; architecture facts have no defaults."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    rope_theta: float = THETA
    rms_norm_eps: float = 1e-5
    router_aux_loss_coef: float = 0.001
    bos_token_id: int = 1
    eos_token_id: int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_number(field.name, getattr(self, field.name), whole=field.type == "int")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads is {self.num_attention_heads}, which is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}",
                param="num_key_value_heads",
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary positions need an even size", param="head_dim")
        if self.num_experts_per_tok > self.num_local_experts:
            raise ConfigError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, more than num_local_experts "
                f"{self.num_local_experts}",
                param="num_experts_per_tok",
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "config") -> MixtralConfig:
        """Read the keys of a ``config.json``. Unknown keys are refused, with the nearest known name.

        Warns:
            UserWarning: ``rope_theta`` is not that of a Mixtral, or a key has a value that is ignored.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        picked = {key: value for key, value in values.items() if key in known and value is not None}
        others = [(key, value) for key, value in values.items() if key not in known]
        notes = [note for key, value in others if (note := _checked_key(key, value, [*known], source))]
        if "rope_parameters" in values:
            picked = _rope_parameters(values["rope_parameters"], source, picked.get("rope_theta")) | picked
        if "head_dim" not in picked and {"hidden_size", "num_attention_heads"} <= picked.keys():
            picked["head_dim"] = _default_head_dim(picked, source)
        missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in picked]
        if missing:
            raise ConfigError(f"{source}: missing key {missing[0]!r}", param=missing[0])
        try:
            config = cls(**picked)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}", param=error.param) from None
        if config.rope_theta != THETA:
            notes.append(
                f"rope_theta is {_shown(config.rope_theta)} and is used, but every published Mixtral has {THETA:.0f}; "
                "if the model was not trained with it, its answers turn into nonsense"
            )
        for note in notes:
            warnings.warn(f"{source}: {note}", stacklevel=2)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The contents of a ``config.json`` that transformers and this package read."""
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "attention_dropout": 0.0,
            "sliding_window": None,
            **dataclasses.asdict(self),
        }

    def replace(self, **changes: Any) -> MixtralConfig:
        """A copy with some numbers changed."""
        return dataclasses.replace(self, **changes)


def _checked_key(key: str, value: Any, known: list[str], source: str) -> str | None:
    """Refuse a key that is no number of the model, or a value that makes it another one; a note if it is ignored."""
    if key in FIXED_KEYS:
        if value not in FIXED_KEYS[key]:
            expected = " or ".join(repr(allowed) for allowed in FIXED_KEYS[key])
            raise ConfigError(f"{source}: {key} is {_shown(value)}; a Mixtral has {expected}", param=key)
    elif key in REPORTED_KEYS:
        silent, reason = REPORTED_KEYS[key]
        return None if value in silent else f"{key} is {_shown(value)}, which is ignored: {reason}"
    elif key not in IGNORED_KEYS and key != "rope_parameters":
        # The comparison takes time that grows with the square of the length.
        near = difflib.get_close_matches(str(key)[:80], [*known, *FIXED_KEYS, *REPORTED_KEYS, *IGNORED_KEYS], n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"{source}: unknown key {_shown(key)}{hint}", param=str(key)[:80])
    return None


def _rope_parameters(value: Any, source: str, theta: Any) -> dict[str, Any]:
    """The theta in ``rope_parameters``, if there is one; ``theta`` is the one outside."""
    if not isinstance(value, Mapping) or value.get("rope_type", "default") != "default":
        raise ConfigError(
            f"{source}: rope_parameters is {_shown(value)}; expected an object with rope_type 'default'",
            param="rope_parameters",
        )
    unknown = value.keys() - {"rope_type", "rope_theta"}
    if unknown:
        raise ConfigError(
            f"{source}: unknown key {_shown(min(unknown, key=str))} in rope_parameters; "
            "expected rope_type and rope_theta",
            param="rope_parameters",
        )
    inner = value.get("rope_theta")
    if inner is not None and theta is not None and inner != theta:
        raise ConfigError(
            f"{source}: rope_theta is {_shown(theta)}, but {_shown(inner)} in rope_parameters; expected one value",
            param="rope_theta",
        )
    return {} if inner is None else {"rope_theta": inner}


def _default_head_dim(picked: Mapping[str, Any], source: str) -> int:
    width, heads = picked["hidden_size"], picked["num_attention_heads"]
    if not isinstance(width, int) or not isinstance(heads, int) or heads < 1 or width % heads:
        raise ConfigError(
            f"{source}: head_dim is missing and hidden_size {_shown(width)} is not a multiple of "
            f"num_attention_heads {_shown(heads)}",
            param="head_dim",
        )
    return width // heads


def _check_number(name: str, value: object, *, whole: bool) -> None:
    told = f"{name} is {_shown(value)}"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise ConfigError(f"{told}; expected {'an integer' if whole else 'a number'}", param=name)
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise ConfigError(f"{told}; expected a finite number", param=name)
    least = 0 if name in {"bos_token_id", "eos_token_id", "router_aux_loss_coef"} else 1 if whole else 1e-30
    if value < least:
        raise ConfigError(f"{told}; expected at least {least}", param=name)
    most = MOST.get(name, 2**31 - 1)
    if whole and value > most:
        raise ConfigError(f"{told}; expected at most {most}", param=name)


def _shown(value: object) -> str:
    """A value in a message; Python refuses to print very long integers and very deep lists."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"{type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:80]}..."


def read_config(path: Path) -> MixtralConfig:
    """Read a ``config.json``.

    Raises:
        ConfigError: the file is missing, is not UTF-8 JSON, or does not describe a Mixtral.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ConfigError(f"{path}: larger than {MOST_BYTES:,} bytes; this is no config")
        values = json.loads(data.decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a folder that holds config.json") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return MixtralConfig.from_dict(values, source=path.name)


PRESETS: Mapping[str, MixtralConfig] = {
    "8x7b": MixtralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=32768,
        router_aux_loss_coef=0.02,
    ),
    "8x22b": MixtralConfig(
        vocab_size=32768,
        hidden_size=6144,
        intermediate_size=16384,
        num_hidden_layers=56,
        num_attention_heads=48,
        num_key_value_heads=8,
        head_dim=128,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=65536,
        router_aux_loss_coef=0.001,
    ),
    "tiny": MixtralConfig(
        vocab_size=32768,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=8192,
    ),
}


def preset(name: str) -> MixtralConfig:
    """The configuration of a preset: ``8x7b``, ``8x22b`` or ``tiny``."""
    try:
        return PRESETS[name.lower()]
    except KeyError:
        raise ConfigError(f"unknown preset {name!r}; known presets: {', '.join(PRESETS)}") from None
