"""Files of requests: each line's answer is what HTTP gives, and a killed run ends with the same bytes."""

from __future__ import annotations

import errno
import io
import json
import os
import random
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import expected, serving, spawn
from steps import HELLO, StepEngine

from mixtral import faults
from mixtral.engine.loop import EngineThread
from mixtral.errors import ConfigError, EngineError, MixtralError
from mixtral.server import Client, ServerConfig
from mixtral.server.batch import BatchFiles, run_batch


def line(custom_id: str, body: Any, url: str = "/v1/completions", **fields: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body, **fields})


def completion(prompt: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "steps", "prompt": prompt, "max_tokens": 8, **fields}


CHAT = {"model": "steps", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
GOOD = [
    *(line(f"n{n}", completion([n, n + 1], max_tokens=3 + n % 7)) for n in range(20)),
    line("chat", CHAT, "/v1/chat/completions"),
    line("text", completion("Hellö\u2028")),
    line("own seed", completion([5], seed=42, temperature=0.5)),
    line("no seed", completion([5], seed=None)),
    line("two", completion([[1], [2]])),
]
BAD = [
    "nonsense",
    '{"custom_id": "x"}',
    line("extra", completion([1]), more=1),
    line("n0", completion([9])),  # used before
    line("", completion([1])),
    line("get", completion([1]), method="GET"),
    line("route", completion([1]), "/v1/embeddings"),
    line("streams", completion([1], stream=True)),
    line("field", completion([1], nonsense=1)),
    line("model", completion([1]) | {"model": "other"}),
    line("large", completion([1], max_tokens=100_000)),
    line("list", [1]),
    line("nan", completion([1])).replace('"max_tokens": 8', '"max_tokens": NaN'),
    line("twice", completion([1])).replace('"max_tokens": 8', '"max_tokens": 8, "max_tokens": 9'),
    line("deep", completion([1])).replace('"max_tokens": 8', '"stop": ' + "[" * 100 + "]" * 100),
]


@pytest.fixture
def files(tmp_path: Path) -> BatchFiles:
    return BatchFiles(tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "err.jsonl")


def mixed() -> list[str]:
    """Good and bad lines, shuffled, with what a person leaves in a file."""
    lines = [*GOOD, *BAD]
    random.Random(3).shuffle(lines)
    lines.remove(line("n0", completion([9])))
    return [*lines, line("n0", completion([9])), "", "  "]


def run(files: BatchFiles, *, at_once: int = 4, **fields: Any) -> tuple[int, int]:
    make = lambda: EngineThread(lambda: (StepEngine(slots=3), HELLO), beat_s=0.05)  # noqa: E731
    return run_batch(Client(make, ServerConfig(engine_deaths=1)), files, at_once=at_once, **fields)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(each) for each in path.read_text(encoding="utf-8").splitlines()]


def test_none_at_once_is_refused(files: BatchFiles) -> None:
    files.requests.write_text(GOOD[0] + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="0 requests at once; expected 1 or more"):
        run(files, at_once=0)
    assert not files.answers.exists()


def test_every_line_is_answered_in_order(files: BatchFiles) -> None:
    lines = mixed()
    files.requests.write_text("\n".join(lines), encoding="utf-8")
    assert run(files) == (len(GOOD), len(BAD))
    order = [json.loads(each)["custom_id"] for each in lines if each in GOOD]
    answers = read(files.answers)
    assert [answer["custom_id"] for answer in answers] == order
    for answer in answers:
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["request_id"] == answer["id"]
        assert answer["response"]["body"]["model"] == "steps"
    by_id = {answer["custom_id"]: answer["response"]["body"] for answer in answers}
    assert by_id["n7"]["choices"][0]["text"] == expected([7, 8], 3)
    assert [choice["text"] for choice in by_id["two"]["choices"]] == [expected([n], 8) for n in (1, 2)]
    assert by_id["chat"]["id"].startswith("chatcmpl-")
    errors = read(files.errors)
    assert len({entry["id"] for entry in [*answers, *errors]}) == len(answers) + len(errors)
    codes = {entry["custom_id"]: entry["response"]["body"]["error"] for entry in errors}
    assert codes["streams"]["param"] == "stream"
    assert codes["nan"]["code"] == "invalid_json"
    assert codes["n0"]["param"] == "custom_id"
    assert codes["route"]["param"] == "url"
    assert not files.state.exists()


