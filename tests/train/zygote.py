"""Runs ``mixtral train pretrain`` again and again in forks of one warm process; each may be killed while it saves.

``test_kills.py`` starts it as ``python zygote.py FAULT`` and writes a line for every run: the operation on files of
states at which the run kills itself (0: none), then the words of the command, as a JSON list. It answers with the
process id at once, and with the exit status when the process is gone.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from mixtral.cli import main
from mixtral.train import checkpoint
from mixtral.train.optim import Optimizer

# What touches a file, as the interpreter reports it.
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree")

FILES = ("step-", "state.", "COMMIT", "record.json")


def kill_at(number: int) -> None:
    """End this process by SIGKILL when it comes to that operation on a file of a state, counted from its first save."""
    seen = 0
    saving = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen, saving
        if event not in OPERATIONS:
            return
        saving = saving or (event == "os.mkdir" and ".tmp" in str(arguments[0]))
        if saving and any(word in str(arguments[0]) for word in FILES):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def plant(fault: str) -> None:
    """Make saving or reading wrong, so that the check has something to find."""
    if fault == "name first":  # a state gets its name before it is complete
        commit = checkpoint._commit

        def early(temporary: Path, final: Path, *rest: Any) -> None:
            temporary.replace(final)
            commit(final, final.with_name("unused.tmp"), *rest)
            final.with_name("unused.tmp").replace(final)

        checkpoint._commit = early
    elif fault == "moments lost":
        load = Optimizer.load

        def forget(self: Optimizer, state: dict[str, torch.Tensor]) -> None:
            load(self, {name: value * 0 if name.startswith("first.") else value for name, value in state.items()})

        Optimizer.load = forget
    elif fault != "none":
        raise SystemExit(f"there is no fault {fault!r}")


def serve() -> None:
    """A fork for every line."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        number, words = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdin = io.StringIO()
            if number:
                kill_at(number)
            os._exit(main(words))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    plant(sys.argv[1])
    serve()
