"""Training documents with functions, as they are with other shares of what is changed in them."""

from __future__ import annotations

import pytest

import mixtral.desk.calls
from mixtral.desk.source import Document


def training(count: int, *, made_up: int, unheard: int, renamed: int) -> list[Document]:
    """The first documents with these percentages; with more of one they do not differ in anything else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixtral.desk.calls, "MADE_UP_PERCENT", made_up)
        patch.setattr(mixtral.desk.calls, "UNHEARD_PERCENT", unheard)
        patch.setattr(mixtral.desk.calls, "RENAMED_PERCENT", renamed)
        return [mixtral.desk.calls.calls(3, "train", number) for number in range(count)]


def functions(document: Document) -> list[dict[str, object]]:
    """The functions on offer."""
    return [tool["function"] for tool in document.tools]
