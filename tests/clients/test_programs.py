"""LiteLLM and lm-eval over the embedded model, each as a program that may not leave this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mixtral
from desk import DATE, DAY, FACT, NEXT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
HERE = Path(__file__).parent
CHOICES = [
    {"question": "When does breakfast start? You can have breakfast from", "choices": [" 07:00", " zebra"], "right": 0},
    {"question": "12 + 30 =", "choices": [" 7", " 42"], "right": 1},
    {"question": "The Maritime Museum opens at 10:00 and", "choices": [" hops", " closes at 17:00."], "right": 1},
]
CHOICE_TASK = """
task: desk_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: right
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITE_TASK = """
task: desk_write
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/write.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: follows
generation_kwargs: {until: ["museum"], max_gen_toks: 16, temperature: 0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def program(name: str, *arguments: str, **environment: str) -> str:
    """What it writes to standard output; it must end well, and must not have reached out."""
    found = subprocess.run(
        [sys.executable, str(HERE / name), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


def test_the_watch_over_programs_sees_who_reaches_out(tmp_path: Path) -> None:
    """Also when the error is swallowed; 192.0.2.1 is nobody's address."""
    for attempt in ("socket.create_connection(('192.0.2.1', 80), 1)", "socket.getaddrinfo('example.com', 80)"):
        text = "import contextlib, socket, loopback\n"
        text += f"with loopback.only_this_machine(), contextlib.suppress(Exception): {attempt}"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
        found = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, check=False)
        assert found.returncode == 3
        assert b"reached out" in found.stderr


def test_litellm(base: str) -> None:
    found = json.loads(program("use_litellm.py", base, LITELLM_LOCAL_MODEL_COST_MAP="True").splitlines()[-1])
    assert FACT in found["whole"]
    assert "".join(piece or "" for piece in found["streamed"]) == found["whole"]
    assert len(found["streamed"]) > 3
    assert found["finish"] == "tool_calls"
    assert found["call"][0] == "book_bike"
    assert json.loads(found["call"][1])["date"] == DATE
    assert NEXT in found["after"]
    assert json.loads(found["formed"])["date"] == DAY
    assert found["text"]
    assert "no embedding head" in found["embedding"]


def lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


def expected(question: str, choice: str) -> tuple[float, bool]:
    """Log-probability of a choice after its question, and whether greedy decoding writes it, from the logits."""
    llm = mixtral.load("embedded")
    whole, start = llm.tokenizer.encode(question + choice), len(llm.tokenizer.encode(question))
    scores_TV = torch.log_softmax(llm.logits(whole).float(), dim=-1)
    places = range(start, len(whole))
    likely = all(int(scores_TV[place - 1].argmax()) == whole[place] for place in places)
    return sum(float(scores_TV[place - 1, whole[place]]) for place in places), likely


@pytest.mark.parametrize(("batch", "at_once"), [(1, 1), (4, 3)])
def test_lm_eval(base: str, tmp_path: Path, batch: int, at_once: int) -> None:
    rows = {"choice": CHOICES, "write": [{"text": "The Maritime", "follows": "-"}]}
    for name, task in (("choice", CHOICE_TASK), ("write", WRITE_TASK)):
        (tmp_path / f"{name}.yaml").write_text(task.replace("FOLDER", str(tmp_path)))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    program(
        "use_lm_eval.py",
        *("run", "--model", "local-completions", "--tasks", "desk_choice,desk_write", "--log_samples"),
        *("--model_args", f"model=embedded,base_url={base}/completions,num_concurrent={at_once}"),
        *("--batch_size", str(batch)),
        *("--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")),
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path / "cache"),
    )
    samples: dict[str, list[Any]] = {
        name: [json.loads(line) for file in (tmp_path / "out").rglob(f"samples_desk_{name}_*") for line in lines(file)]
        for name in ("choice", "write")
    }
    assert len(samples["choice"]) == len(CHOICES)
    for sample in samples["choice"]:
        scores = []
        for (response,), choice in zip(sample["resps"], sample["doc"]["choices"], strict=True):
            score, likely = expected(sample["doc"]["question"], choice)
            assert float(response[0]) == pytest.approx(score, abs=2e-3)
            assert (response[1] in (True, "True")) == likely
            scores.append(score)
        assert sample["acc"] == float(scores.index(max(scores)) == sample["doc"]["right"])
    (written,) = samples["write"]
    llm = mixtral.load("embedded")
    whole = llm.generate(llm.tokenizer.encode("The Maritime"), max_tokens=16, temperature=0.0).text
    assert written["resps"] == [[whole.partition("museum")[0]]]
