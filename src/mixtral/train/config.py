"""The configuration of a pretraining run: a strict TOML file with the tables model, data, optim, run and record."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from mixtral.config import MixtralConfig, preset
from mixtral.errors import ConfigError

__all__ = [
    "DataConfig",
    "OptimConfig",
    "PretrainConfig",
    "RecordConfig",
    "RunConfig",
    "StartConfig",
    "check_choice",
    "check_least",
    "check_most",
    "read_pretrain_config",
    "read_table",
    "read_toml",
    "refuse_unknown",
    "table_of",
]

C = TypeVar("C")
_MOST = 2**31 - 1  # as for the sizes of the model
_SEEDS = (-(2**63), 2**63 - 1)  # of a TOML integer, and within what torch takes


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which documents are trained. A step takes ``documents_per_step`` documents, in ``micro_batches`` equal parts.

    ``trained_rows`` is the number of vocabulary rows with weights of their own, chosen by frequency in the first
    ``sample_documents`` documents; all other ids share one more row. ``prompt_weight`` is the loss weight of tokens
    that are not the assistant's. ``unknown_per_mille`` input tokens in a thousand are replaced by the shared row.
    ``mixture`` is the share of every skill in percent; empty is the default of ``desk.write``. ``later`` has other
    mixtures by the step, counted from 0, from which on they hold; what is validated stays that of ``mixture``.
    """

    seed: int = 1
    documents_per_step: int = 128
    micro_batches: int = 1
    trained_rows: int = 4095
    sample_documents: int = 40_000
    prompt_weight: float = 0.2
    unknown_per_mille: int = 3
    mixture: dict[str, int] = field(default_factory=dict)
    later: dict[str, dict[str, int]] = field(default_factory=dict)

    def mixture_at(self, step: int) -> dict[str, int]:
        """That of a step; empty is the default."""
        begun = [int(first) for first in self.later if int(first) <= step]
        return self.later[str(max(begun))] if begun else self.mixture

    def __post_init__(self) -> None:
        check_least(self, documents_per_step=1, micro_batches=1, trained_rows=1, sample_documents=1, prompt_weight=0.0)
        check_least(self, seed=_SEEDS[0], unknown_per_mille=0)
        check_most(self, documents_per_step=_MOST, micro_batches=_MOST, trained_rows=_MOST, sample_documents=_MOST)
        check_most(self, seed=_SEEDS[1], unknown_per_mille=1000)
        for name, mixture in {
            "mixture": self.mixture,
            **{f"later.{step}": m for step, m in self.later.items()},
        }.items():
            for skill, share in mixture.items():
                if share > 1000:
                    raise ConfigError(f"{name}: {skill} is {_shown(share)}; expected at most 1000", param=name)
        for first in self.later:
            if not first.isascii() or not first.isdecimal() or str(int(first)) != first or not 1 <= int(first) <= _MOST:
                raise ConfigError(f"later: {first!r} is no step; expected a number from 1 on", param="later")
        if self.documents_per_step % self.micro_batches:
            raise ConfigError(
                f"documents_per_step is {self.documents_per_step}; expected a multiple of micro_batches "
                f"{self.micro_batches}",
                param="documents_per_step",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """Learning rate (the peak) and its schedule, optimizer, decay, clipping, and the two auxiliary losses.

    After the warm-up the schedule ``wsd`` is constant and falls to zero over the last ``decay_fraction`` of the steps;
    ``cosine`` and ``linear`` fall to zero from there, ``constant`` does not. ``optimizer`` is ``muon`` (for matrices,
    AdamW for the rest) or ``adamw``. A step whose gradient is longer than ``skip_norm`` times the median of the last
    ones is skipped; 0 skips none. ``ema`` is the decay of averaged weights, 0 keeps none. ``balance_scope`` is over
    what the balance loss is taken: ``micro`` a micro-batch, ``sequence`` each document, ``global`` the step so far.
    """

    learning_rate: float = 3e-3
    schedule: str = "wsd"
    warmup_steps: int = 50
    decay_fraction: float = 0.25
    optimizer: str = "muon"
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    skip_norm: float = 6.0
    ema: float = 0.0
    balance_coef: float = 0.01
    balance_scope: str = "global"
    z_coef: float = 0.001

    def __post_init__(self) -> None:
        check_least(self, learning_rate=1e-12, warmup_steps=0, decay_fraction=0.0, weight_decay=0.0, clip_norm=1e-12)
        check_least(self, balance_coef=0.0, z_coef=0.0, skip_norm=0.0, ema=0.0)
        check_most(self, ema=0.999999)
        check_choice(self, schedule=("wsd", "cosine", "linear", "constant"), optimizer=("muon", "adamw"))
        check_choice(self, balance_scope=("micro", "sequence", "global"))
        if self.decay_fraction > 1:
            raise ConfigError(f"decay_fraction is {self.decay_fraction}; expected 0 to 1", param="decay_fraction")
        if 0 < self.skip_norm < 1:
            raise ConfigError(f"skip_norm is {self.skip_norm}; expected 0 (off) or at least 1", param="skip_norm")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """How long, how often to save, and in which precision the matrix products run (masters are always float32)."""

    FEWEST_STEPS: ClassVar[int] = 1

    steps: int
    seed: int = 1
    save_every: int = 50
    keep_last: int = 2
    dtype: str = "bfloat16"
    threads: int = 2

    def __post_init__(self) -> None:
        check_least(self, steps=self.FEWEST_STEPS, seed=_SEEDS[0], save_every=1, keep_last=1, threads=1)
        check_most(self, steps=_MOST, seed=_SEEDS[1], save_every=_MOST, keep_last=_MOST, threads=1024)
        check_choice(self, dtype=("bfloat16", "float32"))


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordConfig:
    """What the run cannot know of itself, for its record: power drawn, carbon of the current, facts about the data.

    ``watts`` 0 means not measured: the record then has an estimate. Texts that are empty become null in the record.
    """

    watts: float = 0.0
    co2_grams_per_kwh: float = 445.0
    sources: str = ""
    languages: str = ""
    filters: str = ""
    deduplication: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        check_least(self, watts=0.0, co2_grams_per_kwh=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartConfig:
    """The folder of the model whose weights a run begins with, or for the command ``embedded``. It has shared
    vocabulary rows."""

    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainConfig:
    """All of a pretraining run. ``model`` has the full vocabulary; training itself keeps ``trained_rows`` + 1 rows.

    Without ``start`` it begins with random weights, and chooses the rows.
    """

    model: MixtralConfig
    data: DataConfig
    optim: OptimConfig
    run: RunConfig
    record: RecordConfig = field(default_factory=RecordConfig)
    start: StartConfig | None = None

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
        """Read the tables; ``model`` is a table of sizes or ``{preset = "tiny"}`` with some of them changed."""
        refuse_unknown(values, [field.name for field in dataclasses.fields(cls)], source)
        _refuse_huge(values, source)
        sizes = dict(table_of(values, "model", source))
        if "preset" in sizes:
            base = dataclasses.asdict(preset(str(sizes.pop("preset"))))
            sizes = base | sizes
        model = MixtralConfig.from_dict(sizes, source=f"{source}: model")
        data = read_table(DataConfig, values, "data", source)
        optim = read_table(OptimConfig, values, "optim", source)
        run = read_table(RunConfig, values, "run", source)
        record = read_table(RecordConfig, values, "record", source)
        start = None if values.get("start") is None else read_table(StartConfig, values, "start", source)
        try:
            return cls(model=model, data=data, optim=optim, run=run, record=record, start=start)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}", param=error.param) from None


def read_pretrain_config(path: Path) -> PretrainConfig:
    """Read a TOML file.

    Raises:
        ConfigError: the file is missing or not TOML, a key is unknown, or a value is out of range.
    """
    return PretrainConfig.from_dict(read_toml(path), source=path.name)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: the file is missing or not TOML, or an integer in it has more than 64 bits.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:  # also of a number with more digits than Python reads
        raise ConfigError(f"{path}: not TOML ({error})") from None
    _refuse_huge(values, path.name)
    return values


def table_of(values: Mapping[str, Any], name: str, source: str) -> Mapping[str, Any]:
    """The table of that name; empty where there is none. Raises ConfigError where it is something else."""
    table = values.get(name, {})
    if not isinstance(table, Mapping):
        raise ConfigError(f"{source}: {name} is {table!r}; expected a table", param=name)
    return table


def read_table(kind: type[C], values: Mapping[str, Any], name: str, source: str) -> C:
    """The table of that name as a configuration.

    Raises:
        ConfigError: a key is unknown or missing, or a value is of another type or out of range.
    """
    table, source = table_of(values, name, source), f"{source}: {name}"
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    refuse_unknown(table, list(fields), source)
    _refuse_huge(table, source)
    for key, value in table.items():
        wanted = str(fields[key].type)
        fits = {
            "int": isinstance(value, int) and not isinstance(value, bool),
            "float": isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value),
            "str": isinstance(value, str),
            "bool": isinstance(value, bool),
            "dict[str, int]": _is_mixture(value),
            "dict[str, dict[str, int]]": isinstance(value, dict) and all(map(_is_mixture, value.values())),
        }
        if not fits[wanted]:
            raise ConfigError(f"{source}: {key} is {value!r}; expected {wanted}", param=key)
    missing = [n for n, f in fields.items() if n not in table and _is_required(f)]
    if missing:
        raise ConfigError(f"{source}: missing key {missing[0]!r}", param=missing[0])
    try:
        return kind(**table)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}", param=error.param) from None


