"""The configuration of fine-tuning: strict TOML tables model, data, optim, run, record, perhaps adapter or experts; of
DPO also dpo."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from mixtral.adapters import LoraConfig
from mixtral.errors import ConfigError
from mixtral.train.config import (
    OptimConfig,
    RecordConfig,
    RunConfig,
    check_choice,
    check_least,
    check_most,
    read_table,
    refuse_unknown,
    table_of,
)

__all__ = [
    "AdapterConfig",
    "DpoConfig",
    "DpoTable",
    "ExpertsConfig",
    "ModelConfig",
    "SftConfig",
    "TextConfig",
    "TuneConfig",
    "TuneOptimConfig",
    "TuneRunConfig",
    "with_changes",
]

_MOST = 2**31 - 1
_SEEDS = (-(2**63), 2**63 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The folder (or GGUF file) of the model to start from, or ``embedded``."""

    path: str = "embedded"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """JSONL files, and how much of them a step takes.

    A step has ``documents_per_step`` documents (of DPO: pairs), in parts of at most ``tokens_per_part`` tokens. What is
    longer than ``max_tokens`` is cut at its end. Without a file ``validation`` the lines whose hash falls
    below ``held_out_percent`` are held out. ``seed`` decides their order.
    """

    train: str
    validation: str = ""
    held_out_percent: int = 0
    documents_per_step: int = 16
    tokens_per_part: int = 8192
    max_tokens: int = 2048
    seed: int = 1

    def __post_init__(self) -> None:
        check_least(self, documents_per_step=1, tokens_per_part=1, max_tokens=2, seed=_SEEDS[0], held_out_percent=0)
        check_most(self, documents_per_step=_MOST, tokens_per_part=_MOST, max_tokens=_MOST, seed=_SEEDS[1])
        check_most(self, held_out_percent=50)
        if self.validation and self.held_out_percent:
            raise ConfigError(
                f"held_out_percent is {self.held_out_percent}, but there is a file for validation; give one of them",
                param="held_out_percent",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptimConfig(OptimConfig):
    """As in pretraining, with the defaults of fine-tuning: AdamW, a cosine, and no losses on the router."""

    learning_rate: float = 3e-4
    schedule: str = "cosine"
    warmup_steps: int = 5
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    balance_coef: float = 0.0
    z_coef: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneRunConfig(RunConfig):
    """As in pretraining; without ``steps`` the run takes as many as ``epochs`` need."""

    FEWEST_STEPS: ClassVar[int] = 0

    steps: int = 0
    epochs: int = 3

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        check_least(self, epochs=1)
        check_most(self, epochs=_MOST)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """A low-rank adapter beside the frozen model; see ``adapters.LoraConfig``. ``targets`` is a list with commas."""

    rank: int = 16
    alpha: float = 32.0
    targets: str = "q,k,v,o,gate_up,down"
    expert_rank: int = 0
    dropout: float = 0.0
    rslora: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self.lora()

    def lora(self) -> LoraConfig:
        """The same as the adapters take it. Raises ConfigError where they refuse it."""
        values = {name.name: getattr(self, name.name) for name in dataclasses.fields(self)}
        names = tuple(name.strip() for name in self.targets.split(",") if name.strip())
        return LoraConfig(**values | {"targets": names, "expert_rank": self.expert_rank or None})


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """Chosen experts alone are trained: ``file`` is what ``mixtral adapter experts --json`` wrote."""

    file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoTable:
    """``beta`` of the loss; the part of pairs taken for wrong; the weight of the chosen answer's own likelihood;
    log-probabilities per token instead of per answer; and where the reference comes from: ``adapter-off``, ``cached``,
    or ``auto``, which caches where there is no adapter or more than one epoch."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    nll_coef: float = 1.0
    length_normalised: bool = False
    reference: str = "auto"

    def __post_init__(self) -> None:
        check_least(self, beta=1e-12, label_smoothing=0.0, nll_coef=0.0)
        check_most(self, label_smoothing=0.5)
        check_choice(self, reference=("auto", "adapter-off", "cached"))


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneConfig:
    """All of a fine-tuning run. Without ``adapter`` and ``experts`` all weights are trained."""

    model: ModelConfig
    data: TextConfig
    optim: TuneOptimConfig
    run: TuneRunConfig
    record: RecordConfig = field(default_factory=RecordConfig)
    adapter: AdapterConfig | None = None
    experts: ExpertsConfig | None = None

    def __post_init__(self) -> None:
        if self.adapter is not None and self.experts is not None:
            raise ConfigError("there are tables adapter and experts; expected one of them", param="experts")
        if self.optim.optimizer == "muon" and (self.adapter is not None or self.experts is not None):
            raise ConfigError(
                'optimizer is "muon", which is for models that are trained whole; expected "adamw" for an adapter or '
                "chosen experts",
                param="optimizer",
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``from_dict`` reads them back."""
        return dataclasses.asdict(self)

    def with_steps(self, documents: int) -> Self:
        """The same with its number of steps, for that many documents."""
        wanted = -(-documents * self.run.epochs // self.data.documents_per_step)
        return dataclasses.replace(self, run=dataclasses.replace(self.run, steps=self.run.steps or wanted))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str) -> Self:
        """Read the tables.

        Raises:
            ConfigError: a key is unknown or missing, or a value is of another type or out of range.
        """
        refuse_unknown(values, [field.name for field in dataclasses.fields(cls)], source)
        has = {name for name in ("adapter", "experts") if values.get(name) is not None}
        return cls(
            model=read_table(ModelConfig, values, "model", source),
            data=read_table(TextConfig, values, "data", source),
            optim=read_table(TuneOptimConfig, values, "optim", source),
            run=read_table(TuneRunConfig, values, "run", source),
            record=read_table(RecordConfig, values, "record", source),
            adapter=read_table(AdapterConfig, values, "adapter", source) if "adapter" in has else None,
            experts=read_table(ExpertsConfig, values, "experts", source) if "experts" in has else None,
            **cls._more(values, source),
        )

    @classmethod
    def _more(cls, values: Mapping[str, Any], source: str) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig(TuneConfig):
    """Supervised fine-tuning: the assistant's turns, and plain text, are learnt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoConfig(TuneConfig):
    """Direct preference optimization: of two answers the chosen one becomes likelier."""

    dpo: DpoTable

    @classmethod
    def _more(cls, values: Mapping[str, Any], source: str) -> dict[str, Any]:
        return {"dpo": read_table(DpoTable, values, "dpo", source)}


def with_changes(values: Mapping[str, Any], changes: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Tables with some values replaced, by their dotted names (``run.epochs``); a new table is made for a new name.

    Raises:
        ConfigError: a name is not of the form TABLE.KEY.
    """
    changed = {name: dict(table_of(values, name, source)) for name in values}
    for name, value in changes.items():
        table, dot, key = name.partition(".")
        if not (table and dot and key):
            raise ConfigError(f"{name!r} is no name of a value; expected TABLE.KEY, for example run.epochs", param=name)
        changed.setdefault(table, {})[key] = value
    return changed
