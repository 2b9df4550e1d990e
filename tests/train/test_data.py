"""Batches: the same for the same seed and step, labels that never leave their document, and only ids with rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from mixtral.desk.source import Split
from mixtral.desk.write import document
from mixtral.errors import TrainingError
from mixtral.tokenizer import Tokenizer
from mixtral.train.config import DataConfig
from mixtral.train.data import DeskData, TokenBatch, choose_trained_ids, encode_document

CONFIG = DataConfig(documents_per_step=6, trained_rows=1400, sample_documents=200, unknown_per_mille=0)


@pytest.fixture(scope="module")
def data(trained_ids: list[int]) -> DeskData:
    return DeskData(CONFIG, trained_ids)


@pytest.fixture
def changed(data: DeskData, monkeypatch: pytest.MonkeyPatch) -> DeskData:
    """The same data, whose ``config`` a test may replace."""
    monkeypatch.setattr(data, "config", data.config)
    return data


def equal(one: TokenBatch, other: TokenBatch) -> bool:
    names = ("inputs_T", "labels_T", "weights_T", "own_T")
    return one.lengths == other.lengths and all(torch.equal(getattr(one, n), getattr(other, n)) for n in names)


def only_batch(data: DeskData, step: int, split: Split = "train") -> TokenBatch:
    (batch,) = data.micro_batches(step, split=split)
    return batch


def test_a_batch_depends_on_seed_and_step_alone(changed: DeskData, trained_ids: list[int]) -> None:
    changed.config = replace(CONFIG, unknown_per_mille=50)
    forward = [only_batch(changed, step) for step in range(3)]
    other = DeskData(changed.config, trained_ids)
    backward = [only_batch(other, step) for step in (2, 1, 0)][::-1]
    assert all(equal(one, two) for one, two in zip(forward, backward, strict=True))
    assert not equal(forward[0], forward[1])
    changed.config = replace(changed.config, seed=2)
    assert not equal(forward[0], only_batch(changed, 0))


def test_a_step_has_the_mixture_of_its_time(trained_ids: list[int]) -> None:
    early = replace(CONFIG, mixture={"sums": 1}, later={"3": {"calls": 1}})
    data = DeskData(early, trained_ids)

    def skills(step: int, split: Split = "train") -> list[TokenBatch]:
        return list(data.micro_batches(step, split=split))

    for step, kept in ((2, {"sums": 1}), (3, {"calls": 1})):
        alone = DeskData(replace(CONFIG, mixture=kept), trained_ids)
        assert [part.lengths for part in alone.micro_batches(step)] == [part.lengths for part in skills(step)]
    plain = DeskData(replace(CONFIG, mixture={"sums": 1}), trained_ids)
    expected = [part.lengths for part in plain.micro_batches(5, split="validation")]
    assert [part.lengths for part in skills(5, "validation")] == expected


def test_labels_are_the_next_inputs_and_stay_in_their_document(data: DeskData) -> None:
    batch = only_batch(data, 3)
    bos, eos = (int(data.row_of_id[i]) for i in (data.tokenizer.bos_id, data.tokenizer.eos_id))
    assert len(batch.lengths) == 6
    assert sum(batch.lengths) == batch.inputs_T.numel() == batch.labels_T.numel() == batch.weights_T.numel()
    for inputs_T, labels_T in zip(
        torch.split(batch.inputs_T, batch.lengths), torch.split(batch.labels_T, batch.lengths), strict=True
    ):
        assert torch.equal(labels_T[:-1], inputs_T[1:])
        assert (int(inputs_T[0]), int(labels_T[-1])) == (bos, eos)
        assert bos not in labels_T


@pytest.mark.parametrize("count", [2, 4])
def test_a_step_trains_the_same_tokens_in_any_number_of_parts(changed: DeskData, count: int) -> None:
    changed.config = replace(CONFIG, documents_per_step=8, unknown_per_mille=50)
    whole = only_batch(changed, 2)
    assert changed.rows - 1 in whole.inputs_T
    changed.config = replace(changed.config, micro_batches=count)
    parts = list(changed.micro_batches(2))
    assert [len(part.lengths) for part in parts] == [8 // count] * count
    assert sum((part.lengths for part in parts), ()) == whole.lengths
    for name in ("inputs_T", "labels_T", "weights_T", "own_T"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_the_assistants_tokens_weigh_one_and_all_others_the_prompt_weight(
    changed: DeskData, trained_ids: list[int]
) -> None:
    changed.config = replace(CONFIG, documents_per_step=1, prompt_weight=0.25)
    looked_at = 0
    for number in range(40):
        messages = document(CONFIG.seed, "train", number).messages
        answers = [m for m in messages if m["role"] == "assistant"]
        if len(answers) != 1 or not isinstance(answers[0].get("content"), str) or answers[0].get("tool_calls"):
            continue
        batch = only_batch(changed, number)
        assert set(batch.weights_T.tolist()) == {0.25, 1.0}
        assert torch.equal(batch.own_T, batch.weights_T == 1)
        own = [trained_ids[row] for row in batch.labels_T[batch.own_T].tolist()]
        assert own[-1] == changed.tokenizer.eos_id
        assert changed.tokenizer.decode(own).strip() == answers[0]["content"].strip()
        looked_at += 1
    assert looked_at >= 5


@pytest.mark.parametrize("prompt_weight", [0.0, 1.0])
def test_who_wrote_a_token_does_not_depend_on_what_it_weighs(changed: DeskData, prompt_weight: float) -> None:
    own_T = only_batch(changed, 0).own_T
    changed.config = replace(CONFIG, prompt_weight=prompt_weight)
    batch = only_batch(changed, 0)
    assert torch.equal(batch.own_T, own_T)
    assert set(batch.weights_T.tolist()) == {prompt_weight, 1.0}


def test_plain_text_is_learnt_whole(data: DeskData) -> None:
    story = next(d for d in (document(1, "train", n, {"story": 1}) for n in range(5)) if d.text)
    ids, trained = encode_document(data.tokenizer, story)
    assert trained == [False] + [True] * (len(ids) - 1)
    assert data.tokenizer.decode(ids) == story.text


def test_trained_ids_are_the_same_every_time(trained_ids: list[int]) -> None:
    tokenizer = Tokenizer.from_version("v3")
    assert choose_trained_ids(tokenizer, DataConfig(trained_rows=1400, sample_documents=200)) == trained_ids
    assert len(trained_ids) == 1400
    assert trained_ids == sorted(set(trained_ids))
    needed = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.control_id("[INST]"), *tokenizer.encode("0 1 2 3 4")}
    needed |= {i for i in range(tokenizer.vocab_size) if tokenizer.is_byte(i)}
    assert needed <= set(trained_ids)


def test_frequent_ids_go_before_rare_ones(trained_ids: list[int]) -> None:
    tokenizer = Tokenizer.from_version("v3")
    counts = Counter(i for n in range(200) for i in encode_document(tokenizer, document(1, "train", n))[0])
    left_out = [count for i, count in counts.items() if i not in set(trained_ids)]
    words = [counts[i] for i in trained_ids if len(tokenizer.piece(i).lstrip("▁")) > 1 and not tokenizer.is_byte(i)]
    words = [count for count in words if count]
    assert max(left_out, default=0) <= max(words)
    assert len(left_out) < len(counts) - 300


def test_too_few_rows_say_how_many_are_needed() -> None:
    with pytest.raises(TrainingError, match="trained_rows is 300; the indispensable ids alone are"):
        choose_trained_ids(Tokenizer.from_version("v3"), DataConfig(trained_rows=300, sample_documents=20))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_document_is_spelled_with_trained_ids_and_still_says_the_same(data: DeskData, split: Split) -> None:
    plain = Tokenizer.from_version("v3")
    shared = data.rows - 1
    for number in range(10_000, 10_100):
        item = document(1, split, number)
        ids, _ = encode_document(data.tokenizer, item)
        assert int(data.row_of_id[torch.tensor(ids)].max()) < shared, number
        assert data.tokenizer.decode(ids) == plain.decode(encode_document(plain, item)[0])


def test_a_label_without_a_row_is_refused(trained_ids: list[int]) -> None:
    without = [i for i in trained_ids if i != Tokenizer.from_version("v3").control_id("[/INST]")]
    with pytest.raises(TrainingError, match="has no row of its own"):
        list(DeskData(CONFIG, without).micro_batches(0))


def test_control_ids_of_later_skills_have_rows_or_are_missed_before_the_run_starts() -> None:
    config = replace(CONFIG, trained_rows=1300, sample_documents=50, mixture={"sums": 1}, later={"9": {"calls": 1}})
    tokenizer = Tokenizer.from_version("v3")
    trained = choose_trained_ids(tokenizer, config)
    controls = {tokenizer.control_id(name) for name in ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]")}
    assert controls < set(trained)
    assert not controls & set(choose_trained_ids(tokenizer, replace(config, later={})))
    assert [len(part.lengths) for part in DeskData(config, trained).micro_batches(9)] == [6]
    without = [i for i in trained if i != tokenizer.control_id("[TOOL_CALLS]")]
    with pytest.raises(
        TrainingError, match=r"data.later has documents with \[TOOL_CALLS\], for .* start a new run from nothing"
    ):
        DeskData(config, without)


def test_an_empty_later_mixture_is_the_default(trained_ids: list[int]) -> None:
    one, other = (DeskData(replace(CONFIG, mixture=given, later={"1": {}}), trained_ids) for given in ({}, {"sums": 1}))
    assert equal(only_batch(one, 1), only_batch(other, 1))
    assert not equal(only_batch(one, 0), only_batch(other, 0))


def test_every_rank_takes_its_turn_in_every_part(changed: DeskData) -> None:
    changed.config = replace(CONFIG, micro_batches=2)
    assert [list(part) for part in changed.numbers(1)] == [[6, 7, 8], [9, 10, 11]]
    assert [list(part) for part in changed.numbers(1, (1, 2))] == [[7], [10]]
    assert [list(part) for part in changed.numbers(1, (0, 2))] == [[6, 8], [9, 11]]


def test_unknown_words_replace_inputs_of_the_training_split_only(changed: DeskData) -> None:
    shared = changed.rows - 1
    clean = only_batch(changed, 0)
    changed.config = replace(CONFIG, unknown_per_mille=200)
    batch = only_batch(changed, 0)
    replaced_T = batch.inputs_T == shared
    assert 0.1 < float(replaced_T.float().mean()) <= 0.2
    assert torch.equal(batch.inputs_T[~replaced_T], clean.inputs_T[~replaced_T])
    assert torch.equal(batch.labels_T, clean.labels_T)
    assert shared not in only_batch(changed, 0, "validation").inputs_T


def test_unknown_words_are_as_many_as_asked_for_and_fall_on_other_places(changed: DeskData) -> None:
    changed.config = replace(CONFIG, unknown_per_mille=3)  # less than one per document
    hits, tokens = [], 0
    for step in range(40):
        batch = only_batch(changed, step)
        tokens += batch.inputs_T.numel()
        for length, inputs_T in zip(batch.lengths, torch.split(batch.inputs_T, batch.lengths), strict=True):
            hits += [int(hit) / length for hit in torch.nonzero(inputs_T == changed.rows - 1)[:, 0]]
    assert 0.002 < len(hits) / tokens < 0.004
    assert [sum(low <= hit < low + 0.25 for hit in hits) > 0.1 * len(hits) for low in (0, 0.25, 0.5, 0.75)] == [
        True
    ] * 4