def _is_mixture(value: object) -> bool:
    return isinstance(value, dict) and all(type(share) is int and share >= 0 for share in value.values())


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def refuse_unknown(values: Mapping[str, Any], known: list[str], source: str) -> None:
    """Raise ConfigError for a key that is not known, with the nearest one that is."""
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


def check_least(config: object, **least: float) -> None:
    """Raise ConfigError for a field below its bound, or not finite."""
    for name, low in least.items():
        value = getattr(config, name)
        # Not `value < low`, which is false for nan; not `value < inf`, which holds for integers that no float can hold.
        if not low <= value <= sys.float_info.max:
            expected = f"at least {low}" if value < low else f"a finite number, at least {low}"
            raise ConfigError(f"{name} is {_shown(value)}; expected {expected}", param=name)


def check_most(config: object, **most: float) -> None:
    """Raise ConfigError for a field above its bound."""
    for name, high in most.items():
        value = getattr(config, name)
        if value > high:
            raise ConfigError(f"{name} is {_shown(value)}; expected at most {high}", param=name)


def check_choice(config: object, **choices: tuple[str, ...]) -> None:
    """Raise ConfigError for a text that is not one of its choices."""
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            expected = ", ".join(repr(one) for one in allowed[:-1]) + f" or {allowed[-1]!r}"
            raise ConfigError(f"{name} is {value!r}; expected {expected}", param=name)


def _shown(value: float) -> str:
    """A number for a message."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return str(value)
