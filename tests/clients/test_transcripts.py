"""The examples of docs/clients.md: each is run, and gives what the page says."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
transcripts: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "transcripts.py"))
PAGE = transcripts["PAGE"].read_text(encoding="utf-8")
EXAMPLES = transcripts["examples"](PAGE)
WATCHED = (str(Path(__file__).with_name("watched.py")),)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with transcripts["workplace"]() as found:
        yield found


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: re.sub(r"\W+", "-", example.text[:30]))
def test_an_example_gives_what_the_page_says(example: Any, address: str, folder: Path) -> None:
    if example.needs_node and not transcripts["can_run_node"]():
        pytest.skip("needs node, and npm install --no-save openai in the checkout")
    found = transcripts["run_example"](example, address, folder, WATCHED)
    assert transcripts["compared"](found) == transcripts["compared"](example.output)


def test_a_stream_may_be_cut_elsewhere() -> None:
    def event(text: str, reason: str | None = None) -> str:
        choice = {"index": 0, "text": text, "finish_reason": reason}
        return f"data: {json.dumps({'id': 'cmpl-' + 32 * 'a', 'choices': [choice]})}\n\n"

    compared = transcripts["compared"]
    apart = event(" Mu") + event("seum") + event(" is", "length") + "data: [DONE]\n"
    assert compared(apart) == compared(event(" Museum") + event(" is", "length") + "data: [DONE]\n")
    assert compared(apart) == compared(event(" Museum is", "length") + "data: [DONE]\n")
    assert compared(apart) != compared(event(" Museums is", "length") + "data: [DONE]\n")
    assert compared(apart) != compared(event(" Museum is", "stop") + "data: [DONE]\n")


def test_every_marked_block_is_an_example() -> None:
    assert len(EXAMPLES) >= 9
    assert len(EXAMPLES) == len(re.findall(r"^```(?:sh|python)$", PAGE, re.MULTILINE))
    assert len(EXAMPLES) == len(re.findall(r"^```output$", PAGE, re.MULTILINE))
    assert transcripts["with_outputs"](PAGE, [example.output for example in EXAMPLES]) == PAGE
    other = transcripts["with_outputs"](PAGE, ["other\n"] * len(EXAMPLES))
    assert [example.output for example in transcripts["examples"](other)] == ["other\n"] * len(EXAMPLES)


def test_an_example_that_fails_is_found_out(tmp_path: Path) -> None:
    broken = type(EXAMPLES[0])("python", "raise SystemExit(3)\n", "")
    with pytest.raises(RuntimeError, match="exit code 3"):
        transcripts["run_example"](broken, "http://127.0.0.1:1", tmp_path)
