"""Damaged and lying checkpoints of every container, through the commands: exit code 2 and one line that names the file
or the tensor, in little time and memory (C7 to C11, T16). Headers by hand are in ``tests/files/``."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged import (
    CONFIGS,
    EXPERT,
    HEAD,
    KINDS,
    OTHER_EXPERT,
    ROUTER,
    WEIGHTS,
    Capture,
    Tensors,
    all_refuse,
    commands,
    members,
    pickled,
    read,
    rewrite,
)

import mixtral
from mixtral.cli import main
from mixtral.files.safetensors import INDEX_NAME

# --- damage that any container can have -------------------------------------------------------------------------------


def edit(change: Callable[[str, Tensors], Any]) -> Callable[[str, Path], None]:
    def damage(kind: str, folder: Path) -> None:
        tensors = read(kind, folder)
        change(kind, tensors)
        rewrite(kind, folder, tensors)

    return damage


def content(change: Callable[[bytes], bytes]) -> Callable[[str, Path], None]:
    def damage(kind: str, folder: Path) -> None:
        path = folder / WEIGHTS[kind]
        path.write_bytes(change(path.read_bytes()))

    return damage


def say(**numbers: int) -> Callable[[str, Path], None]:
    """Another number in whatever the container calls its config."""
    theirs = {
        "num_local_experts": ("num_experts", "llama.expert_count"),
        "num_hidden_layers": ("n_layers", "llama.block_count"),
        "vocab_size": ("vocab_size", "llama.vocab_size"),
        "intermediate_size": ("hidden_dim", "llama.feed_forward_length"),
        "num_key_value_heads": ("n_kv_heads", "llama.attention.head_count_kv"),
    }

    def damage(kind: str, folder: Path) -> None:
        if kind == "gguf":
            rewrite(kind, folder, read(kind, folder), **{theirs[ours][1]: number for ours, number in numbers.items()})
            return
        path = folder / CONFIGS.get(kind, "config.json")
        values = json.loads(path.read_text())
        for ours, number in numbers.items():
            name = theirs[ours][0] if kind in CONFIGS else ours
            (values["moe"] if name == "num_experts" else values)[name] = number
        path.write_text(json.dumps(values))

    return damage


def all_layers_dense(kind: str, tensors: Tensors) -> None:
    for name in [name for name in tensors if any(part in name for part in ("experts", "moe", "exps", "feed_f", "mlp"))]:
        del tensors[name]


# What is done -> what must be said; {file}, {config}, {router}, {head}, {expert} and {other} are names.
DAMAGE: dict[str, tuple[Callable[[str, Path], Any], list[str]]] = {
    "empty": (content(lambda data: b""), ["{file}"]),
    "a page of text": (content(lambda data: b"<html>not found</html>" * 40), ["{file}"]),
    "cut in the middle": (content(lambda data: data[: len(data) // 2]), ["{file}", "truncated"]),
    "cut by a few bytes": (content(lambda data: data[:-40]), ["{file}", "truncated"]),
    "missing": (edit(lambda kind, t: t.pop(ROUTER[kind])), ["(1 problems)", "missing '{router}' [4, 32]"]),
    "unexpected": (edit(lambda kind, t: t.update(extra=torch.ones(2))), ["unexpected 'extra'"]),
    "another shape": (
        edit(lambda kind, t: t.update({HEAD[kind]: t[HEAD[kind]][:, :16]})),
        ["'{head}' is [64, 16], expected [64, 32]"],
    ),
    "a size of 0": (
        edit(lambda kind, t: None if kind == "gguf" else t.update({HEAD[kind]: torch.ones(64, 0)})),
        ["'{head}' is [64, 0], expected"],
    ),
    "a bias": (
        edit(lambda kind, t: t.update({HEAD[kind].replace("weight", "bias"): torch.ones(64)})),
        ["bias' (a Mixtral has no biases)"],
    ),
    "an expert fewer": (
        edit(lambda kind, t: t.update({k: v[:3] for k, v in t.items() if v.dim() == 3}) or _drop_expert(t, 3)),
        ["{config} says num_local_experts 4, but the tensors have 3"],
    ),
    "a gap among experts": (edit(lambda kind, t: t.pop(EXPERT[kind])), ["missing '{expert}'"]),
    "two layouts": (
        edit(lambda kind, t: t.update({OTHER_EXPERT[kind]: torch.ones(2, 2)})),
        ["expert tensors of two layouts", "'{other}'"],
    ),
    "no experts": (edit(all_layers_dense), ["no Mixtral experts among"]),
    "more experts said": (say(num_local_experts=8), ["{config} says num_local_experts 8, but the tensors have 4"]),
    "fewer layers said": (say(num_hidden_layers=1), ["{config} says num_hidden_layers 1, but the tensors have 2"]),
    "a billion layers said": (say(num_hidden_layers=10**9), ["num_hidden_layers is 1000000000; expected at most"]),
    "other vocabulary said": (say(vocab_size=32000), ["{config} says vocab_size 32000, but the tensors have 64"]),
    "other width said": (say(intermediate_size=2**31 - 1), ["2147483647", "{config}"]),
    "other heads said": (say(num_key_value_heads=2), [" is [16, 32], expected [32, 32]", "{config}"]),
}
NOT_IN = {("a size of 0", "gguf")}  # its writer refuses them too


def _drop_expert(tensors: Tensors, number: int) -> None:
    for name in [name for name in tensors if f"experts.{number}." in name]:
        del tensors[name]


@pytest.mark.parametrize("kind", KINDS)
def test_the_good_ones_work(kind: str, good: Path, tmp_path: Path, capsys: Capture) -> None:
    for command in commands(kind, good / kind, tmp_path / "target"):
        assert main(command) == 0, capsys.readouterr().err
    rewrite(kind, shutil.copytree(good / kind, tmp_path / "copy"), read(kind, good / kind))
    assert main(["verify", str(tmp_path / "copy"), "--unpickle"]) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", DAMAGE)
def test_damage(case: str, kind: str, good: Path, tmp_path: Path, capsys: Capture) -> None:
    if (case, kind) in NOT_IN:
        return
    folder = shutil.copytree(good / kind, tmp_path / "model")
    damage, told = DAMAGE[case]
    damage(kind, folder)
    config = CONFIGS.get(kind, "config.json")
    places = {"file": WEIGHTS[kind], "config": config, "router": ROUTER[kind], "head": HEAD[kind]}
    places |= {"expert": EXPERT[kind], "other": OTHER_EXPERT[kind]}
    all_refuse(kind, folder, [text.format(**places) for text in told], capsys)


@pytest.mark.parametrize("kind", ["per-expert", "consolidated", "pth"])
def test_a_link_out_of_the_folder(kind: str, good: Path, tmp_path: Path, capsys: Capture) -> None:
    for name in (WEIGHTS[kind], CONFIGS.get(kind, "config.json")):
        folder = shutil.copytree(good / kind, tmp_path / name / "model")
        shutil.move(folder / name, tmp_path / name / "outside")
        (folder / name).symlink_to(tmp_path / name / "outside")
        all_refuse(kind, folder, [name, "a link that leads out of the folder"], capsys)


# --- safetensors: headers that lie, in each layout --------------------------------------------------------------------


def header(change: Callable[[dict[str, Any], str], Any]) -> Callable[[Path, str], None]:
    """Change the header as data; the name is that of the head."""

    def damage(path: Path, name: str) -> None:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        values = json.loads(data[8 : 8 + size])
        change(values, name)
        text = json.dumps(values).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return damage


def shift(values: dict[str, Any], name: str, count: int) -> None:
    values[name]["data_offsets"] = [number + count for number in values[name]["data_offsets"]]


def twice(path: Path, name: str) -> None:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + size].rstrip()[:-1] + b', "%s": {}}' % name.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


HEADERS: dict[str, tuple[Callable[[Path, str], None], list[str]]] = {
    "overlap": (header(lambda v, n: shift(v, n, -4)), ["'{name}' overlaps the tensor before it"]),
    "beyond the end": (header(lambda v, n: shift(v, n, 1 << 40)), ["a gap before it"]),
    "offsets beyond 64 bits": (header(lambda v, n: shift(v, n, 1 << 64)), ["'{name}' has data_offsets"]),
    "offsets below 0": (header(lambda v, n: shift(v, n, -(1 << 40))), ["'{name}' has data_offsets"]),
    "a product beyond 64 bits": (header(lambda v, n: v[n].update(shape=[2**33, 2**33])), ["'{name}' occupies 8,192"]),
    "a size beyond 64 bits": (header(lambda v, n: v[n].update(shape=[2**64, 0])), ["'{name}' has the shape"]),
    "a size below 0": (header(lambda v, n: v[n].update(shape=[-64, -32])), ["'{name}' has the shape [-64, -32]"]),
    "another dtype": (header(lambda v, n: v[n].update(dtype="F4")), ["'{name}' has the unknown dtype 'F4'"]),
    "a tensor twice": (twice, ["'{name}' appears twice"]),
    "a header of 2^63 bytes": (
        lambda path, name: path.write_bytes(struct.pack("<Q", 2**63) + path.read_bytes()[8:]),  # type: ignore[return-value]
        ["the header alone claims 9,223,372,036,854,775,808"],
    ),
    "bytes after the end": (
        lambda path, name: path.write_bytes(path.read_bytes() + bytes(9)),  # type: ignore[return-value]
        ["9 bytes after the last tensor"],
    ),
}


@pytest.mark.parametrize("kind", ["per-expert", "fused", "consolidated"])
@pytest.mark.parametrize("case", HEADERS)
def test_safetensors_headers(case: str, kind: str, good: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = shutil.copytree(good / kind, tmp_path / "model")
    damage, told = HEADERS[case]
    # The tensor that is second in the file, so that there is one before it.
    entries = json.loads((data := (folder / WEIGHTS[kind]).read_bytes())[8 : 8 + int.from_bytes(data[:8], "little")])
    damage(folder / WEIGHTS[kind], HEAD[kind])
    assert entries[HEAD[kind]]["data_offsets"][0] > 4
    all_refuse(kind, folder, [WEIGHTS[kind], *(text.format(name=HEAD[kind]) for text in told)], capsys)


def _index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = json.loads((folder / INDEX_NAME).read_text())
        change(values["weight_map"])
        (folder / INDEX_NAME).write_text(json.dumps(values))

    return damage


LAST = "lm_head.weight"
SHARDS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "up and out": (_index(lambda m: m.update({LAST: "../model.safetensors"})), [LAST, "'../model.safetensors'"]),
    "a name of 300 characters": (_index(lambda m: m.update({LAST: "x" * 300 + ".safetensors"})), ["missing", "xxx"]),
    "half a character": (_index(lambda m: m.update({LAST: "\ud800.safetensors"})), [LAST, "\\ud800.safetensors"]),
    "a line of its own": (_index(lambda m: m.update({LAST: "a\nb.safetensors"})), [LAST, "'a\\nb.safetensors'"]),
    "a tensor too many": (
        _index(lambda m: m.update({"x\n\x1b": m[LAST]})),
        ["promises 'x\\n\\x1b', which it does not"],
    ),
    "a tensor too few": (_index(lambda m: m.pop(LAST)), [f"'{LAST}', not in the index"]),
    "a shard of another model": (
        lambda f: shutil.copy(sorted(f.glob("*-of-*"))[0], sorted(f.glob("*-of-*"))[1]),
        ["is also in model-00001-of-"],
    ),
}


@pytest.mark.parametrize("case", SHARDS)
def test_shards(case: str, good: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = shutil.copytree(good / "shards", tmp_path / "model")
    damage, told = SHARDS[case]
    damage(folder)
    all_refuse("shards", folder, told, capsys)


# --- time and memory, in a process of its own -------------------------------------------------------------------------

GREEDY = pickled(b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.")
RUN = """
import json, resource, sys, time
sys.argv[1:], cases = [], json.loads(sys.argv[1])
import torch, mixtral.api, mixtral.weights.convert, mixtral.weights.verify, mixtral.weights.oddities, rich.table
from mixtral.cli import main
torch._subclasses.FakeTensorMode
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
for case in cases:
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = main(case)
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps([code, time.process_time() - start, taken * 1024]), flush=True)
"""


def grow(path: Path, start: bytes, size: int) -> None:
    """A file of this size that takes no place on the disk."""
    path.write_bytes(start)
    os.truncate(path, size)


@pytest.mark.slow
def test_time_and_memory_are_bounded(good: Path, tmp_path: Path) -> None:
    """Files of up to 2 TB, nearly all of it holes, that a reader who trusts them would read or allocate."""
    tera = 1 << 41

    def large_tensor(path: Path, text: dict[str, Any]) -> None:
        head = json.dumps(text).encode()
        grow(path, struct.pack("<Q", len(head)) + head, 8 + len(head) + tera)

    def jason(path: Path) -> None:
        text = b'{"a": [' + b"{}," * 5_000_000 + b"1]}"
        path.write_bytes(struct.pack("<Q", len(text)) + text)

    def thousands(folder: Path) -> None:
        """Two tensors that bear out a config of 1,024 layers with 1,024 experts each."""
        path = folder / "config.json"
        config = {**json.loads(path.read_text()), "num_hidden_layers": 1024, "num_local_experts": 1024}
        path.write_text(json.dumps(config))
        stem = "model.layers.1023.block_sparse_moe.experts.1023.w1.weight"
        head = json.dumps({stem: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)

    whole = {"lm_head.weight": {"dtype": "F32", "shape": [1 << 30, 1 << 9], "data_offsets": [0, tera]}}
    experts = {"model.layers.0.mlp.experts.down_proj": {"dtype": "I8", "shape": [tera], "data_offsets": [0, tera]}}
    rows = {"row_of_id": {"dtype": "I32", "shape": [tera // 4], "data_offsets": [0, tera]}}
    cases: dict[str, tuple[str, Callable[[Path], Any]]] = {
        "one tensor": ("per-expert", lambda f: large_tensor(f / "model.safetensors", whole)),
        "one expert tensor": ("fused", lambda f: large_tensor(f / "model.safetensors", experts)),
        "compact rows": ("fused", lambda f: large_tensor(f / "model.safetensors", rows)),
        "a header of objects": ("per-expert", lambda f: jason(f / "model.safetensors")),
        "a header of a terabyte": ("fused", lambda f: grow(f / "model.safetensors", struct.pack("<Q", tera - 8), tera)),
        "an index of a terabyte": ("shards", lambda f: grow(f / INDEX_NAME, b"{", tera)),
        "params of a terabyte": ("consolidated", lambda f: grow(f / "params.json", b"{", tera)),
        "a config of a terabyte": ("per-expert", lambda f: grow(f / "config.json", b"{", tera)),
        "a thousand layers": ("fused", thousands),
        "holes for an archive": ("pth", lambda f: grow(f / "consolidated.00.pth", b"PK\3\4", tera)),
        "a pickle that asks for 2 GB": ("pth", lambda f: GREEDY(f / WEIGHTS["pth"])),
        "holes for a GGUF": ("gguf", lambda f: grow(f / "m.gguf", b"GGUF" + struct.pack("<IQQ", 3, 9, 9), tera)),
        "a GGUF string": (
            "gguf",
            lambda f: grow(f / "m.gguf", b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 40), tera),
        ),
    }
    arguments: list[list[str]] = []
    for name, (kind, damage) in cases.items():
        folder = shutil.copytree(good / kind, tmp_path / name / "model")
        damage(folder)
        several = commands(kind, folder, tmp_path / name / "target")
        arguments += several[:1] if name == "a header of objects" else several  # it takes seconds
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
        cwd=Path(mixtral.__file__).parents[1],
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    told = done.stderr.splitlines()
    assert len(lines) == len(arguments) == len(told)
    for command, (code, seconds, taken), line in zip(arguments, lines, told, strict=True):
        assert code == 2, (command, line)
        assert line.startswith("mixtral: error: ")
        assert "internal" not in line
        assert seconds < 10, command
        assert taken < 500 << 20, command


@pytest.mark.slow
def test_the_process_says_one_line(good: Path, tmp_path: Path) -> None:
    """The same through the installed entry point."""
    folder = shutil.copytree(good / "pth", tmp_path / "model")
    members(lambda n, d: d.replace(b"K@K \x86", b"J\xff\xff\xff\xffK \x86", 1) if n == "data.pkl" else d)(
        folder / "consolidated.00.pth"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mixtral", "verify", str(folder), "--unpickle"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=Path(mixtral.__file__).parents[1],
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mixtral: error: consolidated.00.pth: ")
    assert done.stderr.count("\n") == 1
