"""Importance files in both forms and all spellings: what is read, what the encoders get of it, what is refused."""

from __future__ import annotations

import contextlib
import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError, ConfigError
from mixtral.files.gguf import read_gguf
from mixtral.model.mixtral import Mixtral
from mixtral.quant.encode import WEIGHTED, encode_rows
from mixtral.quant.kencode import encode_k
from mixtral.weights.convert import convert_to_gguf
from mixtral.weights.importance import FEW_TOKENS, read_importance
from mixtral.weights.names import pieces, tensors
from mixtral.weights.save import save_model

Array = NDArray[np.float32]
CONFIG = MixtralConfig(
    vocab_size=48,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_local_experts=3,
    num_experts_per_tok=2,
    max_position_embeddings=512,
)
CALLS, CHUNK = 7, 512


@dataclass(frozen=True)
class Row:
    """One entry: mean squares [matrices, columns], and the tokens that each matrix saw."""

    means: Array
    tokens: tuple[int, ...]


def statistics() -> dict[str, Row]:
    """Importance as it would be collected: experts share the input of gate and up, nothing for embedding and head."""
    generator = np.random.default_rng(17)
    seen = (1000, 40, 5000)
    found = {}
    for layer in range(CONFIG.num_hidden_layers):
        means = {width: np.exp(generator.normal(size=(3, width)) * 2).astype(np.float32) for width in (256, 512)}
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp"):
            found[f"blk.{layer}.{name}.weight"] = Row(means[256][:1], (3584,))
        for name in ("ffn_gate_exps", "ffn_up_exps"):
            found[f"blk.{layer}.{name}.weight"] = Row(means[256], seen)
        found[f"blk.{layer}.ffn_down_exps.weight"] = Row(means[512], seen)
    return found


def unseen(rows: Mapping[str, Row], layer: int, expert: int) -> dict[str, Row]:
    """The same where one expert saw no token."""
    changed = dict(rows)
    for name, row in rows.items():
        if name.startswith(f"blk.{layer}.") and "_exps" in name:
            means, tokens = row.means.copy(), list(row.tokens)
            means[expert], tokens[expert] = 0, 0
            changed[name] = Row(means, tuple(tokens))
    return changed


def split(rows: Mapping[str, Row]) -> dict[str, Row]:
    """With a tensor per expert, as before April 2024."""
    found = {}
    for name, row in rows.items():
        for expert in range(len(row.means)):
            one = name.replace("_exps", f".{expert}") if "_exps" in name else name
            found[one] = Row(row.means[expert : expert + 1], row.tokens[expert : expert + 1])
    return found


def gate_up(rows: Mapping[str, Row]) -> dict[str, Row]:
    """With gate and up in one tensor."""
    return {name.replace("ffn_gate_exps", "ffn_gate_up_exps"): row for name, row in rows.items() if "_up_" not in name}


def legacy(rows: Mapping[str, Row], *, end: bytes | None = None) -> bytes:
    """The older form; the mean of a matrix without tokens is 1, as its later writers have it."""
    data = struct.pack("<i", len(rows))
    for name, row in rows.items():
        means = np.where(np.array(row.tokens)[:, None] > 0, row.means, np.float32(1))
        values = (means * np.float32(CALLS)).astype("<f4")
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", CALLS, values.size) + values.tobytes()
    return data + (struct.pack("<ii", CALLS, 8) + b"wiki.raw" if end is None else end)


def sums_of(row: Row) -> Array:
    return row.means * np.array(row.tokens, np.float32)[:, None]


def write_gguf_form(path: Path, rows: Mapping[str, Row], *, kind: str = "imatrix", **more: Any) -> None:
    """By the ``gguf`` package, with the plain sums that later versions of the tool add."""
    writer = gguf.GGUFWriter(path, "none")
    writer.kv_data[0].clear()
    writer.add_string("general.type", kind)
    writer.add_array("imatrix.datasets", more.get("datasets", ["a.txt", "b.txt"]))
    writer.add_uint32("imatrix.chunk_count", CALLS)
    writer.add_uint32("imatrix.chunk_size", CHUNK)
    for name, row in rows.items():
        one = len(row.means) == 1  # the container has no trailing dimensions of 1
        writer.add_tensor(f"{name}.in_sum2", sums_of(row)[0] if one else sums_of(row))
        counts = np.array(row.tokens, np.float32)
        writer.add_tensor(f"{name}.counts", counts if one else counts[:, None])
        writer.add_tensor(f"{name}.in_sum", -sums_of(row))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def file_of(path: Path, rows: Mapping[str, Row], form: str) -> Path:
    if form == "legacy":
        path.write_bytes(legacy(rows))
    else:
        write_gguf_form(path, rows)
    return path


