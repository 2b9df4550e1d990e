"""A side for tests, started as ``python fake_side.py NAME [LOG] [FAULT]``: answers at once with times it makes up.

It writes its name and each request to LOG. FAULT is what goes wrong: at-start, missing, no-ready, dies, killed,
garbage, list, hangs, endless, error, spins, or a list of times, which it gives as it is.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def say(value: Any) -> None:
    sys.stdout.write((value if isinstance(value, str) else json.dumps(value)) + "\n")
    sys.stdout.flush()


def go_wrong(fault: str) -> None:
    """What the faults during a run do."""
    if fault == "dies":
        sys.exit("something is broken\n\n")
    elif fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "hangs":
        time.sleep(60)
    elif fault == "endless":
        while True:
            sys.stdout.write("x" * (1 << 20))
    elif fault == "error":
        say({"error": "ValueError: too many tokens"})
    else:
        say("llama_context: n_ctx = 512" if fault == "garbage" else [1, 2])


def main(name: str, log: str = os.devnull, fault: str = "") -> None:
    if fault == "at-start":
        sys.exit("no libraries here")
    settings = json.loads(sys.stdin.readline())
    if fault == "missing":
        say({"missing": "No module named 'llama_cpp'"})
        return
    say({} if fault == "no-ready" else {"ready": {name: "1.0", "threads": settings.get("threads")}})
    steps = 0
    for line in sys.stdin:
        request = json.loads(line)
        with Path(log).open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, request]) + "\n")
        if request["do"] == "prepare":
            steps = request["work"]["steps"]
            say({})
        elif fault.startswith("["):
            say({"seconds": json.loads(fault)})
        elif fault and fault != "spins":
            go_wrong(fault)
        else:
            rows = [[7 + step] * len(request["prompts"] or [[]]) for step in range(steps)]
            say({"seconds": [0.25] * (steps or 1), "fed": rows, "experts": [2.0, 3.0]})
        while fault == "spins" and request["do"] == "run":
            pass


if __name__ == "__main__":
    main(*sys.argv[1:])
