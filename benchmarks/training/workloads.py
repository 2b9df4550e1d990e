"""What is trained: the same ids in the same order for everyone, made from nothing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mixtral.desk.write import document
from mixtral.tokenizer import Tokenizer
from mixtral.train.data import encode_document
from mixtral.train.lines import read_pairs, read_texts
from mixtral.train.order import of_step
from mixtral.train.start import load_start

__all__ = ["answers", "documents", "pairs", "write_pairs", "write_talks", "write_texts"]


def documents(step: int, settings: dict[str, Any]) -> list[list[int]]:
    """Rows of a repeated random word, so that there is something to learn; or documents of the town desk."""
    count, length, vocabulary = settings["documents"], settings["length"], settings["vocabulary"]
    if settings["workload"] == "documents":
        tokenizer = Tokenizer.from_version("v3")
        found = []
        for number in range(step * count, (step + 1) * count):
            ids, _ = encode_document(tokenizer, document(1, "train", number))
            found.append([i % vocabulary for i in ids])
        return found
    generator = torch.Generator().manual_seed(step)
    words = torch.randint(0, vocabulary, (count, length // 8), generator=generator)
    rows: list[list[int]] = words.repeat_interleave(8, dim=1).tolist()
    return rows


def write_talks(path: Path, count: int) -> None:
    """Conversations of the town desk, some with functions, as a file of SFT."""
    with path.open("w", encoding="utf-8") as file:
        for item in _talks(count):
            line = {"messages": item.messages, **({"tools": item.tools} if item.tools else {})}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_pairs(path: Path, count: int) -> None:
    """Pairs: the answer of a conversation, and that of another one."""
    items = [item for item in _talks(3 * count) if not item.tools and item.messages[-1].get("content")]
    with path.open("w", encoding="utf-8") as file:
        for item, other in itertools.pairwise(items[: count + 1]):
            answers = [each.messages[-1]["content"] for each in (item, other)]
            if answers[0] != answers[1]:
                line = {"prompt": item.messages[:-1], "chosen": answers[0], "rejected": answers[1]}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_texts(path: Path, count: int, tokens: int) -> None:
    """Plain texts of exactly that many tokens of the v3 tokenizer, one random digit per token."""
    tokenizer = Tokenizer.from_version("v3")
    generator = torch.Generator().manual_seed(1)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            digits = "".join(map(str, torch.randint(0, 10, (tokens,), generator=generator).tolist()))
            while len(tokenizer.encode(digits, bos=True, eos=True)) > tokens:
                digits = digits[:-1]
            file.write(json.dumps({"text": digits}) + "\n")


def answers(settings: dict[str, Any]) -> Iterator[list[dict[str, list[int]]]]:
    """Steps of documents as ours takes them: ``input_ids``, and ``assistant_masks`` of what is learnt."""
    start = load_start(Path(settings["base"]), dtype="float32", full=False)
    kept = read_texts(Path(settings["data"]), start, max_tokens=settings["length"]).kept
    for numbers in _numbers(len(kept), settings):
        yield [
            {"input_ids": kept[n].ids.tolist(), "assistant_masks": kept[n].trained.astype(int).tolist()}
            for n in numbers
        ]


def pairs(settings: dict[str, Any]) -> Iterator[list[dict[str, list[int]]]]:
    """Steps of pairs as ours takes them: ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``."""
    start = load_start(Path(settings["base"]), dtype="float32", full=False)
    kept = read_pairs(Path(settings["data"]), start, max_tokens=settings["length"]).kept
    for numbers in _numbers(len(kept), settings):
        found = []
        for n in numbers:
            pair = kept[n]
            begin = int(pair.chosen.trained.argmax())
            chosen, rejected = pair.chosen.ids.tolist(), pair.rejected.ids.tolist()
            found.append({"prompt_ids": chosen[:begin], "chosen_ids": chosen[begin:], "rejected_ids": rejected[begin:]})
        yield found


def _numbers(count: int, settings: dict[str, Any]) -> Iterator[list[int]]:
    for step in range(settings["all_steps"]):
        yield [int(n) for n in of_step(settings["seed"], step, count, settings["documents"])]


def _talks(count: int) -> Iterator[Any]:
    found = (document(1, "train", number) for number in range(10**6))
    chosen = (item for item in found if item.messages)
    return (item for item, _ in zip(chosen, range(count), strict=False))
