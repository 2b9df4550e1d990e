"""Damaged and lying ``.pth`` archives and GGUF files, through the commands (C1, C7, C8, C10, C11, D2, T16)."""

from __future__ import annotations

import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damaged import CONFIG, Capture, all_refuse, members, pickled, read, rewrite

from mixtral.cli import main
from mixtral.files.gguf import read_gguf
from mixtral.model.mixtral import Mixtral
from mixtral.tokenizer import gguf_vocabulary
from mixtral.weights import save_model
from mixtral.weights.convert import convert_to_gguf

# --- archives ---------------------------------------------------------------------------------------------------------


def member_twice(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        name = next(name for name in archive.namelist() if name.endswith("data/0"))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(name, bytes(8))


def longer_header(path: Path) -> None:
    """The header before the first values says that it is longer by four bytes, one value of float32."""
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\3\4", 0, data.index(b"/data/0"))
    (extra,) = struct.unpack_from("<H", data, at + 28)
    struct.pack_into("<H", data, at + 28, extra + 4)
    path.write_bytes(data)


def large_list(path: Path) -> None:
    """The end of the archive says that the list of its members takes the whole of a large file."""
    size = 6 << 20
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 9, 9, size, 0, 0)
    path.write_bytes(bytes(size) + end)


NOT_TENSORS = "holds other things than tensors, which are never loaded because they could run code"
ARCHIVES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "values cut": (members(lambda n, d: d[:4] if n == "data/0" else d), ["takes bytes", "the archive has 4 bytes"]),
    "values missing": (members(lambda n, d: None if n == "data/1" else d), ["not in the order in which torch"]),
    "packed again": (
        members(lambda n, d: d),
        ["where torch would have put them; load it with torch and save it again"],
    ),
    "pickle missing": (members(lambda n, d: None if n == "data.pkl" else d), [NOT_TENSORS]),
    "big-endian": (members(lambda n, d: b"big" if n == "byteorder" else d), ["the byte order is b'big'; only little"]),
    "shape that lies": (
        members(lambda n, d: d.replace(b"K@K \x86", b"M\xff\x7fK \x86", 1) if n == "data.pkl" else d),
        ["takes bytes", "the file is damaged"],
    ),
    "shape of 2^62": (
        members(
            lambda n, d: d.replace(b"K@K \x86", b"\x8a\x08" + bytes(7) + b"\x40K \x86", 1) if n == "data.pkl" else d
        ),
        ["consolidated.00.pth"],
    ),
    "shape below 0": (
        members(lambda n, d: d.replace(b"K@K \x86", b"J\xff\xff\xff\xffK \x86", 1) if n == "data.pkl" else d),
        [NOT_TENSORS],
    ),
    "a call of the system": (pickled(b"\x80\x02cposix\nsystem\nX\2\0\0\0ls\x85R."), [NOT_TENSORS, "posix system"]),
    "a call of an older kind": (pickled(b"(S'ls'\niposix\nsystem\n."), [NOT_TENSORS]),
    "two gigabytes from nothing": (
        pickled(b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R."),
        [NOT_TENSORS, "__builtin__ bytearray"],
    ),
    "copies of copies": (pickled(b"\x80\x02ccollections\nOrderedDict\nq\0]\x85R."), [NOT_TENSORS, "OrderedDict"]),
    "a list of a million": (pickled(b"\x80\x02(" + b"K\0" * 2_000_000 + b"l."), ["of 4,000,005 bytes is no list of"]),
    "a text of 2 GB": (pickled(b"\x80\x02X\xff\xff\xff\x7f"), ["truncated, or not a zip archive as torch writes it"]),
    "cut pickle": (members(lambda n, d: d[:-9] if n == "data.pkl" else d), ["consolidated.00.pth: "]),
    "compressed": (members(lambda n, d: d, compressed=True), ["is compressed, which torch never does"]),
    "a member twice": (member_twice, ["data/0' is in the archive twice"]),
    "values moved by one": (longer_header, ["data/0' does not end where it should"]),
    "a large list of members": (large_list, ["a list of members of 6,291,456 bytes"]),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_archives(case: str, good: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = shutil.copytree(good / "pth", tmp_path / "model")
    damage, told = ARCHIVES[case]
    before = (folder / "consolidated.00.pth").read_bytes()
    damage(folder / "consolidated.00.pth")
    assert (folder / "consolidated.00.pth").read_bytes() != before
    all_refuse("pth", folder, ["consolidated.00.pth: ", *told], capsys)


def test_an_archive_packed_again_is_read_where_torch_looks_its_members_up(good: Path, tmp_path: Path) -> None:
    """Files of older versions of torch; their members may have any place and order."""
    folder = shutil.copytree(good / "pth", tmp_path / "model")
    members(lambda name, data: None if name == ".format_version" else data)(folder / "consolidated.00.pth")
    for source in (folder, good / "pth"):
        assert main(["convert", str(source), str(tmp_path / source.parent.name), "--to", "hf", "--unpickle"]) == 0
    here, there = (tmp_path / name / "model.safetensors" for name in (tmp_path.name, good.name))
    assert here.read_bytes() == there.read_bytes()


def test_archives_are_not_read_unasked(good: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = shutil.copytree(good / "pth", tmp_path / "model")
    pickled(b"\x80\x02cposix\nsystem\nX\2\0\0\0ls\x85R.")(folder / "consolidated.00.pth")
    all_refuse("unasked", folder, ["consolidated.00.pth: a pickled archive, and a pickle can carry code"], capsys)


# --- GGUF: descriptions of a tensor that lie --------------------------------------------------------------------------


def describe(*, sizes: tuple[int, ...] = (32, 64), form: int = 0, offset: int | None = None) -> Callable[[Path], None]:
    """Other numbers in the description of the head, [32, 64] of F32 in the format's order."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        start = data.index(struct.pack("<Q", 13) + b"output.weight") + 8 + 13
        own = struct.unpack_from("<IQQIQ", data, start)
        assert own[:4] == (2, 32, 64, 0)
        new = struct.pack("<IQQIQ", 2, *sizes, form, own[4] if offset is None else offset)
        path.write_bytes(data[:start] + new + data[start + len(new) :])

    return damage


def keyed(**keys: Any) -> Callable[[Path], None]:
    return lambda path: rewrite("gguf", path.parent, read("gguf", path.parent), **keys)


def counts(tensors: int | None = None, keys: int | None = None) -> Callable[[Path], Any]:
    def damage(path: Path) -> None:
        data = path.read_bytes()
        own = struct.unpack_from("<QQ", data, 8)
        new = struct.pack("<QQ", own[0] if tensors is None else tensors, own[1] if keys is None else keys)
        path.write_bytes(data[:8] + new + data[24:])

    return damage


def unaligned(number: int) -> Callable[[Path], None]:
    """An alignment as no writer would write it: the key is added by hand."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        count = struct.unpack_from("<Q", data, 16)[0]
        key = struct.pack("<Q17sII", 17, b"general.alignment", 4, number)
        path.write_bytes(data[:16] + struct.pack("<Q", count + 1) + key + data[24:])

    return damage


GGUFS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "alignment 0": (unaligned(0), ["general.alignment is 0; expected a power of two"]),
    "alignment 3": (unaligned(3), ["general.alignment is 3; expected a power of two"]),
    "2^63 tensors": (counts(tensors=2**63), ["claims 9,223,372,036,854,775,808 tensors"]),
    "2^63 keys": (counts(keys=2**63), ["claims 9,223,372,036,854,775,808 metadata keys"]),
    "a tensor fewer": (counts(tensors=1), ["bytes after the last tensor"]),
    "offset of another": (describe(offset=0), ["the tensor before it"]),
    "offset beyond the end": (describe(offset=1 << 40), ["'output.weight' leaves a gap before it"]),
    "offset near 2^64": (describe(offset=2**64 - 32), ["'output.weight' leaves a gap before it"]),
    "offset not aligned": (describe(offset=8), ["'output.weight' starts at byte 8 of the data, not aligned to 32"]),
    "larger than it is": (describe(sizes=(64, 64)), ["truncated: ", "but its header promises 200,448"]),
    "a size of 0": (describe(sizes=(0, 64)), ["'output.weight' has the shape [64, 0]"]),
    "a product beyond 64 bits": (describe(sizes=(2**33, 2**33)), ["'output.weight' has the shape"]),
    "an unknown format": (describe(form=77), ["'output.weight' has the unknown type 77"]),
    "a format with other blocks": (describe(form=12), ["'output.weight'", "Q4_K packs 256 values"]),
    "another architecture": (keyed(**{"general.architecture": "mamba"}), ["architecture is 'mamba'; a Mixtral is"]),
    "architecture an array": (
        keyed(**{"general.architecture": [1.5, 2.5]}),
        ["architecture is ", "a Mixtral is 'llama'"],
    ),
    "a dense model": (keyed(**{"llama.expert_count": 0}), ["a dense model (llama.expert_count is 0)"]),
    "experts an array": (keyed(**{"llama.expert_count": [4, 4]}), ["a dense model (llama.expert_count is "]),
    "more active than there are": (keyed(**{"llama.expert_used_count": 5}), ["num_experts_per_tok is 5, more than"]),
    "layers an array": (keyed(**{"llama.block_count": [2, 2]}), ["llama.block_count is ", "expected a number"]),
    "no context": (keyed(**{"llama.context_length": None}), ["the metadata has no llama.context_length"]),
    "theta too large": (keyed(**{"llama.rope.freq_base": np.float64(1e300)}), ["rope_theta is inf"]),
    "theta no number": (keyed(**{"llama.rope.freq_base": float("nan")}), ["rope_theta is nan; expected a finite"]),
    "no vocabulary": (keyed(**{"llama.vocab_size": None}), ["neither tokenizer.ggml.tokens nor llama.vocab_size"]),
    "tokens of another model": (
        keyed(**{"tokenizer.ggml.tokens": ["a", "b"]}),
        ["vocab_size 2, but the tensors have 64"],
    ),
    "one of several parts": (keyed(**{"split.count": 3}), ["split.count is 3, so this is one part of a model"]),
}


@pytest.mark.parametrize("case", GGUFS)
def test_gguf(case: str, good: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = shutil.copytree(good / "gguf", tmp_path / "model")
    damage, told = GGUFS[case]
    damage(folder / "m.gguf")
    all_refuse("gguf", folder, ["m.gguf", *told], capsys)
    all_refuse("gguf", folder / "m.gguf", ["m.gguf", *told], capsys)


def test_gguf_parts(good: Path, tmp_path: Path, capsys: Capture) -> None:
    """C7: a part is missing, and a part is of another model."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = list(read("gguf", good / "gguf").items())
    for number in range(2):
        shutil.copy(good / "gguf" / "m.gguf", folder / "m.gguf")
        keys = {"split.no": number, "split.count": 2, "split.tensors.count": len(tensors)}
        rewrite("gguf", folder, dict(tensors[number::2]), **keys)
        (folder / "m.gguf").rename(folder / f"m-0000{number + 1}-of-00002.gguf")
    assert main(["verify", str(folder)]) == 0
    capsys.readouterr()
    second = folder / "m-00002-of-00002.gguf"
    second.rename(tmp_path / "away")
    all_refuse("gguf", folder, ["1 of 2 parts are missing: m-00002-of-00002.gguf"], capsys)
    shutil.copy(folder / "m-00001-of-00002.gguf", second)
    all_refuse("gguf", folder, ["m-00002-of-00002.gguf: split.no is 0, expected 1"], capsys)


def test_the_tokens_of_another_vocabulary(tmp_path: Path, capsys: Capture) -> None:
    """D2: as many tokens as v1 has, but others; text would turn into nonsense."""
    model = Mixtral(CONFIG.replace(vocab_size=32000), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    save_model(model, tmp_path / "source")
    path = tmp_path / "m.gguf"
    convert_to_gguf(tmp_path / "source", path, vocabulary=gguf_vocabulary)
    command = ["generate", "--model", str(path), "--prompt", "a", "--max-tokens", "1"]
    assert main(command) == 0
    tokens = read_gguf(path).metadata["tokenizer.ggml.tokens"]
    for other, told in ((tokens[::-1], "token 0 is"), ([["a"]] * 32000, "token 0 is ['a'], but '<unk>'")):
        rewrite("gguf", tmp_path, read("gguf", tmp_path), **{"tokenizer.ggml.tokens": other})
        capsys.readouterr()
        assert main(command) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("mixtral: error: ")
        assert captured.err.count("\n") == 1
        assert told in captured.err
        assert "m.gguf" in captured.err
