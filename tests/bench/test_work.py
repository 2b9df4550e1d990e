"""What is measured: the numbers of each kind of work, and prompts that are the same on every side."""

from __future__ import annotations

import pytest

from mixtral.bench.work import KINDS, Work, works
from mixtral.errors import ConfigError


def test_every_kind_has_its_defaults() -> None:
    assert [one.name for one in works(KINDS)] == [
        *("decode 1", "prefill 512", "prefill 2048"),
        *("batch 8", "batch 32", "context 8192"),
    ]
    assert works(["decode"]) == [Work("decode", 8, 1, 32)]
    assert works(["context"], depth=100, steps=4) == [Work("context", 100, 1, 4)]


def test_work_keeps_its_order_and_is_done_once() -> None:
    found = works(["batch", "prefill", "batch"], sequences=[4, 2, 4], tokens=[7, 7])
    assert [one.name for one in found] == ["batch 4", "batch 2", "prefill 7"]


def test_what_is_timed_and_what_a_sequence_becomes() -> None:
    prefill, batch, context = Work("prefill", 512, 1, 0), Work("batch", 8, 4, 32), Work("context", 100, 1, 10)
    assert (prefill.tokens, batch.tokens, context.tokens) == (512, 128, 10)
    assert (prefill.cells(5), batch.cells(5)) == (513, 41)
    assert context.cells(5) == 100 + 6 * 10 + 1  # the warm-up and five turns follow each other
    assert prefill.to_json() == {"kind": "prefill", "prompt": 512, "sequences": 1, "steps": 0}


def test_prompts_are_new_in_every_turn_and_the_same_on_every_side() -> None:
    work = Work("batch", 8, 3, 32)
    first, again, other = work.prompts(1, 32000), work.prompts(1, 32000), work.prompts(2, 32000)
    assert first == again
    assert [len(ids) for ids in first] == [8, 8, 8]
    assert len({tuple(ids) for ids in [*first, *other]}) == 6
    assert all(300 <= id < 32000 for ids in first for id in ids)
    assert all(10 <= id < 20 for ids in work.prompts(1, 20) for id in ids)


@pytest.mark.parametrize(("kinds", "told"), [(["decoding"], "work is 'decoding'; expected one or more of"), ([], "no")])
def test_unknown_work_is_refused(kinds: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        works(kinds)
