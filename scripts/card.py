"""Writes the model card of the embedded model from its weights' header, the log of its run and its scores.

Run: python scripts/card.py RUN_FOLDER, after `mixtral train export RUN_FOLDER src/mixtral/embedded --overwrite` and
`mixtral evaluate --split test --count 1000 --json src/mixtral/embedded/scores.json`. The run is that of
`examples/pretrain.toml`, or that of `examples/continued.toml` on a model of it.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral.desk.calls import MADE_UP_PERCENT, RENAMED_PERCENT, UNHEARD_PERCENT
from mixtral.desk.world import INVENTED_PERCENT
from mixtral.desk.write import generator_id
from mixtral.evaluate.desk import SuiteScore, to_markdown
from mixtral.plan import count_parameters
from mixtral.train.checkpoint import load_latest
from mixtral.train.config import PretrainConfig, read_pretrain_config
from mixtral.train.start import fingerprint
from mixtral.weights.compact import load_compact

__all__ = ["main", "render"]

FOLDER = Path(__file__).resolve().parent.parent / "src" / "mixtral" / "embedded"
FIRST = FOLDER.parents[2] / "examples" / "pretrain.toml"
CURVE_POINTS = 12
First = tuple[PretrainConfig, Mapping[str, str]]
"""The configuration of the run before, and what the file of its model says of it."""

TEXT = """# Model card: the embedded model

A small Mixtral that this project trained from nothing, on text that it generates itself: the desk of a hotel and
visitor office in one invented town, in English, French, German, Spanish and Italian. Written by `scripts/card.py`
from the weights, the log of the run and the scores beside this file.

## What it is

{layers} layers, width {width}, {heads} query and {groups} key-value heads of size {head}, {experts} experts of hidden
size {hidden}, {per_token} per token, the v3 tokenizer with all its {vocabulary:,} ids. {total:,} parameters, {active:,}
active per token. {rows:,} ids have rows of their own; the others share one (`docs/embedded-model.md`). int8 in groups
of 32; {megabytes:.1f} MB.

## Data

The generator in `mixtral.desk`, split `train`; nothing was downloaded and nobody's text was used. Documents are drawn
by skill with these weights{drawn}.

Held-out values, templates, functions and schemas never occur in the training split. {invented} % of the names, codes
and things that are trained are invented, from syllables and from pieces of the vocabulary; in {renamed} % of the
documents with functions these and their parameters have other names, and in {unheard} % the things that are booked and
looked for have invented words; {made_up} % of the functions are made up from other pairs of verbs and things. So what
is copied must be read. What was otherwise in earlier parts of the training is in `docs/embedded-model.md`.

## Training

{trained}

Nats per trained token, weighted as in training; `validation` is nats per token of the assistant on held-out documents.

{curve}
## Held-out scores

Split `{split}`, seed {score_seed}, greedy answers, {n} documents per suite, the same for everyone; interval: Wilson,
95 %. The baseline is the better of two trivial ones: the reply of the most similar training document (`nearest`), or
always the most frequent reply (`majority`). `mixtral evaluate --split {split} --count {n}` makes this table again.

{scores}
`calls/none` asks whether the model refrains from calling where no function fits: never calling scores 100 % there. In
`chat/templates` the baseline finds the same question in other words and the answers repeat, so it is not weak.

## Limits