def test_bodies_are_those_of_the_http_interface(files: BatchFiles) -> None:
    checked = [each for each in [*GOOD, *BAD] if '"body"' in each and "/v1/embeddings" not in each]
    files.requests.write_text("\n".join(checked), encoding="utf-8")
    run(files)
    entries = {entry["custom_id"]: entry for entry in [*read(files.errors), *read(files.answers)]}
    compared = 0
    with serving(spawn()) as (address, _, _):
        for each in checked:
            start = each.index('"body": ') + len('"body": ')
            raw, data = each[start:-1], None
            try:
                data = json.loads(each)
            except ValueError:
                continue
            if data["custom_id"] in ("extra", "", "get", "streams", "n0", "nan"):
                continue  # what is wrong with these is not their body
            response = httpx.post(address + data["url"], content=raw, headers={"content-type": "application/json"})
            entry = entries[data["custom_id"]]["response"]
            assert entry["status_code"] == response.status_code, data["custom_id"]
            body = response.json()
            if response.status_code == 200:
                for made in (body, entry["body"]):
                    made.pop("id"), made.pop("created")
                    made["usage"].pop("prompt_tokens_details", None)
            assert entry["body"] == body
            compared += 1
    assert compared >= 25


def test_a_run_that_was_killed_anywhere_ends_with_the_same_bytes(files: BatchFiles, tmp_path: Path) -> None:
    files.requests.write_text("\n".join(mixed()), encoding="utf-8")
    run(files)
    whole = files.answers.read_bytes(), files.errors.read_bytes()
    draw = random.Random(1)

    class Killed(Exception):
        pass

    for number in range(8):
        again = BatchFiles(files.requests, tmp_path / f"out{number}", tmp_path / f"err{number}")
        stop = draw.randint(1, len(GOOD) + len(BAD) - 1)

        def on_line(done: int, total: int, stop: int = stop) -> None:
            if done == stop:
                raise Killed

        with pytest.raises(Killed):
            run(again, at_once=draw.randint(1, 8), on_line=on_line)
        assert again.state.exists()
        for path in (again.answers, again.errors):  # what the system had not written yet is lost
            data = path.read_bytes()
            path.write_bytes(data[: max(0, len(data) - draw.randint(0, 300))])
        assert run(again, at_once=draw.randint(1, 8)) == (len(GOOD), len(BAD))
        assert (again.answers.read_bytes(), again.errors.read_bytes()) == whole


def test_an_engine_that_fails_ends_the_run_which_can_go_on(files: BatchFiles) -> None:
    files.requests.write_text("\n".join(GOOD), encoding="utf-8")
    faults.install(["step:9:raise"])
    try:
        with pytest.raises(EngineError, match="run the command again"):
            run(files)
    finally:
        faults.install([])
    assert 0 < len(read(files.answers)) < len(GOOD)
    assert files.errors.read_bytes() == b""
    assert run(files) == (len(GOOD), 0)


def test_output_of_another_run_is_never_mixed_in(files: BatchFiles) -> None:
    files.requests.write_text("\n".join(GOOD), encoding="utf-8")
    run(files)
    before = files.answers.read_bytes()
    with pytest.raises(ConfigError, match="belongs to no unfinished run"):
        run(files)
    assert files.answers.read_bytes() == before
    files.state.write_text(json.dumps({"input": "x", "engine": "fp_steps", "model": "steps"}))
    with pytest.raises(ConfigError, match="another input"):
        run(files)
    files.state.unlink()
    files.answers.unlink()
    files.errors.write_text("")
    run(files)


