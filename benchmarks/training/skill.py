"""A new skill for the embedded model, taught in six ways on the same data: what each costs, learns and forgets.

    python benchmarks/training/skill.py runs/skill                    # all of it; what is done already is kept
    python benchmarks/training/skill.py runs/skill --stage time       # speed alone, on a machine that does nothing else
    python benchmarks/training/skill.py runs/skill --stage report --json results.json --images docs/images

The skill is that of ``ferry.py``. Every way takes the same documents in the same order, for the same number of steps.
Its learning rate is the one of a few with the lowest loss on validation after a short run; the tests are looked at
once, at the end. Each training runs in a process of its own, whose peak of resident memory is measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ferry
from showing import table, write_pictures

import mixtral
from mixtral.api import folder_of
from mixtral.bench.machine import machine
from mixtral.cli.answers import answerer
from mixtral.desk.source import Document
from mixtral.evaluate.desk import score, wilson
from mixtral.train.export import export_run
from mixtral.train.loop import StepReport
from mixtral.train.sft import Sft
from mixtral.train.tune import SftConfig

STEPS, SWEEP_STEPS, TIMED_STEPS = 160, 40, 14
PER_STEP = 8  # documents
OLD_SUITES = ("chat/templates", "chat/values", "calls/answer", "sums/1-op", "notes/short")
OLD_COUNT = 60
STAGES = ("prepare", "sweep", "train", "score", "time", "report")
_EVERYTHING = "q,k,v,o,gate_up,down"


@dataclass(frozen=True, slots=True)
class Method:
    """A way of training: tables of the configuration, the learning rates that are tried, and the base."""

    label: str
    rates: tuple[float, ...]
    tables: Mapping[str, Any] = field(default_factory=dict)
    base: str = "embedded"

    @property
    def is_adapter(self) -> bool:
        """Whether the result is an adapter, not a model."""
        return "adapter" in self.tables


METHODS = {
    "full": Method("all weights", (2e-4, 5e-4, 1e-3, 2e-3)),
    "lora": Method("LoRA, attention and experts", (1e-3, 3e-3, 6e-3), {"adapter": {"targets": _EVERYTHING}}),
    "attention": Method("LoRA, attention alone", (2e-3, 5e-3, 1e-2, 2e-2), {"adapter": {"targets": "q,k,v,o"}}),
    "qlora": Method("QLoRA, as LoRA over int4", (1e-3, 3e-3, 6e-3), {"adapter": {"targets": _EVERYTHING}}, base="int4"),
    "esft": Method("ESFT, share 0.2", (5e-4, 1e-3, 2e-3), {"experts": {"file": "chosen.json"}}),
    "random": Method("as many random experts", (5e-4, 1e-3, 2e-3), {"experts": {"file": "random.json"}}),
}


def main() -> None:
    """Do what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything is kept")
    parser.add_argument("--stage", choices=STAGES, action="append", help="only this; may be repeated")
    parser.add_argument("--method", choices=METHODS, action="append", help="only this; may be repeated")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the results there")
    parser.add_argument("--images", type=Path, help="folder for the pictures; needs matplotlib")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        train_here(given.folder)
        return
    folder: Path = given.folder
    for stage in given.stage or STAGES:
        if stage == "prepare":
            prepare(folder)
        elif stage == "report":
            report(folder, given.json, given.images)
        else:
            for name in given.method or METHODS:
                _STAGES[stage](folder, name, given.threads)


def prepare(folder: Path) -> None:
    """Data, the int4 base, the choice of experts, and the scores before any training."""
    ferry.write(folder / "data", train=STEPS * PER_STEP)
    if not (folder / "int4").exists():
        _mixtral("quantize", "embedded", str(folder / "int4"), "--format", "int4_g32")
    for name, options in (("chosen", []), ("random", ["--random", "1"])):
        if not (folder / f"{name}.json").exists():
            text, out = str(folder / "data" / "text.txt"), str(folder / f"{name}.json")
            _mixtral("adapter", "experts", "embedded", text, "--share", "0.2", *options, "--json", out)
    for name, model in (("embedded", "embedded"), ("int4", str(folder / "int4"))):
        if not (folder / f"before-{name}.json").exists():
            _write(folder / f"before-{name}.json", scores_of(mixtral.load(model)))


