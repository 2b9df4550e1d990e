"""Whatever the bytes are: every reader of files gives a result or one line of an error of its own, in little time."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import random
import shutil
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError, ConfigError, MixtralError
from mixtral.files.gguf import Gguf
from mixtral.files.pth import read_archives
from mixtral.files.safetensors import INDEX_NAME, SINGLE_NAME, read_checkpoint, read_header
from mixtral.model.mixtral import Mixtral
from mixtral.weights.checkpoint import open_checkpoint
from mixtral.weights.compact import MANIFEST_NAME, load_compact, save_compact
from mixtral.weights.consolidated import from_params, to_params
from mixtral.weights.convert import convert, convert_to_gguf
from mixtral.weights.gguf_model import config_from_gguf, to_metadata
from mixtral.weights.load import load_model
from mixtral.weights.oddities import oddities
from mixtral.weights.save import save_model
from mixtral.weights.vocab import row_map

CONFIG = MixtralConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_local_experts=2,
    num_experts_per_tok=2,
    max_position_embeddings=64,
)
many = settings(
    max_examples=150,
    deadline=timedelta(seconds=5),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
numbers = st.one_of(
    st.integers(-2, 70), st.sampled_from((2**31, 2**32, 2**62, 2**63, 2**64, 10**400)), st.floats(allow_nan=True)
)
texts = st.one_of(st.text(max_size=20), st.sampled_from(("F32", "BF16", "F4", "../x.safetensors", "\ud800", "x" * 300)))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small model as safetensors, archive, GGUF and compact folder."""
    home = tmp_path_factory.mktemp("whole")
    generator = torch.Generator().manual_seed(9)
    model = Mixtral(CONFIG, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        rows = row_map(range(31), 32)
    save_model(model, home / "model")
    convert(home / "model", home / "mistral", layout="consolidated")
    torch.save(load_file(home / "mistral" / "consolidated.safetensors"), home / "x.pth")
    convert_to_gguf(home / "model", home / "m.gguf", vocabulary=lambda size: {})
    save_compact(model, home / "compact", row_of_id=rows, respell={31: (4, 5)}, metadata={})
    return home


def fine(
    act: Callable[[], object], kind: type[MixtralError] | tuple[type[MixtralError], ...] = CheckpointError
) -> bool:
    """Whether it gave a result; anything but one line of the right kind of error fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            act()
        except kind as error:
            told = str(error)
        else:
            return True
    assert len(told) < 3_000
    return False


# --- safetensors and its index ----------------------------------------------------------------------------------------


def in_shard(text: bytes, data: bytes = bytes(64)) -> bytes:
    return struct.pack("<Q", len(text)) + text + data


@many
@given(data=st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(in_shard)))
@example(data=in_shard(b"[" * 5_000))
@example(data=in_shard(b'{"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}'))
def test_any_bytes_as_a_shard(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / SINGLE_NAME
    path.write_bytes(data)
    fine(lambda: read_header(path))


tensor = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": texts,
            "shape": st.one_of(values, st.lists(numbers, max_size=4)),
            "data_offsets": st.one_of(values, st.lists(numbers, min_size=2, max_size=2)),
        }
    ),
    values,
)


@many
@given(header=st.dictionaries(st.one_of(texts, st.just("__metadata__")), tensor, max_size=4))
@example(header={"a": {"dtype": "F32", "shape": [0, 2**64], "data_offsets": [0, 0]}})
@example(header={"__metadata__": {"a": {}}})
def test_any_json_as_a_header(header: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / SINGLE_NAME
    path.write_bytes(in_shard(json.dumps(header).encode()))
    fine(lambda: read_header(path))


@many
@given(
    index=st.one_of(
        st.binary(max_size=60),
        values,
        st.fixed_dictionaries({"weight_map": st.dictionaries(texts, st.one_of(texts, values), max_size=4)}),
        st.fixed_dictionaries({"weight_map": st.dictionaries(texts, texts.map(lambda t: t + ".safetensors"))}),
    )
)
@example(index={"weight_map": {"a": "x" * 300 + ".safetensors"}})
@example(index={"weight_map": {"a": "\ud800.safetensors"}})
@example(index={"weight_map": {"a": "\0.safetensors"}})
def test_any_index(index: Any, tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_bytes(index if isinstance(index, bytes) else json.dumps(index).encode())
    assert not fine(lambda: read_checkpoint(tmp_path))


# --- configs ----------------------------------------------------------------------------------------------------------


def changed(good: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Values that are all right but for a few, or a few other keys."""
    keys = st.one_of(st.sampled_from(sorted(good)), texts)
    return st.dictionaries(keys, values, max_size=3).map(lambda other: {**good, **other})


@many
@given(found=st.one_of(changed(to_params(CONFIG)), changed(CONFIG.to_dict()), st.dictionaries(texts, values)))
@example(found={**to_params(CONFIG), "moe": {"num_experts": [], "num_experts_per_tok": {}}})
def test_any_params(found: dict[str, Any]) -> None:
    fine(lambda: from_params(found), ConfigError)
    fine(lambda: MixtralConfig.from_dict(found), ConfigError)


METADATA = to_metadata(CONFIG, "m")
arrays = st.lists(st.integers(0, 9), max_size=3).map(lambda items: np.array(items, np.int32))


@many
@given(
    other=st.dictionaries(
        st.sampled_from(
            [
                *sorted(METADATA),
                *(
                    "general.file_type",
                    "general.alignment",
                    "llama.attention.sliding_window",
                    "llama.rope.scaling.type",
                ),
                *(f"tokenizer.ggml.{k}" for k in ("tokens", "scores", "token_type", "model", "add_bos_token")),
                *("tokenizer.ggml.bos_token_id", "llama.rope.scaling.factor"),
            ]
        ),
        st.one_of(numbers, texts, arrays, st.lists(texts, max_size=3), st.booleans()),
        max_size=4,
    )
)
def test_any_metadata_of_gguf(other: dict[str, Any], whole: Path) -> None:
    """The numbers of the model, and what inspect says of the rest."""
    fine(lambda: config_from_gguf(Gguf({**METADATA, **other}, {}, 3, ()), "m.gguf"), ConfigError)
    found = open_checkpoint(whole / "m.gguf")
    assert all(isinstance(text, str) for text in oddities(dataclasses.replace(found, metadata={**METADATA, **other})))


# --- archives ---------------------------------------------------------------------------------------------------------


def packed(pickle: bytes, *, older: bool) -> bytes:
    """An archive with this pickle and sixteen values; an older one has no version, so torch looks for its members."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        members = {
            "data.pkl": pickle,
            "byteorder": b"little",
            "data/0": bytes(64),
            "data/1": bytes(64),
            "version": b"3\n",
        }
        for name, data in members.items() if older else [*members.items(), (".format_version", b"1")]:
            archive.writestr(f"x/{name}", data)
    return out.getvalue()


def one_tensor(count: int = 16) -> bytes:
    out = io.BytesIO()
    torch.save({"a": torch.zeros(count), "b": torch.zeros(4, 4)}, out)
    with zipfile.ZipFile(out) as archive:
        return archive.read("archive/data.pkl")


PICKLE = one_tensor()
instructions = st.sampled_from(
    [
        *(
            b"}",
            b"]",
            b")",
            b"(",
            b"t",
            b"\x85",
            b"\x86",
            b"\x87",
            b"u",
            b"s",
            b"a",
            b"e",
            b"b",
            b"R",
            b"Q",
            b".",
            b"N",
        ),
        *(b"K\0", b"K\x10", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"X\1\0\0\0a", b"q\0", b"h\0"),
        *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n"),
        *(b"X\7\0\0\0storage", b"X\1\0\0\x000", b"X\3\0\0\0cpu", b"\x88", b"\x89", b"G" + bytes(8)),
    ]
)


@st.composite
def edited(draw: st.DrawFn) -> bytes:
    data = bytearray(PICKLE)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(2, len(data) - 1))
        data[at : at + draw(st.integers(0, 3))] = draw(st.one_of(instructions, st.binary(max_size=3)))
    return bytes(data)


@many
@given(
    data=st.one_of(
        st.binary(max_size=100),
        st.builds(packed, st.one_of(st.binary(max_size=60), edited()), older=st.booleans()),
        st.builds(
            packed, st.lists(instructions, max_size=30).map(lambda i: b"\x80\x02" + b"".join(i)), older=st.just(True)
        ),
    )
)
@example(data=packed(PICKLE, older=True))
def test_any_archive(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(data)
    fine(lambda: read_archives([path]))


def test_the_archive_made_here_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(packed(PICKLE, older=True))
    assert {name: entry.shape for name, entry in read_archives([tmp_path / "x.pth"]).items()} == {
        "a": (16,),
        "b": (4, 4),
    }


# --- mutations of whole checkpoints: the same values, or refused ------------------------------------------------------


def mutate(data: bytes, stop: int, dice: random.Random) -> bytes:
    """A few changes before byte ``stop``: bits, bytes, digits, pieces moved, cut or put in twice."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        if len(changed) < 2:
            break
        at, kind = dice.randrange(min(stop, len(changed))), dice.randrange(7)
        if kind == 0:
            changed[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            changed[at] = dice.choice(b'0123456789"{}[],:-.')
        elif kind == 2:
            changed[at:at] = dice.choice((b"0", b"9" * 20, b'"', b"null", b"\0", b"[]", dice.randbytes(3)))
        elif kind == 3:
            del changed[at : at + dice.randint(1, 40)]
        elif kind == 4:
            changed[at:at] = changed[at : at + dice.randint(1, 120)]
        elif kind == 5:
            del changed[dice.randrange(1, len(changed)) :]
        else:
            changed[at : at + 8] = struct.pack("<Q", dice.choice((0, 1, 255, 2**31, 2**32, 2**62, 2**63, 2**64 - 1)))
    return bytes(changed)


def digest(model: Mixtral) -> str:
    state = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        state.update(name.encode() + value.detach().numpy().tobytes())
    return state.hexdigest()


def header_of(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def mutations(folder: Path, name: str, stop: int, load: Callable[[], Mixtral], count: int) -> Counter[str]:
    expected, whole = digest(load()), (folder / name).read_bytes()
    dice, outcomes = random.Random(f"{folder.name} {name}"), Counter[str]()
    for _ in range(count):
        (folder / name).write_bytes(mutate(whole, stop, dice))
        models: list[Mixtral] = []
        read = fine(lambda: models.append(load()), (CheckpointError, ConfigError))  # noqa: B023 - called at once
        assert not read or digest(models[0]) == expected
        outcomes["read" if read else "refused"] += 1
    (folder / name).write_bytes(whole)
    return outcomes


@pytest.mark.parametrize("kind", ["model", "mistral"])
def test_mutated_headers_of_safetensors(kind: str, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole / kind, tmp_path / kind)
    path = next(folder.glob("*.safetensors"))
    found = mutations(folder, path.name, header_of(path), lambda: load_model(folder, device="cpu"), 2_000)
    assert found["refused"] > 1_500
    assert found["read"] > 0


def test_mutated_indexes(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    save_model(load_model(whole / "model", device="cpu"), folder, shard_size_bytes=20_000)
    size = (folder / INDEX_NAME).stat().st_size
    found = mutations(folder, INDEX_NAME, size, lambda: load_model(folder, device="cpu"), 1_000)
    assert found["refused"] > 700
    assert found["read"] > 0


def test_mutated_archives(whole: Path, tmp_path: Path) -> None:
    """Everything of the archive but the values: those have no checksum that is looked at."""
    folder = shutil.copytree(whole / "mistral", tmp_path / "pth")
    (folder / "consolidated.safetensors").unlink()
    shutil.copy(whole / "x.pth", folder / "consolidated.00.pth")
    data = (whole / "x.pth").read_bytes()
    first = min(entry.start for entry in read_archives([whole / "x.pth"]).values())
    load = lambda: load_model(folder, device="cpu", unpickle=True)  # noqa: E731
    found = mutations(folder, "consolidated.00.pth", first - 8, load, 500)
    assert found["refused"] > 200
    # The list of the members, at the end.
    expected, dice, start = digest(load()), random.Random(5), data.index(b"PK\1\2")
    for _ in range(200):
        (folder / "consolidated.00.pth").write_bytes(data[:start] + mutate(data[start:], len(data) - start, dice))
        with contextlib.suppress(CheckpointError):
            assert digest(load()) == expected


def test_mutated_compact_headers(whole: Path, tmp_path: Path) -> None:
    """With a manifest that fits, as a person would write who wants the file to be read."""
    folder = shutil.copytree(whole / "compact", tmp_path / "compact")
    path = folder / SINGLE_NAME

    def load() -> Mixtral:
        data = path.read_bytes()
        manifest = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
        return load_compact(folder, device="cpu").model

    found = mutations(folder, SINGLE_NAME, header_of(path), load, 500)
    assert found["refused"] > 200
    assert found["read"] > 0


@many
@given(
    rows=st.lists(st.integers(-3, 40), min_size=32, max_size=32),
    ids=st.lists(st.integers(-1, 33), min_size=1, max_size=1),
    offsets=st.lists(st.integers(-2, 4), min_size=2, max_size=2),
    pieces=st.lists(st.integers(-(2**31), 40), min_size=2, max_size=2),
)
def test_any_values_in_a_compact_file(
    rows: list[int], ids: list[int], offsets: list[int], pieces: list[int], whole: Path, tmp_path: Path
) -> None:
    """The integers that say which row and which spelling an id has."""
    folder = tmp_path / "compact"
    shutil.copytree(whole / "compact", folder, dirs_exist_ok=True)
    path = folder / SINGLE_NAME
    entries, data = read_header(path).entries, bytearray(path.read_bytes())
    given = {"row_of_id": rows, "respell.ids": ids, "respell.offsets": offsets, "respell.pieces": pieces}
    for name, items in given.items():
        data[entries[name].start : entries[name].stop] = np.array(items, np.int32).tobytes()
    path.write_bytes(data)
    manifest = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    fine(lambda: load_compact(folder, device="cpu"))
