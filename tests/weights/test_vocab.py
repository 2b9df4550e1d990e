from __future__ import annotations

import itertools

import pytest
import torch

from mixtral.errors import CheckpointError
from mixtral.tokenizer.tokenizer import Tokenizer
from mixtral.weights.vocab import build_respell, check_rows, expand_rows, row_map, share_rows, trained_ids


def test_row_map() -> None:
    rows = row_map([7, 2, 5, 2], 9)
    assert rows.tolist() == [3, 3, 0, 3, 3, 1, 3, 2, 3]
    assert rows.dtype == torch.int32
    assert check_rows(rows, 9) == 4
    assert trained_ids(rows) == [2, 5, 7]


@pytest.mark.parametrize("trained", [[], [4], list(range(8)), list(range(9))])
def test_extreme_row_maps_are_valid(trained: list[int]) -> None:
    rows = row_map(trained, 9)
    assert check_rows(rows, 9) == min(len(trained) + 1, 9)
    table = torch.arange(int(rows.max()) + 1).view(-1, 1) * torch.ones(1, 4)
    assert torch.equal(share_rows(expand_rows(table, rows), rows), table)


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(8, dtype=torch.int32),
        torch.zeros(9, dtype=torch.int64),
        torch.tensor([1, 0, 2, 2, 2, 2, 2, 2, 2], dtype=torch.int32),
        torch.tensor([0, 0, 1, 2, 2, 2, 2, 2, 2], dtype=torch.int32),
        torch.tensor([0, 1, 3, 3, 3, 3, 3, 3, 3], dtype=torch.int32),
        torch.tensor([-1, 0, 1, 1, 1, 1, 1, 1, 1], dtype=torch.int32),
    ],
)
def test_other_row_maps_are_refused(rows: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="row_of_id"):
        check_rows(rows, 9)


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    for bad in ([9], [-1]):
        with pytest.raises(CheckpointError, match="vocabulary of 9"):
            row_map(bad, 9)


def test_expanding_and_sharing_are_inverse() -> None:
    rows = row_map([1, 3], 5)
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]])
    full = expand_rows(table, rows)
    assert full.tolist() == [[9, 9], [1, 2], [9, 9], [3, 4], [9, 9]]
    assert torch.equal(share_rows(full, rows), table)
    full[4, 1] = 0
    with pytest.raises(CheckpointError, match=r"1 ids do not have .* \[4\]"):
        share_rows(full, rows)


SURFACES = [b"", b"a", b"b", b"c", b"\xc3", b"\xa9", b"ab", b"bc", b"abc", b"abcd", b"d", b"\xc3\xa9", b"abab", b"bab"]


def test_shortest_spelling_and_longer_first_piece() -> None:
    spelled = build_respell(SURFACES, {1, 2, 3, 4, 5, 6, 7, 10})
    assert spelled == {
        8: (6, 3),  # ab + c, not a + bc
        9: (6, 3, 10),
        11: (4, 5),
        12: (6, 6),
        13: (2, 6),
    }


def test_an_id_that_cannot_be_spelled() -> None:
    with pytest.raises(CheckpointError, match="token 10 b'd' cannot be spelled"):
        build_respell(SURFACES, {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13})


def test_of_equal_surfaces_the_text_piece_is_taken() -> None:
    assert build_respell([b"a", b"a", b"aa"], {0, 1}) == {2: (1, 1)}


def brute_force(surface: bytes, kept: dict[bytes, int]) -> tuple[int, ...]:
    for pieces in range(1, len(surface) + 1):
        found = []
        for cuts in itertools.combinations(range(1, len(surface)), pieces - 1):
            parts = [surface[a:b] for a, b in itertools.pairwise((0, *cuts, len(surface)))]
            if all(part in kept for part in parts):
                found.append(([len(part) for part in parts], tuple(kept[part] for part in parts)))
        if found:
            return max(found)[1]
    raise ValueError(surface)


def test_spellings_against_brute_force() -> None:
    letters = "ab"
    words = ["".join(word) for size in range(1, 8) for word in itertools.product(letters, repeat=size)]
    surfaces = [word.encode() for word in words]
    kept = {i for i in range(len(words)) if len(words[i]) == 1 or (len(words[i]) < 5 and i % 3 == 0)}
    by_surface = {surfaces[i]: i for i in kept}
    for i, spelled in build_respell(surfaces, kept).items():
        assert spelled == brute_force(surfaces[i], by_surface)


def test_every_text_id_of_the_real_vocabulary_can_be_spelled() -> None:
    """17.1 point 6: the joined surfaces equal the surface of the id, and only kept ids are used."""
    tokenizer = Tokenizer.from_version("v3")
    surfaces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    kept = {i for i, surface in enumerate(surfaces) if len(surface) == 1 or (len(surface) > 1 and i % 8 == 0)}
    respell = build_respell(surfaces, kept)
    assert respell.keys() == {i for i, surface in enumerate(surfaces) if surface} - kept
    for i, spelled in respell.items():
        assert b"".join(surfaces[piece] for piece in spelled) == surfaces[i]
        assert kept.issuperset(spelled)