def sweep(folder: Path, name: str, threads: int) -> None:
    """A short run at every learning rate."""
    for rate in METHODS[name].rates:
        run(folder, name, f"rate-{rate:g}", rate=rate, steps=SWEEP_STEPS, threads=threads)


def train(folder: Path, name: str, threads: int) -> None:
    """The run whose result is scored, at the best rate; and its model or adapter."""
    home = folder / name
    run(folder, name, "whole", rate=best_rate(folder, name), steps=STEPS, threads=threads, keep=True)
    if not (home / "result").exists():
        export_run(home / "whole", home / "half-written", overwrite=True)
        (home / "half-written").rename(home / "result")
        for state in (home / "whole").glob("step-*"):
            shutil.rmtree(state)


def score_result(folder: Path, name: str, threads: int) -> None:
    """What was learnt, and what is left of the old skills."""
    method, home = METHODS[name], folder / name
    if (home / "scores.json").exists():
        return
    result = home / "result"
    if method.is_adapter:
        llm = mixtral.load(_base(folder, method), adapter=result, threads=threads)
    else:
        llm = mixtral.load(result, threads=threads)
    _write(home / "scores.json", scores_of(llm) | {"file_bytes": (next(result.glob("*.safetensors"))).stat().st_size})


def timed(folder: Path, name: str, threads: int) -> None:
    """The seconds of a step, on its own: nothing else shall run."""
    run(folder, name, "timed", rate=1e-5, steps=TIMED_STEPS, threads=threads)


_STAGES = {"sweep": sweep, "train": train, "score": score_result, "time": timed}


