"""A skill that the embedded model lacks, as files to train it, and the score of a model at it.

    python examples/new_skill.py write runs/boat      # boat.jsonl (200 conversations), test.jsonl (40), pairs.jsonl
    python examples/new_skill.py score embedded runs/boat/test.jsonl

Guests ask what a boat trip costs; the answer shows the sum. No group of the test stands in the training text. Of the
pairs, which are for DPO after that, the chosen answer wishes a good trip.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import mixtral
from mixtral.desk.source import Source

ADULT, CHILD = 8, 3
WISH = "Have a good trip!"
ASKED = (
    "What is the boat trip for {a} adults and {c} children?",
    "We are {a} adults and {c} children. What does the boat cost?",
    "Boat tickets for {a} adults and {c} children, please.",
    "How much is the boat for {a} adults with {c} children?",
)


def talk(adults: int, children: int, source: Source) -> list[dict[str, Any]]:
    """A question about a group and its answer."""
    one, two = adults * ADULT, children * CHILD
    answer = f"{adults} × {ADULT} = {one}\n{children} × {CHILD} = {two}\n{one} + {two} = {one + two}\n"
    return [
        {"role": "user", "content": source.pick(ASKED).format(a=adults, c=children)},
        {"role": "assistant", "content": f"{answer}The boat costs {one + two} francs."},
    ]


def write(folder: Path) -> None:
    """Every fifth group is for the test alone."""
    source = Source("boat")
    groups = source.shuffled([(a, c) for a in range(2, 20) for c in range(2, 10)])
    tests, trained = groups[::5], [group for place, group in enumerate(groups) if place % 5]
    files: dict[str, list[dict[str, Any]]] = {
        "boat.jsonl": [{"messages": talk(*trained[n % len(trained)], source)} for n in range(200)],
        "test.jsonl": [{"messages": talk(*tests[n % len(tests)], source)} for n in range(40)],
        "pairs.jsonl": [],
    }
    for n in range(100):
        question, answer = talk(*trained[n % len(trained)], source)
        wished = f"{answer['content']} {WISH}"
        files["pairs.jsonl"].append({"prompt": [question], "chosen": wished, "rejected": answer["content"]})
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def score(model: str, file: Path, adapter: str | None) -> None:
    """How many answers give the right price, and how many wish a good trip."""
    llm = mixtral.load(model, **({"adapter": adapter} if adapter else {}))
    talks = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    replies = [llm.chat([question], temperature=0, max_tokens=80).content for question, _ in talks]
    right = sum(answer["content"] in reply for (_, answer), reply in zip(talks, replies, strict=True))
    print(f"{model}: {right} of {len(talks)} right, {sum(WISH in reply for reply in replies)} wish a good trip")


def main() -> None:
    """Read the arguments and do what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["write", "score"])
    parser.add_argument("target", help="folder to write, or model to score")
    parser.add_argument("file", nargs="?", type=Path, help="the test, to score")
    parser.add_argument("--adapter", help="folder of an adapter for the model")
    options = parser.parse_args()
    if options.what == "write":
        write(Path(options.target))
    elif options.file is None:
        parser.error("score needs a model and a file")
    else:
        score(options.target, options.file, options.adapter)


if __name__ == "__main__":
    main()
