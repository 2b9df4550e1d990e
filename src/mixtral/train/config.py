"""The configuration of a pretraining run: a strict TOML file with the tables model, data, optim and run."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mixtral.config import MixtralConfig, preset
from mixtral.errors import ConfigError

__all__ = ["DataConfig", "OptimConfig", "PretrainConfig", "RunConfig", "read_pretrain_config"]

C = TypeVar("C")
_MOST = 2**31 - 1  # as for the sizes of the model
_SEEDS = (-(2**63), 2**63 - 1)  # of a TOML integer, and within what torch takes


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which documents are trained. A step takes ``documents_per_step`` documents, in ``micro_batches`` equal parts.

    ``trained_rows`` is the number of vocabulary rows with weights of their own, chosen by frequency in the first
    ``sample_documents`` documents; all other ids share one more row. ``prompt_weight`` is the loss weight of tokens
    that are not the assistant's. ``unknown_per_mille`` input tokens in a thousand are replaced by the shared row.
    ``mixture`` is the share of every skill in percent; empty is the default of ``desk.write``.
    """

    seed: int = 1
    documents_per_step: int = 128
    micro_batches: int = 1
    trained_rows: int = 4095
    sample_documents: int = 40_000
    prompt_weight: float = 0.2
    unknown_per_mille: int = 3
    mixture: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _at_least(self, documents_per_step=1, micro_batches=1, trained_rows=1, sample_documents=1, prompt_weight=0.0)
        _at_least(self, seed=_SEEDS[0], unknown_per_mille=0)
        _at_most(self, documents_per_step=_MOST, micro_batches=_MOST, trained_rows=_MOST, sample_documents=_MOST)
        _at_most(self, seed=_SEEDS[1], unknown_per_mille=1000)
        for skill, share in self.mixture.items():
            if share > 1000:
                raise ConfigError(f"mixture: {skill} is {_shown(share)}; expected at most 1000", param="mixture")
        if self.documents_per_step % self.micro_batches:
            raise ConfigError(
                f"documents_per_step is {self.documents_per_step}; expected a multiple of micro_batches "
                f"{self.micro_batches}",
                param="documents_per_step",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """Learning rate (peak; warm-up, constant, linear decay to zero), decay, clipping, and the two auxiliary losses."""

    learning_rate: float = 3e-3
    warmup_steps: int = 50
    decay_fraction: float = 0.25
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    balance_coef: float = 0.01
    z_coef: float = 0.001

    def __post_init__(self) -> None:
        _at_least(self, learning_rate=1e-12, warmup_steps=0, decay_fraction=0.0, weight_decay=0.0, clip_norm=1e-12)
        _at_least(self, balance_coef=0.0, z_coef=0.0)
        if self.decay_fraction > 1:
            raise ConfigError(f"decay_fraction is {self.decay_fraction}; expected 0 to 1", param="decay_fraction")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """How long, how often to save, and in which precision the matrix products run (masters are always float32)."""

    steps: int
    seed: int = 1
    save_every: int = 50
    keep_last: int = 2
    dtype: str = "bfloat16"
    threads: int = 2

    def __post_init__(self) -> None:
        _at_least(self, steps=1, seed=_SEEDS[0], save_every=1, keep_last=1, threads=1)
        _at_most(self, steps=_MOST, seed=_SEEDS[1], save_every=_MOST, keep_last=_MOST, threads=1024)
        if self.dtype not in {"bfloat16", "float32"}:
            raise ConfigError(f"dtype is {self.dtype!r}; expected 'bfloat16' or 'float32'", param="dtype")


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainConfig:
    """All of a pretraining run. ``model`` has the full vocabulary; training itself keeps ``trained_rows`` + 1 rows."""

    model: MixtralConfig
    data: DataConfig
    optim: OptimConfig
    run: RunConfig

    def __post_init__(self) -> None:
        if self.model.num_experts_per_tok < 2:
            raise ConfigError(
                f"num_experts_per_tok is {self.model.num_experts_per_tok}; expected at least 2: the weight of a single "
                "expert is a softmax over one logit, always 1, so the cross entropy would not train the router",
                param="num_experts_per_tok",
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``from_dict`` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str) -> PretrainConfig:
        """Read the four tables; ``model`` is a table of sizes or ``{preset = "tiny"}`` with some of them changed."""
        known = [field.name for field in dataclasses.fields(cls)]
        _refuse_unknown(values, known, source)
        _refuse_huge(values, source)
        for name in known:
            if not isinstance(values.get(name, {}), Mapping):
                raise ConfigError(f"{source}: {name} is {values[name]!r}; expected a table", param=name)
        sizes = dict(values.get("model", {}))
        if "preset" in sizes:
            base = dataclasses.asdict(preset(str(sizes.pop("preset"))))
            sizes = base | sizes
        model = MixtralConfig.from_dict(sizes, source=f"{source}: model")
        data = _read(DataConfig, values.get("data", {}), f"{source}: data")
        optim = _read(OptimConfig, values.get("optim", {}), f"{source}: optim")
        run = _read(RunConfig, values.get("run", {}), f"{source}: run")
        try:
            return cls(model=model, data=data, optim=optim, run=run)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}", param=error.param) from None