def run(
    folder: Path, name: str, what: str, *, rate: float, steps: int, threads: int, keep: bool = False
) -> Mapping[str, Any]:
    """Train in a process of its own, unless that is done; what it says and the memory that it took."""
    place = folder / name / what
    found = folder / name / f"{what}.json"
    if not found.exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        _write(place / "config.json", settings(folder, name, rate=rate, steps=steps, threads=threads))
        code = subprocess.run([sys.executable, __file__, "--one", str(place)], check=False).returncode
        if code:
            raise SystemExit(f"{name}, {what}: the training ended with exit code {code}")
        records = [json.loads(line) for line in (place / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        steps_of = [record for record in records if "loss" in record]
        told = json.loads((place / "told.json").read_text(encoding="utf-8"))
        values = told | {
            "rate": rate,
            "steps": steps,
            "validation_loss": records[-1]["validation_loss"],
            "losses": [round(record["loss"], 4) for record in steps_of],
            "agreement": steps_of[-1]["agreement"],
            "seconds_per_step": statistics.median(record["seconds"] for record in steps_of[4:]),
            "tokens": steps_of[-1]["tokens_total"],
        }
        if not keep:
            shutil.rmtree(place)
        _write(found, values)
        print(f"{name}, {what}: {steps} steps, validation loss {values['validation_loss']:.4f}", flush=True)
    values = json.loads(found.read_text(encoding="utf-8"))
    return dict(values)


def settings(folder: Path, name: str, *, rate: float, steps: int, threads: int) -> dict[str, Any]:
    """The configuration of a run, as the commands read it from TOML."""
    method, data = METHODS[name], folder / "data"
    tables = {key: dict(value) for key, value in method.tables.items()}
    if "experts" in tables:
        tables["experts"]["file"] = str(folder / tables["experts"]["file"])
    return {
        "model": {"path": _base(folder, method)},
        "data": {
            "train": str(data / "train.jsonl"),
            "validation": str(data / "validation.jsonl"),
            "documents_per_step": PER_STEP,
            "max_tokens": 256,
        },
        "optim": {"learning_rate": rate},
        "run": {"steps": steps, "save_every": steps, "dtype": "float32", "threads": threads},
        **tables,
    }


def train_here(place: Path) -> None:
    """Train what ``config.json`` in the folder says, in this process; the loads of all experts in every step."""
    config = SftConfig.from_dict(json.loads((place / "config.json").read_text(encoding="utf-8")), source="config.json")
    runs: list[Sft] = []
    loads: list[list[list[float]]] = []

    def on_step(step: StepReport) -> None:
        loads.append([[round(load, 3) for load in layer] for layer in runs[0].loads_LE.tolist()])

    Sft.train(config, place, folder_of(config.model.path), on_ready=runs.append, on_step=on_step)
    trained = sum(master.numel() for master in runs[0].optimizer.masters.values())
    experts = None if runs[0].selection is None else sum(map(len, runs[0].selection.experts))
    told = {"trained": trained, "experts": experts, "loads": loads, "peak_bytes": peak_resident()}
    _write(place / "told.json", told)


def peak_resident() -> int:
    """The most memory that this process had, in bytes, since it became this program.

    ``ru_maxrss`` is no smaller than what the process that started it had.
    """
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def best_rate(folder: Path, name: str) -> float:
    """The learning rate whose short run has the lowest loss on validation."""
    tried = {rate: _read(folder / name / f"rate-{rate:g}.json")["validation_loss"] for rate in METHODS[name].rates}
    return min(tried, key=lambda rate: float(tried[rate]))


def scores_of(llm: mixtral.LLM) -> dict[str, Any]:
    """Right answers at the tests of the skill and at some old suites."""
    answer = answerer(llm, lambda suite, done, total: None)
    found: dict[str, Any] = {}
    for test in ferry.TESTS:
        asked = ferry.questions(test, 150)
        replies = answer([_document(question) for question in asked])
        seen = [ferry.verdict(question, reply.text) for question, reply in zip(asked, replies, strict=True)]
        counts = dict(zip(("form", "crossing", "right"), map(sum, zip(*seen, strict=True)), strict=True))
        found[test] = {"n": len(asked), **counts, "interval": wilson(counts["right"], len(asked))}
    old = {row.suite: row.correct for row in score(answer, OLD_SUITES, OLD_COUNT, seed=1, split="test", sample=1)}
    total, n = sum(old.values()), OLD_COUNT * len(OLD_SUITES)
    found["old"] = {"n": n, "right": total, "interval": wilson(total, n), "suites": old}
    return found


def report(folder: Path, json_path: Path | None, images: Path | None) -> None:
    """The table, and all results in one file."""
    found: dict[str, Any] = {
        "settings": {"steps": STEPS, "documents_per_step": PER_STEP, "sweep_steps": SWEEP_STEPS, "dtype": "float32"},
        "machine": machine(),
        "before": {name: _read(folder / f"before-{name}.json") for name in ("embedded", "int4")},
        "methods": {},
    }
    loads = None
    for name, method in METHODS.items():
        home = folder / name
        if not (home / "scores.json").exists():
            print(f"{method.label}: not scored yet, left out")
            continue
        whole = _read(home / "whole.json")
        alone = _read(home / "timed.json") if (home / "timed.json").exists() else whole
        if name == "full":
            loads = whole["loads"]
        found["methods"][name] = {
            "label": method.label,
            "rates": {
                f"{rate:g}": _read(home / f"rate-{rate:g}.json")["validation_loss"]
                for rate in method.rates
                if (home / f"rate-{rate:g}.json").exists()
            },
            **{key: value for key, value in whole.items() if key not in ("loads", "seconds_per_step")},
            "peak_bytes": alone["peak_bytes"],
            "seconds": alone["seconds_per_step"] * STEPS,
            "timed_alone": alone is not whole,
            "scores": _read(home / "scores.json"),
        }
    _write(folder / "results.json", found)
    if json_path is not None:
        json_path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    if images is not None:
        write_pictures(images, found, loads or [])
    print(table(found))


def _document(question: ferry.Question) -> Document:
    turns = ({"role": "user", "content": question.text}, {"role": "assistant", "content": question.answer})
    return Document("ferry", "ferry", "en", turns)


def _base(folder: Path, method: Method) -> str:
    return method.base if method.base == "embedded" else str(folder / method.base)


def _mixtral(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "mixtral", *arguments], check=True, stdout=subprocess.DEVNULL)


def _write(path: Path, values: Mapping[str, Any]) -> None:
    """Whole or not at all: what is there counts as done."""
    half = path.with_suffix(".half")
    half.write_text(json.dumps(values) + "\n", encoding="utf-8")
    half.replace(path)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise SystemExit(f"{path} is missing: run the earlier stages first")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