def test_output_that_was_changed_is_refused(files: BatchFiles) -> None:
    files.requests.write_text("\n".join(GOOD), encoding="utf-8")

    def on_line(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(files, on_line=on_line)
    files.answers.write_text("what?\n")
    with pytest.raises(MixtralError, match="line 1 was not written"):
        run(files)


@pytest.mark.parametrize(("text", "says"), [("", "has 0 lines"), ("\n \n", "has 0 lines"), ("x" * 3000, "line 1 has")])
def test_inputs_out_of_bounds_are_refused(files: BatchFiles, text: str, says: str) -> None:
    files.requests.write_text(text)
    with pytest.raises(ConfigError, match=says):
        run(files, limit_bytes=2000)
    assert not files.answers.exists()


def test_too_many_lines_and_bytes_are_refused(files: BatchFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    files.requests.write_text("\n".join(GOOD), encoding="utf-8")
    monkeypatch.setattr("mixtral.server.batch.LINES", 3)
    with pytest.raises(ConfigError, match="expected 1 to 3"):
        run(files)
    monkeypatch.setattr("mixtral.server.batch.SIZE_BYTES", 100)
    with pytest.raises(ConfigError, match="expected at most 100"):
        run(files)


class Full(OSError):
    """The disk is."""


class Disk:
    """The N-th operation of a run on its files fails: ``enospc`` and ``eio`` before it did anything, ``short`` in the
    middle, and after ``kill`` nothing works any more."""

    def __init__(self, failing: int, kind: str) -> None:
        self.failing, self.kind, self.count = failing, kind, 0

    def __call__(self) -> bool:
        """One more operation; whether it is to be done by half. Raises if it fails."""
        self.count += 1
        if self.count < self.failing or (self.count > self.failing and self.kind != "kill"):
            return False
        if self.kind == "short":
            return True
        raise Full(errno.EIO if self.kind == "eio" else errno.ENOSPC, "no")

    def watch(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        """Writing, flushing, syncing, renaming and deleting below a folder are such operations."""
        opened, write_text, replace, unlink, fsync = Path.open, Path.write_text, Path.replace, Path.unlink, os.fsync
        disk = self

        class Writer(io.FileIO):
            def write(self, data: Any) -> int:
                if disk():
                    super().write(data[: len(data) // 2])
                    raise Full(errno.ENOSPC, "no")
                return super().write(data) or 0

        def open_(path: Path, mode: str = "r", *args: Any, **fields: Any) -> Any:
            return Writer(path, mode) if mode == "ab" else opened(path, mode, *args, **fields)

        def partly(do: Any) -> Any:
            def done(*args: Any, **fields: Any) -> Any:
                if disk():
                    raise Full(errno.EIO, "no")
                return do(*args, **fields)

            return done

        for name, new in (("open", open_), ("write_text", partly(write_text))):
            patch.setattr(Path, name, new)
        patch.setattr(Path, "replace", partly(replace))
        patch.setattr(Path, "unlink", partly(unlink))
        patch.setattr(os, "fsync", partly(fsync))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["enospc", "eio", "short", "kill"])
def test_every_operation_on_the_files_can_fail(files: BatchFiles, tmp_path: Path, kind: str) -> None:
    """The error is told, and the next run ends with the bytes of a run that nothing happened to."""
    files.requests.write_text("\n".join([*GOOD[:4], *BAD[:3]]), encoding="utf-8")
    run(files)
    whole = files.answers.read_bytes(), files.errors.read_bytes()
    for failing in range(1, 100):
        again = BatchFiles(files.requests, tmp_path / f"out{failing}", tmp_path / f"err{failing}")
        disk = Disk(failing, kind)
        with pytest.MonkeyPatch.context() as patch:
            disk.watch(patch, tmp_path)
            try:
                run(again)
            except Full:
                pass
            else:
                assert disk.count < failing
                break
        assert disk.count >= failing
        if again.state.exists() or not again.answers.exists():
            assert run(again) == (4, 3)
        assert (again.answers.read_bytes(), again.errors.read_bytes()) == whole
    else:
        pytest.fail("it never came to an end")
    print(f"{failing - 1} points of a batch file: {kind}")
    assert failing > 10