It knows one invented town and nothing else. It was not trained to refuse, to be safe, or to say what it does not
know. Answers outside the town desk are noise. Texts longer than 2,048 tokens were not trained.
"""


FIRST_RUN = """`mixtral train pretrain examples/pretrain.toml`: {steps:,} steps, {tokens:,} tokens, {hours:.2f} hours;
learning rate {rate}, {warmup} steps of warm-up, linear decay over the last {decay:.0%} of the steps. Exported, and from
these int8 weights on:
"""
RUN = """`mixtral train pretrain examples/{file}`: {steps:,} steps, {tokens:,} tokens ({per_step:,.0f} a step),
{hours:.2f} hours on {threads} CPU threads without a GPU ({speed:,.0f} tokens/s; other work ran beside it), torch
{torch}, bfloat16 with float32 masters. Muon on matrices and AdamW on the rest, learning rate {rate}, {warmup} steps of
warm-up, linear decay {decay}. Seeds: {seed} for the first weights, {data_seed} for the data.
Balance loss {balance}, z-loss {z}."""


def render(run_folder: Path, model_folder: Path) -> str:
    """The card's text.

    Raises:
        ValueError: the run, the weights and the scores do not belong together, or the run is not at its end.
        OSError, MixtralError: a part is missing or damaged.
    """
    compact = load_compact(model_folder, device="cpu")
    made = json.loads((model_folder / "scores.json").read_text(encoding="utf-8"))
    scores = [SuiteScore(**row) for row in made["scores"]]
    config, notes = compact.model.config, compact.metadata
    parameters = count_parameters(config)
    steps, tokens = int(notes["steps"]), int(notes["tokens"])
    saved = load_latest(run_folder)
    if saved is None or (saved[0], saved[2]["tokens_total"]) != (steps, tokens):
        raise ValueError(f"{run_folder}: its newest state is not the one that {model_folder} was exported from")
    if steps != int(notes["steps_planned"]):
        raise ValueError(f"the weights are of step {steps} of {notes['steps_planned']}; export the end of the run")
    if saved[2]["generators"][-1][1] != generator_id():
        raise ValueError(f"{run_folder}: another version of the generator wrote its documents; take the source of then")
    if len({row.n for row in scores}) != 1:
        raise ValueError("the suites were scored on different numbers of documents")
    first = first_part(saved[2]) if saved[2]["config"].get("start") else None
    log = [json.loads(line) for line in (run_folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return TEXT.format(
        vocabulary=config.vocab_size,
        total=parameters.total,
        active=parameters.active,
        rows=int(notes["trained_rows"]),
        megabytes=(model_folder / "model.safetensors").stat().st_size / 1e6,
        drawn=drawn(saved[2]["config"]["data"], first),
        invented=INVENTED_PERCENT,
        renamed=RENAMED_PERCENT,
        unheard=UNHEARD_PERCENT,
        made_up=MADE_UP_PERCENT,
        trained=trained(saved[2], notes, first),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        head=config.head_dim,
        experts=config.num_local_experts,
        hidden=config.intermediate_size,
        per_token=config.num_experts_per_tok,
        curve=curve([record for record in log if record["step"] <= steps]),
        split=made["split"],
        score_seed=made["seed"],
        n=scores[0].n,
        scores=to_markdown(scores),
    )


def first_part(values: Mapping[str, Any]) -> First:
    """The configuration of the run that made the model of the start, and what the file of that model says of it.

    Raises:
        ValueError: it is not the model that the run began with, or is of another run than ``examples/pretrain.toml``.
        ConfigError: it lies no longer where it was.
    """
    path = Path(values["config"]["start"]["path"])
    if fingerprint(path) != values["base_sha256"]:
        raise ValueError(f"{path}: is not the model that the run began with")
    config, begun = read_pretrain_config(FIRST), load_compact(path, device="cpu").metadata
    if (int(begun["steps"]), int(begun["data_seed"])) != (config.run.steps, config.data.seed):
        raise ValueError(f"{path}: was not made by {FIRST.name}")
    return config, begun


def drawn(data: Mapping[str, Any], first: First | None) -> str:
    """The weights of the skills, those of a run before first."""
    own = f"from seed {data['seed']}:\n\n{mixtures(data)}"
    if first is None:
        return f", {own}"
    before = first[0].to_dict()["data"]
    return f", first from seed {before['seed']}:\n\n{mixtures(before)}.\n\nThen {own}"


def trained(values: Mapping[str, Any], notes: Mapping[str, str], first: First | None) -> str:
    """How the weights were made: a paragraph, or of a run that began with a model two and the sum of tokens."""
    config, seconds = values["config"], values["seconds_total"]
    steps, tokens, optim = int(notes["steps"]), int(notes["tokens"]), config["optim"]
    until_end = (
        f"over the last {optim['decay_fraction']:.0%} of the steps" if optim["schedule"] == "wsd" else "from there"
    )
    text = RUN.format(
        file="continued.toml" if first else FIRST.name,
        steps=steps,
        tokens=tokens,
        per_step=tokens / steps,
        hours=seconds / 3600,
        speed=tokens / seconds,
        threads=config["run"]["threads"],
        torch=notes["torch"],
        rate=optim["learning_rate"],
        warmup=optim["warmup_steps"],
        decay=until_end,
        seed=(first[1] if first else notes)["seed"],
        data_seed=notes["data_seed"],
        balance=optim["balance_coef"],
        z=optim["z_coef"],
    )
    if first is None:
        return text
    before, begun = first[0].optim, first[1]
    intro = FIRST_RUN.format(
        steps=int(begun["steps"]),
        tokens=int(begun["tokens"]),
        hours=float(begun["seconds"]) / 3600,
        rate=before.learning_rate,
        warmup=before.warmup_steps,
        decay=before.decay_fraction,
    )
    return f"{intro}\n{text}\n{int(begun['tokens']) + tokens:,} tokens in all. The losses of the second run:"


def mixtures(data: Mapping[str, Any]) -> str:
    """The shares of the skills, and those that held later."""
    parts = [("", data["mixture"]), *((f"; from step {step} on ", shares) for step, shares in data["later"].items())]
    text = "".join(intro + ", ".join(f"{skill} {share}" for skill, share in shares.items()) for intro, shares in parts)
    return textwrap.fill(text, 116, break_on_hyphens=False)


def curve(log: list[dict[str, Any]]) -> str:
    """A table of the losses at steps that were validated, thinned out."""
    by_step = {record["step"]: record for record in log if "loss" in record}
    checked = [record for record in log if "validation_loss" in record and record["step"] in by_step]
    every = max(1, -(-len(checked) // CURVE_POINTS))
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
    """Write the card; the run folder is the only argument."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    (FOLDER / "CARD.md").write_text(render(Path(sys.argv[1]), FOLDER), encoding="utf-8")


if __name__ == "__main__":
    main()
