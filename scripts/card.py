"""Writes the model card of the embedded model from its weights' header, the log of its run and its scores.

Run: python scripts/card.py RUN_FOLDER, after `mixtral train export RUN_FOLDER src/mixtral/embedded` and
`mixtral evaluate --split test --count 200 --json src/mixtral/embedded/scores.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mixtral.evaluate.desk import SuiteScore, to_markdown
from mixtral.plan import count_parameters
from mixtral.weights.compact import load_compact

__all__ = ["main", "render"]

FOLDER = Path(__file__).resolve().parent.parent / "src" / "mixtral" / "embedded"
CURVE_POINTS = 12

TEXT = """# Model card: the embedded model

A small Mixtral that this project trained from nothing, on text that it generates itself: the desk of a hotel and
visitor office in one invented town, in English, French, German, Spanish and Italian. Written by `scripts/card.py`
from the weights, the log of the run and the scores beside this file.

## What it is

Preset `tiny`: 8 layers, width 256, 8 query and 4 key-value heads of size 32, 8 experts of hidden size 512, 2 per
token, the v3 tokenizer with all its {vocabulary:,} ids. {total:,} parameters, {active:,} active per token. {rows:,}
ids have rows of their own; the others share one (`docs/embedded.md`). int8 in groups of 32; {megabytes:.1f} MB.

## Data

The generator in `mixtral.desk`, seed {data_seed}, split `train`; nothing was downloaded and nobody's text was used.
Documents are drawn by skill with the weights {mixture}. Held-out values, templates, functions and schemas never occur
in the training split.

## Training

`mixtral train pretrain examples/pretrain.toml`: {steps:,} steps, {tokens:,} tokens ({per_step:,.0f} a step),
{hours:.2f} hours on 2 CPU cores without a GPU ({speed:,.0f} tokens/s while other work ran beside it), torch {torch},
bfloat16 with float32 masters. Muon on matrices and AdamW on the rest, learning rate {learning_rate}, {warmup} steps
of warm-up, linear decay over the last {decay:.0%} of the steps. Seeds: {seed} for the weights, {data_seed} for the
data. Balance loss {balance_coef}, z-loss {z_coef}.

Loss is nats per trained token, weighted as in training; `validation` is nats per token of the assistant on held-out
documents.

{curve}
## Held-out scores

Split `{split}`, greedy answers, {n} documents per suite, the same documents for everyone; interval: Wilson, 95 %. The
baseline is the better of two trivial ones: the reply of the most similar training document (`nearest`), or always the
most frequent reply (`majority`). `mixtral evaluate --split {split} --count {n}` makes this table again.

{scores}
`calls/none` asks whether the model refrains from calling where no function fits: never calling scores 100 % there. In
`chat/templates` the baseline finds the same question in other words and the answers repeat, so it is not weak.

## Limits

It knows one invented town and nothing else. It was not trained to refuse, to be safe, or to say what it does not
know. Answers outside the town desk are noise. Texts much longer than 512 tokens were not trained.
"""


def render(run_folder: Path, split: str = "test") -> str:
    """The card's text; raises FileNotFoundError where a part is missing."""
    compact = load_compact(FOLDER)
    scores = [SuiteScore(**row) for row in json.loads((FOLDER / "scores.json").read_text(encoding="utf-8"))]
    log = [json.loads(line) for line in (run_folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    state = json.loads(max(run_folder.glob("step-*/state.json")).read_text(encoding="utf-8"))
    config, notes = compact.model.config, compact.metadata
    parameters = count_parameters(config)
    steps, tokens, seconds = int(notes["steps"]), int(notes["tokens"]), float(notes["seconds"])
    data, optim = state["config"]["data"], state["config"]["optim"]
    return TEXT.format(
        vocabulary=config.vocab_size,
        total=parameters.total,
        active=parameters.active,
        rows=int(notes["trained_rows"]),
        megabytes=(FOLDER / "model.safetensors").stat().st_size / 1e6,
        data_seed=notes["data_seed"],
        seed=notes["seed"],
        mixture=", ".join(f"{skill} {weight:g}" for skill, weight in data["mixture"].items()),
        steps=steps,
        tokens=tokens,
        per_step=tokens / steps,
        hours=seconds / 3600,
        speed=tokens / seconds,
        torch=notes["torch"],
        learning_rate=optim["learning_rate"],
        warmup=optim["warmup_steps"],
        decay=optim["decay_fraction"],
        balance_coef=optim["balance_coef"],
        z_coef=optim["z_coef"],
        curve=curve(log),
        split=split,
        n=scores[0].n,
        scores=to_markdown(scores),
    )


def curve(log: list[dict[str, Any]]) -> str:
    """A table of the losses at steps that were validated, thinned out."""
    by_step = {record["step"]: record for record in log if "loss" in record}
    checked = [record for record in log if "validation_loss" in record and record["step"] in by_step]
    every = -(-len(checked) // CURVE_POINTS)
    lines = [
        "| step | tokens | loss | validation | balance | z | expert load |",
        "|---:|---:|---:|---:|---:|---:|---|",
    ]
    for record in reversed(checked[::-1][::every]):
        step = by_step[record["step"]]
        lines.append(
            f"| {step['step']} | {step['tokens_total']:,} | {step['loss']:.3f} | {record['validation_loss']:.3f} | "
            f"{step['balance']:.3f} | {step['z']:.2f} | {step['load_min']:.2f} - {step['load_max']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the card."""
    (FOLDER / "CARD.md").write_text(render(Path(sys.argv[1])), encoding="utf-8")


if __name__ == "__main__":
    main()
