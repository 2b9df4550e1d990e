"""The model that fine-tuning starts from: any folder that can be loaded, ready for gradients, and its tokenizer.

A model with shared vocabulary rows (the embedded one) keeps them: its head has R + 1 rows instead of V, as in its
pretraining, which more than halves its work.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from mixtral.errors import ConfigError
from mixtral.model import Mixtral
from mixtral.quant.modules import PackedEmbedding, PackedExperts, PackedLinear
from mixtral.tokenizer import Tokenizer, check_pieces
from mixtral.weights import is_compact, load_compact, load_model, pieces_of, respelling_of
from mixtral.weights.load import place
from mixtral.weights.names import EMBEDDING, HEAD, is_router
from mixtral.weights.vocab import share_rows

__all__ = ["Start", "fingerprint", "load_start"]

_WEIGHTS = {".safetensors", ".gguf", ".pth", ".pt", ".bin"}
_CONFIGS = {"config.json", "params.json", "respelling.json"}
_PART = re.compile(r"(.+)-[0-9]{5}(-of-[0-9]{5}\.gguf)", re.DOTALL)
_ENDS = 1 << 20  # bytes of either end of a file that its fingerprint covers


@dataclass(frozen=True, slots=True)
class Start:
    """``model`` computes in the dtype of the run; ``masters`` are its exact values, where training needs them.

    ``row_of_id`` [V] int32 and ``respell`` are those of a model with shared rows, whose last row then stands for
    ``copies_of_last`` ids; otherwise every id is its own row. ``notes`` is what its file says of the run that made it.
    """

    model: Mixtral
    masters: dict[str, Tensor]
    tokenizer: Tokenizer
    row_of_id: Tensor | None
    respell: dict[int, tuple[int, ...]]
    copies_of_last: int
    notes: Mapping[str, str] = field(default_factory=dict)

    def rows(self, ids: Sequence[int]) -> Tensor:
        """The row of every id, int64."""
        ids_T = torch.tensor(ids, dtype=torch.int64)
        return ids_T if self.row_of_id is None else self.row_of_id[ids_T].long()

    def without_row(self, ids: Sequence[int]) -> list[int]:
        """Those of the ids that have no row of their own, so that they cannot be learnt."""
        if self.row_of_id is None:
            return []
        shared = self.model.config.vocab_size - 1
        return [id for id, row in zip(ids, self.rows(ids).tolist(), strict=True) if row == shared]


def load_start(path: Path, *, dtype: str, full: bool) -> Start:
    """Load a model for training in ``dtype``. ``full`` keeps exact masters, and wants weights that are not quantised;
    otherwise quantised matrices stay as they are.

    Raises:
        ConfigError: ``full``, and the weights are quantised.
        CheckpointError: as ``mixtral.load``.
        TokenizerError: no tokenizer of Mixtral has the model's vocabulary, or its file spells ids in another way.
    """
    wanted = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    if path.is_dir() and is_compact(path):
        return _compact(path, wanted, full=full)
    model = load_model(path, device="cpu", dtype=None if full else wanted, reference=True)
    packed = [name for name, module in model.named_modules() if _is_packed(module)]
    if full and packed:
        raise ConfigError(
            f"{path}: {packed[0]} and {len(packed) - 1} other modules are quantised; all of a model can be trained "
            "from float weights only. Train an adapter (a table [adapter], or --adapter), or take the float weights",
            param="path",
        )
    respell = respelling_of(path)
    version = Tokenizer.for_vocab_size(model.config.vocab_size).version
    tokenizer = Tokenizer.from_version(version, respell=respell)
    if pieces := pieces_of(path):
        check_pieces(tokenizer, pieces, source=str(path))
    masters = _narrow(model, wanted) if full else {}
    return Start(model, masters, tokenizer, None, respell, 1)


def _compact(path: Path, dtype: torch.dtype, *, full: bool) -> Start:
    found = load_compact(path, device="cpu")
    config = found.model.config
    tables = {name: share_rows(found.model.get_parameter(name).detach(), found.row_of_id) for name in (EMBEDDING, HEAD)}
    model = Mixtral(config.replace(vocab_size=len(tables[HEAD])), device="meta", dtype=torch.float32)
    for name, value in found.model.named_parameters():
        place(model, name, tables.get(name, value.detach()))
    version = Tokenizer.version_for(config.vocab_size) or "v3"
    tokenizer = Tokenizer.from_version(version, respell=found.respell)
    masters = _narrow(model, dtype)
    copies = config.vocab_size - len(tables[HEAD]) + 1
    kept = masters if full else {}
    return Start(model, kept, tokenizer, found.row_of_id, found.respell, copies, found.metadata)


def _is_packed(module: nn.Module) -> bool:
    return isinstance(module, PackedEmbedding | PackedExperts | PackedLinear)


def _narrow(model: Mixtral, dtype: torch.dtype) -> dict[str, Tensor]:
    """Round all but the routers to the dtype; the values before, float32."""
    masters = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    for name, value in masters.items():
        place(model, name, value.to(torch.float32 if is_router(name) else dtype))
    return masters


def fingerprint(path: Path) -> str:
    """A sha256 that tells models apart without reading all of them: names, sizes, and both ends of every file; of a
    split GGUF, of all its parts, whichever is given.

    Raises:
        ConfigError: a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for file in sorted(_files(path)):
            size = file.stat().st_size
            digest.update(f"{file.name}\0{size}\0".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(_ENDS))
                if size > _ENDS:
                    stream.seek(max(_ENDS, size - _ENDS))
                    digest.update(stream.read(_ENDS))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})", param="path") from None
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return [file for file in path.iterdir() if file.suffix in _WEIGHTS or file.name in _CONFIGS]
    part = _PART.fullmatch(path.name)
    if part is None:
        return [path]
    others = ((file, _PART.fullmatch(file.name)) for file in path.parent.iterdir())
    return [file for file, other in others if other and other.groups() == part.groups()]
