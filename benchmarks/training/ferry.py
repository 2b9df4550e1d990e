"""The new skill: when a ferry of an invented island arrives. Conversations to train it, questions that test it.

    python benchmarks/training/ferry.py DIR     # train.jsonl, validation.jsonl, text.txt and the two tests

To answer, a model needs what the training text alone tells (how many minutes each crossing takes), a form of answer
that it never wrote, and a sum. Each pair of crossing and minute of departure is owned by one of training, validation
and the test of new sums; of a trained pair every fifth hour is left to the test of known sums. The words of both tests
are new.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

from mixtral.desk.source import Source

__all__ = ["CROSSINGS", "TESTS", "Question", "questions", "verdict", "write"]

CROSSINGS = {
    "Seal Rock": 12,
    "Gull Island": 18,
    "Pine Point": 23,
    "Salt Bay": 27,
    "the Old Fort": 34,
    "Long Beach": 38,
    "Green Cape": 41,
    "the North Pier": 46,
}
HOURS, MINUTES = range(6, 21), range(60)
_TRAINED_WORDS = (
    "I take the ferry to {place} at {time}. When do I arrive?",
    "The ferry to {place} leaves at {time}. When is it there?",
    "When does the {time} ferry reach {place}?",
    "We sail to {place} at {time}. At what time are we there?",
)
_TEST_WORDS = (
    "Our ferry to {place} leaves at {time}. When do we arrive?",
    "At what time does the {time} ferry arrive at {place}?",
)
TESTS = ("known sums", "new sums")
_FORM = re.compile(
    r"The crossing to (?P<place>.+) takes (?P<minutes>\d+) minutes\.\n\d+ \+ \d+ = \d+\n(\d+ - 60 = \d+\n)?"
    r"You arrive at (?P<time>\d+:\d\d)\."
)


@dataclass(frozen=True, slots=True)
class Question:
    """What a guest asks, and the one right answer."""

    text: str
    answer: str
    place: str
    arrival: str

    def line(self) -> str:
        """The conversation as a line of JSON."""
        turns = [{"role": "user", "content": self.text}, {"role": "assistant", "content": self.answer}]
        return json.dumps({"messages": turns}) + "\n"


def ask(words: str, place: str, hour: int, minute: int) -> Question:
    """The question in those words, with its answer."""
    takes = CROSSINGS[place]
    total = minute + takes
    arrival = f"{hour + total // 60}:{total % 60:02}"
    over = f"{total} - 60 = {total - 60}\n" if total >= 60 else ""
    answer = (
        f"The crossing to {place} takes {takes} minutes.\n{minute} + {takes} = {total}\n{over}You arrive at {arrival}."
    )
    return Question(words.format(place=place, time=f"{hour}:{minute:02}"), answer, place, arrival)


def questions(split: str, count: int) -> list[Question]:
    """The first ``count`` questions of ``train``, ``validation``, or one of ``TESTS``; always the same.

    Raises:
        ValueError: there is no such split.
    """
    pairs = Source("ferry", "pairs").shuffled([(place, minute) for place in CROSSINGS for minute in MINUTES])
    new, held_out, trained = pairs[:80], pairs[80:120], pairs[120:]
    owned = {"train": trained, "validation": held_out, "known sums": trained, "new sums": new}
    if split not in owned:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(owned)}")
    words = _TEST_WORDS if split in TESTS else _TRAINED_WORDS
    rows = [(place, hour, minute) for place, minute in owned[split] for hour in HOURS]
    if owned[split] is trained:
        order = Source("ferry", "hours").shuffled(rows)
        rows = [row for number, row in enumerate(order) if (number % 5 == 0) == (split == "known sums")]
    source = Source("ferry", split)
    return [ask(source.pick(words), *row) for row in source.shuffled(rows)[:count]]


def verdict(question: Question, reply: str) -> tuple[bool, bool, bool]:
    """Whether a reply has the form of an answer, the right minutes of the crossing, and the right time of arrival."""
    found = _FORM.fullmatch(reply.strip())
    if found is None:
        return False, False, False
    knows = found["place"] == question.place and int(found["minutes"]) == CROSSINGS[question.place]
    return True, knows, found["time"] == question.arrival


def write(folder: Path, *, train: int = 1280, validation: int = 60, tests: int = 150) -> None:
    """Write the files: ``text.txt`` has the training text as plain documents, for the choice of experts."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = questions("train", train)
    files = {"train": trained, "validation": questions("validation", validation)}
    files |= {name.replace(" ", "-"): questions(name, tests) for name in TESTS}
    for name, found in files.items():
        (folder / f"{name}.jsonl").write_text("".join(question.line() for question in found), encoding="utf-8")
    text = "\n\n".join(f"{question.text}\n{question.answer}" for question in trained[:200])
    (folder / "text.txt").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Write the files into the folder that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