SPELLINGS: dict[str, Callable[[Mapping[str, Row]], Mapping[str, Row]]] = {
    "merged": lambda rows: rows,
    "split": split,
    "gate-up": gate_up,
}


@pytest.mark.parametrize("form", ["legacy", "gguf"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_form_says_the_same(form: str, spelling: str, tmp_path: Path) -> None:
    """G5: names of merged, split and fused experts all mean the same matrices."""
    rows = statistics()
    path = file_of(tmp_path / "i.dat", SPELLINGS[spelling](rows), form)
    found = read_importance(path, CONFIG)
    assert (found.chunks, found.entries) == (CALLS, len(SPELLINGS[spelling](rows)))
    for piece in pieces(CONFIG, "gguf"):
        row, got = rows.get(piece.name), found.of(piece)
        if row is None:
            assert got is None, piece.name
            continue
        expected = row.means[piece.expert or 0]
        assert got is not None
        assert (got.dtype, got.shape) == (np.float32, (piece.shape[-1],))
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        assert found.tokens[piece.key] == (row.tokens[piece.expert or 0] if form == "gguf" else None)


@pytest.mark.parametrize("form", ["legacy", "gguf"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_expert_without_tokens(form: str, spelling: str, tmp_path: Path) -> None:
    """G1: that expert alone has no importance; the tensor it shares is not dropped."""
    rows = unseen(statistics(), 1, 2)
    found = read_importance(file_of(tmp_path / "i", SPELLINGS[spelling](rows), form), CONFIG)
    experts = [piece for piece in pieces(CONFIG, "gguf") if piece.expert is not None]
    lacking = [piece for piece in experts if found.of(piece) is None]
    assert {(piece.name[:5], piece.expert) for piece in lacking} == {("blk.1", 2)}
    assert len(lacking) == 3
    assert [found.tokens[piece.key] for piece in lacking] == [0, 0, 0]


def test_sums_of_zero_are_no_tokens(tmp_path: Path) -> None:
    rows = statistics()
    name = "blk.0.ffn_up_exps.weight"
    means = rows[name].means.copy()
    means[1] = 0
    rows[name] = replace(rows[name], means=means)
    for form in ("legacy", "gguf"):
        found = read_importance(file_of(tmp_path / form, rows, form), CONFIG)
        lacking = [piece for piece in pieces(CONFIG, "gguf") if piece.name == name and found.of(piece) is None]
        assert [(piece.expert, found.tokens[piece.key]) for piece in lacking] == [(1, 0)]


def test_one_count_for_all_experts(tmp_path: Path) -> None:
    """What the tool writes in GGUF after it has read a file of the older form."""
    rows = unseen(statistics(), 0, 1)
    flat = {}
    for name, row in rows.items():
        means = np.where(np.array(row.tokens)[:, None] > 0, row.means, np.float32(1))
        flat[name] = Row(means.reshape(1, -1), (CALLS * CHUNK,))
    write_gguf_form(tmp_path / "i.gguf", flat)
    (tmp_path / "i.dat").write_bytes(legacy(rows))
    found, other = (read_importance(tmp_path / name, CONFIG) for name in ("i.gguf", "i.dat"))
    for piece in pieces(CONFIG, "gguf"):
        first, second = found.of(piece), other.of(piece)
        assert (first is None) == (second is None), piece.name
        if first is not None and second is not None:
            np.testing.assert_allclose(first, second, rtol=1e-6)
    assert {found.tokens.get(p.key) for p in pieces(CONFIG, "gguf") if p.name == "blk.0.ffn_up_exps.weight"} == {
        None,
        0,
    }


# --- quantising -------------------------------------------------------------------------------------------------------


def no_words(size: int) -> dict[str, Any]:
    return {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(4)
    model = Mixtral(CONFIG, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    folder = tmp_path_factory.mktemp("models") / "source"
    save_model(model, folder)
    return folder


def contents(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    return {name: data[entry.start : entry.stop] for name, entry in read_gguf(path).tensors.items()}


def values_of(folder: Path, tmp_path: Path) -> dict[str, Array]:
    """Every tensor as float32 rows, in the order of the file."""
    convert_to_gguf(folder, tmp_path / "plain.gguf", form="f32", vocabulary=no_words)
    shapes = {name: entry.shape for name, entry in read_gguf(tmp_path / "plain.gguf").tensors.items()}
    plain = contents(tmp_path / "plain.gguf")
    return {name: np.frombuffer(plain[name], "<f4").reshape(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("form", ["q4_k_m", "q2_k", "q6_k"])
def test_every_matrix_gets_its_own_importance(form: str, folder: Path, tmp_path: Path) -> None:
    """The bytes are those of the reference with the importance of that matrix, and of none where there is none."""
    rows = unseen(statistics(), 1, 2)
    write_gguf_form(tmp_path / "i.gguf", rows)
    moved = convert_to_gguf(folder, tmp_path / "m.gguf", form=form, vocabulary=no_words, importance=tmp_path / "i.gguf")
    values, found = values_of(folder, tmp_path), read_gguf(tmp_path / "m.gguf")
    written = contents(tmp_path / "m.gguf")
    weighted = without = other = 0
    for tensor in tensors(CONFIG, "gguf"):
        name, kind = tensor[0].name, found.tensors[tensor[0].name].dtype
        if kind not in WEIGHTED:
            other += len(tensor) if len(tensor[0].shape) > 1 else 0
            continue
        parts = values[name].reshape(len(tensor), -1, values[name].shape[-1])
        expected = b""
        for piece, part in zip(tensor, parts, strict=True):
            row, number = rows.get(name), piece.expert or 0
            none = row is None or row.tokens[number] == 0
            means = None if row is None or none else (sums_of(row) / np.float64(row.tokens[number]))[number]
            expected += encode_k(part, kind, None if means is None else means.astype(np.float32)).tobytes()
            weighted, without = weighted + (not none), without + none
        assert written[name] == expected, name
    covered = moved.coverage
    assert covered is not None
    assert (covered.weighted, sum(covered.without.values()), covered.other) == (weighted, without, other)
    assert covered.without == {
        **dict.fromkeys(("token_embd.weight", "output.weight"), 1),
        **{f"blk.1.ffn_{part}_exps.weight": 1 for part in ("gate", "up", "down")},
    }
    assert covered.unseen == ((1, 2),)
    assert FEW_TOKENS > 40
    assert covered.scarce == ((0, 1), (1, 1))
    assert {key: value for key, value in found.metadata.items() if "imatrix" in key} == {
        "quantize.imatrix.file": "i.gguf",
        "quantize.imatrix.dataset": "a.txt, b.txt",
        "quantize.imatrix.entries_count": 16,
        "quantize.imatrix.chunks_count": CALLS,
    }


def test_importance_lowers_the_error_where_it_says(folder: Path, tmp_path: Path) -> None:
    """In the measure that it stands for, the squared error of the columns times their importance."""
    rows = statistics()
    write_gguf_form(tmp_path / "i.gguf", rows)
    values = values_of(folder, tmp_path)
    errors = []
    for importance in (None, tmp_path / "i.gguf"):
        convert_to_gguf(
            folder, tmp_path / "m.gguf", form="q3_k_s", vocabulary=no_words, importance=importance, overwrite=True
        )
        convert_to_gguf(tmp_path / "m.gguf", tmp_path / "back.gguf", form="f32", vocabulary=no_words, overwrite=True)
        decoded, total = contents(tmp_path / "back.gguf"), 0.0
        for name, row in rows.items():
            wrong = np.frombuffer(decoded[name], "<f4").reshape(values[name].shape) - values[name]
            total += float((wrong.reshape(len(row.means), -1, wrong.shape[-1]) ** 2 * row.means[:, None]).sum())
        errors.append(total)
    assert errors[1] < 0.6 * errors[0]


def test_the_form_of_the_file_does_not_matter(folder: Path, tmp_path: Path) -> None:
    """The older form divides by another number, so that only roundings differ, and here not even they."""
    rows = {
        name: replace(row, tokens=tuple(1024 for _ in row.tokens), means=np.round(row.means, 2) + np.float32(0.25))
        for name, row in statistics().items()
    }
    written = []
    for spelling, change in SPELLINGS.items():
        path = file_of(tmp_path / spelling, change(rows), "gguf")
        convert_to_gguf(folder, tmp_path / f"{spelling}.gguf", form="q4_k_m", vocabulary=no_words, importance=path)
        written.append(contents(tmp_path / f"{spelling}.gguf"))
    assert written[0] == written[1] == written[2]
    assert written[0] != contents_without(folder, tmp_path)


def contents_without(folder: Path, tmp_path: Path) -> dict[str, bytes]:
    convert_to_gguf(folder, tmp_path / "without.gguf", form="q4_k_m", vocabulary=no_words)
    return contents(tmp_path / "without.gguf")


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q5_1"])
def test_formats_that_round_to_nearest_ignore_it(name: str) -> None:
    values = torch.randn((3, 256), generator=torch.Generator().manual_seed(1))
    importance = np.linspace(0, 9, 256, dtype=np.float32)
    assert torch.equal(encode_rows(values, name, importance), encode_rows(values, name))
    for weighted in ("Q3_K", "Q4_0"):
        assert not torch.equal(encode_rows(values, weighted, importance), encode_rows(values, weighted))


@pytest.mark.parametrize(
    ("form", "told"),
    [
        *((form, "importance would change nothing: only Q2_K, .*Q6_K, Q4_0 take it") for form in ("q8_0", "f16", None)),
        ("q5_0", "has importance for no matrix that could use it"),  # the head, in Q6_K
    ],
)
def test_importance_that_nothing_can_use(form: str | None, told: str, folder: Path, tmp_path: Path) -> None:
    path, target = tmp_path / "i.gguf", tmp_path / "m.gguf"
    write_gguf_form(path, statistics())
    with pytest.raises(ConfigError, match=rf"i\.gguf: {told}"):
        convert_to_gguf(folder, target, form=form, vocabulary=no_words, importance=path)
    assert not target.exists()


def test_quantising_again_warns(folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    convert_to_gguf(folder, first, form="q4_k_m", vocabulary=no_words)
    with pytest.warns(UserWarning, match=r"quantised already \(Q4_K, Q5_K, Q6_K\) are quantised anew"):
        convert_to_gguf(first, second, form="q4_0", vocabulary=no_words)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for form in ("q4_k_m", None):  # copied bit for bit
            convert_to_gguf(first, second, form=form, vocabulary=no_words, overwrite=True)
            assert contents(second) == contents(first)
        convert_to_gguf(first, second, form="bf16", vocabulary=no_words, overwrite=True)
    write_gguf_form(tmp_path / "i.gguf", statistics())
    with pytest.raises(ConfigError, match="already is copied"):
        convert_to_gguf(first, tmp_path / "x.gguf", form="q4_k_m", vocabulary=no_words, importance=tmp_path / "i.gguf")


# --- what is refused --------------------------------------------------------------------------------------------------

TINY = CONFIG.replace(hidden_size=4, intermediate_size=6, head_dim=2, num_attention_heads=2, num_hidden_layers=1)


def tiny() -> dict[str, Row]:
    """Two entries, small enough to try every byte."""
    return {
        "blk.0.attn_q.weight": Row(np.array([[1, 2, 3, 0.5]], np.float32), (9,)),
        "blk.0.ffn_down_exps.weight": Row(np.arange(18, dtype=np.float32).reshape(3, 6) + 1, (4, 5, 6)),
    }


def refused(path: Path, data: bytes, told: str, config: MixtralConfig = TINY) -> None:
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=told):
        read_importance(path, config)


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    """Refused, but for an older file that ends where its later additions begin."""
    path = tmp_path / "i.dat"
    whole, bare = legacy(tiny()), legacy(tiny(), end=b"")
    path.write_bytes(whole)
    assert read_importance(path, TINY).datasets == ("wiki.raw",)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        if size in (len(bare), len(bare) + 4):
            found = read_importance(path, TINY)
            assert (found.entries, found.datasets) == (2, ())
            assert found.chunks == (CALLS if size > len(bare) else 0)
        else:
            refused(path, whole[:size], r"i\.dat: truncated or damaged")
    refused(path, whole + b"\0", "1 bytes after its end")
    write_gguf_form(path, tiny())
    whole = path.read_bytes()
    assert read_importance(path, TINY).entries == 2
    for size in range(len(whole) - 31):  # the last bytes are padding
        refused(path, whole[:size], r"i\.dat: ")


def test_every_byte_changed(tmp_path: Path) -> None:
    """Values that stand for others are read or refused; nothing else happens, whatever the byte."""
    path = tmp_path / "i.dat"
    write_gguf_form(tmp_path / "g", tiny())
    read = 0
    for whole in (legacy(tiny()), (tmp_path / "g").read_bytes()):
        for number in range(len(whole)):
            path.write_bytes(whole[:number] + bytes([255]) + whole[number + 1 :])
            with contextlib.suppress(CheckpointError):
                read_importance(path, TINY)
                read += 1
    assert read > 250  # most bytes are sums, metadata and padding


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_numbers_that_are_none(value: float, tmp_path: Path) -> None:
    rows = tiny()
    rows["blk.0.attn_q.weight"].means[0, 2] = value
    told = r"i: value 2 of 'blk\.0\.attn_q\.weight.* expected finite and >= 0"
    refused(tmp_path / "i", legacy(rows), told)
    write_gguf_form(tmp_path / "g", rows)
    refused(tmp_path / "i", (tmp_path / "g").read_bytes(), told)
    # Counts may be as wrong as sums, or so small that there is no mean.
    write_gguf_form(tmp_path / "g", tiny())
    whole, tensors_of = (tmp_path / "g").read_bytes(), read_gguf(tmp_path / "g").tensors
    start = tensors_of["blk.0.attn_q.weight.counts"].start
    changed = whole[:start] + struct.pack("<f", value) + whole[start + 4 :]
    refused(tmp_path / "i", changed, r"value 0 of 'blk\.0\.attn_q\.weight\.counts' is")
    changed = whole[:start] + struct.pack("<f", 1e-38) + whole[start + 4 :]
    refused(tmp_path / "i", changed, "over 1e-38 tokens have no mean")


def test_entries_of_another_model(tmp_path: Path) -> None:
    rows = tiny()
    down = rows.pop("blk.0.ffn_down_exps.weight")
    wrong: Sequence[tuple[dict[str, Row], str]] = [
        ({"blk.1.attn_q.weight": rows["blk.0.attn_q.weight"]}, "unexpected 'blk.1.attn_q.weight'"),
        ({"blk.0.attn_norm.weight": rows["blk.0.attn_q.weight"]}, "unexpected 'blk.0.attn_norm.weight'"),
        ({"blk.0.ffn_down.3.weight": Row(down.means[:1], (1,))}, "unexpected 'blk.0.ffn_down.3.weight'"),
        ({"blk.0.attn_k.weight": Row(down.means[:1], (1,))}, "'blk.0.attn_k.weight' has 6 sums .* expected 1 x 4"),
        ({"blk.0.ffn_down_exps.weight": Row(down.means[:2], (1, 1))}, "has 12 sums .* expected 3 x 6"),
        (
            {"blk.0.ffn_down_exps.weight": down, "blk.0.ffn_down.1.weight": Row(down.means[:1], (1,))},
            "'blk.0.ffn_down.1.weight' says what 'blk.0.ffn_down_exps.weight' said before",
        ),
    ]
    for more, told in wrong:
        refused(tmp_path / "i", legacy({**rows, **more}), told)
        write_gguf_form(tmp_path / "g", {**rows, **more})
        refused(tmp_path / "i", (tmp_path / "g").read_bytes(), told)
    many = {f"blk.0.other{number}.weight": rows["blk.0.attn_q.weight"] for number in range(30)}
    refused(tmp_path / "i", legacy({**rows, **many}), r"(?s)30 of 31 entries do not fit.*and 10 more")
    # Counts for another number of experts.
    writer = gguf.GGUFWriter(tmp_path / "g", "none")
    writer.kv_data[0].clear()
    writer.add_string("general.type", "imatrix")
    writer.add_tensor("blk.0.ffn_down_exps.weight.in_sum2", sums_of(down))
    writer.add_tensor("blk.0.ffn_down_exps.weight.counts", np.ones((9, 1), np.float32))
    for finish in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        finish()
    writer.close()
    refused(tmp_path / "i", (tmp_path / "g").read_bytes(), "has 18 sums and 9 counts, expected 3 x 6")


def test_other_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none: no such file"):
        read_importance(tmp_path / "none", TINY)
    with pytest.raises(CheckpointError, match="no such file"):
        read_importance(tmp_path, TINY)
    convert_to_gguf(folder, tmp_path / "m.gguf", vocabulary=no_words)
    with pytest.raises(CheckpointError, match=r"general\.type is None"):
        read_importance(tmp_path / "m.gguf", CONFIG)
    refused(tmp_path / "i", b"a text about importance", "the number of entries is")
    write_gguf_form(tmp_path / "g", tiny(), kind="model")
    refused(tmp_path / "i", (tmp_path / "g").read_bytes(), "general.type is 'model'")
    write_gguf_form(tmp_path / "g", {})
    refused(tmp_path / "i", (tmp_path / "g").read_bytes(), "nothing to use")
    write_gguf_form(tmp_path / "g", tiny(), datasets=[1, 2])
    refused(tmp_path / "i", (tmp_path / "g").read_bytes(), "imatrix.datasets is")
    write_gguf_form(tmp_path / "g", tiny())
    whole = (tmp_path / "g").read_bytes()
    for ending, other in (
        (b"attn_q.weight.counts", b"attn_q.weight.countz"),
        (b"attn_q.weight.in_sum2", b"attn_q.weight.in_sumZ"),
    ):
        refused(tmp_path / "i", whole.replace(ending, other), "sums and counts belong together")
