"""One contender of a contest; ``contest.py`` starts it. The argument is JSON: who, which contest, and its settings."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from gate import Gate


def main() -> None:
    """Train as told on standard input."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    gate = Gate()
    torch.set_num_threads(settings["threads"])
    who, contest = settings["who"], settings["contest"]
    if who.startswith("ours"):
        import ours

        (ours.pretrain if contest == "pretrain" else ours.tune)(gate, settings)
    elif who.startswith("trl"):
        import by_trl

        (by_trl.dpo if contest == "dpo" else by_trl.sft)(gate, settings)
    else:
        import loops

        (loops.pretrain if contest == "pretrain" else loops.tune)(gate, settings)


if __name__ == "__main__":
    main()
