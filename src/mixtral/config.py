"""The model's configuration: the numbers that define a Mixtral, under the names of ``config.json``."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
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
        "return_dict",
        "router_jitter_noise",
        "sliding_window",  # published by mistake with early files: Mixtral has no window
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
    rope_theta: float = 1e6
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
        """Read the keys of a ``config.json``. Unknown keys are refused, with the nearest known name."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        picked: dict[str, Any] = {}
        for key, value in values.items():
            if key in known:
                picked[key] = value
            elif key in FIXED_KEYS:
                if value not in FIXED_KEYS[key]:
                    expected = " or ".join(repr(allowed) for allowed in FIXED_KEYS[key])
                    raise ConfigError(f"{source}: {key} is {value!r}; a Mixtral has {expected}", param=key)
            elif key == "quantization_config":
                if value is not None:
                    raise ConfigError(
                        f"{source}: quantization_config is given, and quantised checkpoints cannot be read yet; "
                        "take one whose weights are bfloat16, float16 or float32",
                        param=key,
                    )
            elif key == "rope_parameters":
                picked.update(_rope_parameters(value, source))
            elif key not in IGNORED_KEYS:
                near = difflib.get_close_matches(key, [*known, *FIXED_KEYS, *IGNORED_KEYS], n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ConfigError(f"{source}: unknown key {key!r}{hint}", param=key)
        if picked.get("head_dim") is None and {"hidden_size", "num_attention_heads"} <= picked.keys():
            picked["head_dim"] = _default_head_dim(picked, source)
        missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and picked.get(n) is None]
        if missing:
            raise ConfigError(f"{source}: missing key {missing[0]!r}", param=missing[0])
        picked = {key: value for key, value in picked.items() if value is not None}
        try:
            return cls(**picked)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}", param=error.param) from None

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


def _rope_parameters(value: Any, source: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or value.get("rope_type", "default") != "default":
        raise ConfigError(
            f"{source}: rope_parameters is {value!r}; expected an object with rope_type 'default'",
            param="rope_parameters",
        )
    unknown = value.keys() - {"rope_type", "rope_theta"}
    if unknown:
        raise ConfigError(f"{source}: unknown key 'rope_parameters.{min(unknown)}'", param="rope_parameters")
    return {"rope_theta": value["rope_theta"]} if value.get("rope_theta") is not None else {}


def _default_head_dim(picked: Mapping[str, Any], source: str) -> int:
    width, heads = picked["hidden_size"], picked["num_attention_heads"]
    if not isinstance(width, int) or not isinstance(heads, int) or heads < 1 or width % heads:
        raise ConfigError(
            f"{source}: head_dim is missing and hidden_size {width!r} is not a multiple of "
            f"num_attention_heads {heads!r}",
            param="head_dim",
        )
    return width // heads


def _check_number(name: str, value: object, *, whole: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise ConfigError(f"{name} is {value!r}; expected {'an integer' if whole else 'a number'}", param=name)
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise ConfigError(f"{name} is {value!r}; expected a finite number", param=name)
    least = 0 if name in {"bos_token_id", "eos_token_id", "router_aux_loss_coef"} else 1 if whole else 1e-30
    if value < least:
        raise ConfigError(f"{name} is {value!r}; expected at least {least}", param=name)
    if whole and value > 2**31 - 1:
        raise ConfigError(f"{name} is {value!r}; expected at most {2**31 - 1}", param=name)


def read_config(path: Path) -> MixtralConfig:
    """Read a ``config.json``.

    Raises:
        ConfigError: the file is missing, is not UTF-8 JSON, or does not describe a Mixtral.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
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
