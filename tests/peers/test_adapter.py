"""One trained adapter in four programs: PEFT, our plain path, the merged checkpoint, llama.cpp. They say the same."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ferry
import peft
import pytest
import torch
import transformers

import mixtral
from mixtral.cli import main
from mixtral.desk.write import suite_documents
from mixtral.tokenizer import encode_chat

pytestmark = [
    pytest.mark.peers,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
STEPS, TOKENS = 60, 60
EXACT: Mapping[str, Any] = {"dtype": "float32", "reference": True}
Ids = list[int]


@dataclass(frozen=True)
class Trained:
    """The adapter, prompts as ids, and what our plain path answers with and without it."""

    adapter: Path
    prompts: Sequence[Ids]
    adapted: Sequence[Ids]
    plain: Sequence[Ids]
    end: int


def command(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def answers(llm: mixtral.LLM, prompts: Sequence[Ids]) -> list[Ids]:
    end = mixtral.load("embedded").tokenizer.eos_id
    found = [llm.generate(ids, max_tokens=TOKENS, temperature=0.0).ids for ids in prompts]
    return [[i for i in ids if i != end] for ids in found]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of ``mixtral train sft`` on attention and experts, exported; 16 questions of the new skill, 8 old ones."""
    folder = tmp_path_factory.mktemp("ferry")
    ferry.write(folder / "data", train=8 * STEPS)
    values = ("data.documents_per_step=8", "data.max_tokens=256", f"run.steps={STEPS}", "run.threads=1")
    options = [word for value in (*values, "run.dtype=float32") for word in ("--set", value)]
    run, adapter, data = folder / "run", folder / "adapter", folder / "data" / "train.jsonl"
    command("train", "sft", "--out", run, "--data", data, "--adapter", "--learning-rate", 3e-3, *options)
    command("train", "export", run, adapter)
    asked = [{"role": "user", "content": q.text} for name in ferry.TESTS for q in ferry.questions(name, 8)]
    talks: list[Sequence[Mapping[str, Any]]] = [[message] for message in asked]
    for suite in ("chat/templates", "sums/1-op"):
        talks += [one.messages[:-1] for one in suite_documents(suite, 4, seed=1, split="test")]
    base = mixtral.load("embedded", **EXACT)
    prompts = [list(encode_chat(base.tokenizer, talk).ids) for talk in talks]
    adapted = answers(mixtral.load("embedded", adapter=adapter, **EXACT), prompts)
    assert base.tokenizer.decode(adapted[0]).startswith("The crossing to ")
    return Trained(adapter, prompts, adapted, answers(base, prompts), base.tokenizer.eos_id)


def test_peft_says_the_same(trained: Trained, tmp_path: Path) -> None:
    """In float32; and without the adapter it says what our base says, so the adapter is what makes the difference."""
    command("convert", "embedded", tmp_path / "base", "--to", "hf-per-expert", "--dtype", "float32")
    model: Any = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    model.set_experts_implementation("eager")

    def say(peer: Any, ids: Ids) -> Ids:
        given = torch.tensor([ids])
        made = peer.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=TOKENS,
            eos_token_id=trained.end,
            pad_token_id=trained.end,
        )
        return [i for i in made[0, len(ids) :].tolist() if i != trained.end]

    assert [say(model, ids) for ids in trained.prompts] == trained.plain
    adapted = peft.PeftModel.from_pretrained(model, trained.adapter)
    assert [say(adapted, ids) for ids in trained.prompts] == trained.adapted
    changed = sum(a != b for a, b in zip(trained.adapted, trained.plain, strict=True))
    tokens = sum(map(len, trained.adapted))
    print(f"PEFT: {len(trained.prompts)} prompts, {tokens} tokens, all equal; {changed} differ from the base")
    assert changed > len(trained.prompts) / 2


@pytest.mark.parametrize("layout", ["hf", "hf-per-expert", "consolidated"])
def test_the_merged_checkpoint_says_the_same(layout: str, trained: Trained, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    command(
        *("adapter", "merge", "embedded", trained.adapter, merged),
        *("--to", layout, "--dtype", "float32", "--no-check"),
    )
    assert answers(mixtral.load(merged, **EXACT), trained.prompts) == trained.adapted
    assert answers(mixtral.load(merged, dtype="float32"), trained.prompts) == trained.adapted


# llama.cpp rounds what it multiplies weights of 16 bits by to 16 bits as well. ``near``: how far apart two logits may
# be in the plain path, of those that spread over some tens, where the two first choose another token.
@pytest.mark.parametrize(("form", "near"), [("f32", 0.0), ("f16", 0.02), ("bf16", 0.05)])
def test_llama_cpp_says_the_same_of_the_merged_file(form: str, near: float, trained: Trained, tmp_path: Path) -> None:
    """As we do of the same file, token for token but for near ties; of float32 also as PEFT does."""
    llama_cpp = pytest.importorskip("llama_cpp")
    path = tmp_path / "merged.gguf"
    command(
        *("adapter", "merge", "embedded", trained.adapter, path),
        *("--to", "gguf", "--format", form, "--no-check"),
    )
    peer: Any = llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, verbose=False)
    theirs: list[Ids] = []
    for ids in trained.prompts:
        theirs.append([])
        for token in peer.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            if len(theirs[-1]) == TOKENS or token == trained.end:
                break
            theirs[-1].append(token)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llm = mixtral.load(path, **EXACT)
    ours = answers(llm, trained.prompts)
    same = [a == b for a, b in zip(theirs, ours, strict=True)]
    as_peft = sum(a == b for a, b in zip(theirs, trained.adapted, strict=True))
    gaps = [gap(llm, *three, trained.end) for three in zip(trained.prompts, ours, theirs, strict=True)]
    print(f"llama.cpp, {form}: {sum(same)} of {len(ours)} as we, {as_peft} as PEFT; gap of the others {max(gaps):.3g}")
    assert max(gaps) <= near
    assert sum(same) >= len(ours) - 2
    assert form != "f32" or as_peft == len(ours)


def gap(llm: mixtral.LLM, prompt: Ids, ours: Ids, theirs: Ids, end: int) -> float:
    """By how much we find our token likelier where the answers part, as logits; 0 where they do not."""
    if ours == theirs:
        return 0.0
    first = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    chosen = [(*answer, end)[first] for answer in (ours, theirs)]
    logits = llm.logits([*prompt, *ours[:first]])[-1]
    return float(logits[chosen[0]] - logits[chosen[1]])
