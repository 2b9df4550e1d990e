"""One grammar compiler for each vocabulary, for all tests of a run."""

from __future__ import annotations

import pytest

from mixtral.grammar import Grammar
from mixtral.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def v3() -> Grammar:
    return Grammar(Tokenizer("v3"))


@pytest.fixture(scope="session")
def v1() -> Grammar:
    return Grammar(Tokenizer("v1"))
