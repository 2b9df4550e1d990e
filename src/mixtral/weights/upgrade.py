"""From the vocabulary v1 (32,000 ids) to v3 (32,768) and back: the 768 control ids of v3 come after the first three."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtral.errors import ConfigError

__all__ = ["VOCABULARIES", "downgrade_rows", "upgrade_rows", "upgraded"]

VOCABULARIES = {"v1": 32000, "v3": 32768}
_KEPT = 3  # <unk>, <s>, </s>
_NEW = VOCABULARIES["v3"] - VOCABULARIES["v1"]


def upgraded(have: int, wanted: int) -> int:
    """``wanted``, if rows can be moved from the one vocabulary size to the other.

    Raises:
        ConfigError: they are not the sizes of v1 and v3.
    """
    if sorted((have, wanted)) != sorted(VOCABULARIES.values()):
        raise ConfigError(
            f"the model has {have:,} token ids and {wanted:,} were asked for; only {VOCABULARIES['v1']:,} (v1) and "
            f"{VOCABULARIES['v3']:,} (v3) can be turned into each other",
            param="vocab_size",
        )
    return wanted


def upgrade_rows(table: Tensor, *, seed: int = 0) -> Tensor:
    """[32000, D] -> [32768, D]: old row i >= 3 becomes row i + 768; the new rows are random, with std 1 / sqrt(D).

    Ids 3 to 770 of v3 are its control ids, so every old id keeps its meaning and its logits.
    """
    generator = torch.Generator().manual_seed(seed)
    width = table.shape[1]
    fresh = torch.randn((_NEW, width), generator=generator) / width**0.5
    return torch.cat((table[:_KEPT], fresh.to(table.dtype), table[_KEPT:]))


def downgrade_rows(table: Tensor) -> Tensor:
    """[32768, D] -> [32000, D]: the inverse of ``upgrade_rows``; the rows of the control ids are dropped."""
    return torch.cat((table[:_KEPT], table[_KEPT + _NEW :]))
