"""The mixture of skills, and the documents of one suite."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest

from mixtral.desk.source import SPLITS, Split
from mixtral.desk.write import MIXTURE, SKILLS, SUITES, document, suite_documents
from mixtral.errors import ConfigError


@pytest.mark.parametrize(
    ("split", "golden"),
    [("train", "402c14acf4af0d69"), ("validation", "975587caaf8385bd"), ("test", "7a898f002fe79a25")],
)
def test_the_order_of_skills_never_changes(split: Split, golden: str) -> None:
    skills = " ".join(document(0, split, number).skill for number in range(200))
    assert hashlib.blake2b(skills.encode(), digest_size=8).hexdigest() == golden


def test_a_document_depends_on_its_number_alone() -> None:
    forwards = [document(3, "train", number) for number in range(60)]
    backwards = [document(3, "train", number) for number in reversed(range(60))]
    assert forwards == backwards[::-1]
    for number, found in enumerate(forwards):
        assert found == SKILLS[found.skill](3, "train", number)


def test_shares_follow_the_mixture() -> None:
    assert sum(MIXTURE.values()) == 100
    counts = Counter(document(0, "train", number).skill for number in range(1000))
    assert set(counts) == set(SKILLS)
    for skill, percent in MIXTURE.items():
        assert abs(counts[skill] - 10 * percent) < 50, skill


def test_another_mixture() -> None:
    counts = Counter(document(0, "train", number, {"sums": 3, "notes": 1, "chat": 0}).skill for number in range(200))
    assert set(counts) == {"sums", "notes"}
    assert 120 < counts["sums"] < 180


@pytest.mark.parametrize("mixture", [{"poems": 1}, {"sums": -1, "notes": 4}, {"sums": 0}, {}])
def test_a_wrong_mixture_is_refused(mixture: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="mixture"):
        document(0, "train", 0, mixture)


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_has_documents_in_both_held_out_splits(suite: str) -> None:
    for split in ("validation", "test"):
        found = suite_documents(suite, 15, seed=0, split=split)  # type: ignore[arg-type]
        assert len(found) == 15
        assert {(each.suite, each.skill) for each in found} == {(suite, suite.partition("/")[0])}
    assert suite_documents(suite, 5, seed=0, split="test") == suite_documents(suite, 15, seed=0, split="test")[:5]


def test_held_out_prompts_are_never_trained() -> None:
    def prompts(split: Split) -> set[str]:
        found = (document(0, split, number) for number in range(1200))
        # A chat may ask for the same fact in the same words; its suites are checked with its skill.
        return {str((each.messages[:-1], each.tools)) for each in found if each.messages and each.skill != "chat"}

    texts = {split: prompts(split) for split in SPLITS}
    assert all(len(found) > 400 for found in texts.values())
    assert texts["train"].isdisjoint(texts["validation"] | texts["test"])


def test_an_unknown_or_empty_suite_is_an_error() -> None:
    with pytest.raises(ConfigError, match="unknown suite 'sums/9-op'"):
        suite_documents("sums/9-op", 5, seed=0, split="test")
    with pytest.raises(ConfigError, match="0 documents among the first 440 of split 'train', 1 asked for"):
        suite_documents("sums/5-6-op", 1, seed=0, split="train")
