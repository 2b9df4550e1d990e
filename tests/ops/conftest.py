"""Operations of training have two implementations: compiled, and in torch."""

from __future__ import annotations

import pytest

from mixtral.ops import compiled


@pytest.fixture(params=["compiled", "torch"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A test with this fixture runs with compiled code and without."""
    if request.param == "torch":
        monkeypatch.setattr(compiled, "is_compiled", lambda *tensors: False)
    return str(request.param)