def read_pretrain_config(path: Path) -> PretrainConfig:
    """Read a TOML file.

    Raises:
        ConfigError: the file is missing or not TOML, a key is unknown, or a value is out of range.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:  # also of a number with more digits than Python reads
        raise ConfigError(f"{path}: not TOML ({error})") from None
    return PretrainConfig.from_dict(values, source=path.name)


def _read(kind: type[C], values: Mapping[str, Any], source: str) -> C:
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    _refuse_unknown(values, list(fields), source)
    for name, value in values.items():
        wanted = str(fields[name].type)
        fits = {
            "int": isinstance(value, int) and not isinstance(value, bool),
            "float": isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value),
            "str": isinstance(value, str),
            "dict[str, int]": isinstance(value, dict) and all(type(v) is int and v >= 0 for v in value.values()),
        }
        if not fits[wanted]:
            raise ConfigError(f"{source}: {name} is {value!r}; expected {wanted}", param=name)
    missing = [n for n, f in fields.items() if n not in values and _is_required(f)]
    if missing:
        raise ConfigError(f"{source}: missing key {missing[0]!r}", param=missing[0])
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}", param=error.param) from None


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _refuse_unknown(values: Mapping[str, Any], known: list[str], source: str) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else f"; known keys: {', '.join(known)}"
            raise ConfigError(f"{source}: unknown key {key!r}{hint}", param=key)


def _refuse_huge(values: Mapping[str, Any], source: str) -> None:
    """TOML has integers of 64 bits; much longer ones fit neither a float nor a message."""
    queue: list[tuple[str, Any]] = list(values.items())
    while queue:
        name, value = queue.pop()
        if isinstance(value, Mapping):
            queue += value.items()
        elif isinstance(value, list):
            queue += [(name, item) for item in value]
        elif isinstance(value, int) and not _SEEDS[0] <= value <= _SEEDS[1]:
            raise ConfigError(f"{source}: {name} is {_shown(value)}; expected at most 64 bits", param=name)


def _at_least(config: object, **least: float) -> None:
    for name, low in least.items():
        value = getattr(config, name)
        # Not `value < low`, which is false for nan; not `value < inf`, which holds for integers that no float can hold.
        if not low <= value <= sys.float_info.max:
            expected = f"at least {low}" if value < low else f"a finite number, at least {low}"
            raise ConfigError(f"{name} is {_shown(value)}; expected {expected}", param=name)


def _at_most(config: object, **most: int) -> None:
    for name, high in most.items():
        value = getattr(config, name)
        if value > high:
            raise ConfigError(f"{name} is {_shown(value)}; expected at most {high}", param=name)


def _shown(value: float) -> str:
    """A number for a message."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return str(value)
