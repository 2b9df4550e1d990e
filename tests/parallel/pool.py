"""Processes that stay up between tests, joined as the ranks of a run: starting them costs more than most checks."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

WAIT_S = 40.0
Meshes = dict[str, Any]


class Ranks:
    """``ranks("jobs:name", axes, ...)`` calls ``name(mesh, ...)`` on every rank and gives the list of results."""

    def __init__(self, world: int, folder: Path) -> None:
        self.world, self._folder = world, folder
        self._start()

    def _start(self) -> None:
        start = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        (self._folder / "store").unlink(missing_ok=True)
        for rank in range(self.world):
            ours, theirs = start.Pipe()
            arguments = (theirs, rank, self.world, str(self._folder / "store"))
            process = start.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self, job: str, axes: str, *arguments: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((job, axes, arguments))
        answers: dict[int, tuple[bool, Any]] = {}
        patience = WAIT_S
        while len(answers) < self.world:
            waiting = [rank for rank in range(self.world) if rank not in answers]
            ready = wait([self._pipes[rank] for rank in waiting], patience)
            if not ready:
                break
            for rank in waiting:
                if self._pipes[rank] in ready:
                    try:
                        answers[rank] = self._pipes[rank].recv()
                    except (EOFError, OSError):
                        answers[rank] = (False, "died")
                    patience = WAIT_S if answers[rank][0] else 1.0  # the others wait for the one that failed
        wrong = [f"rank {rank}: {value}" for rank, (fine, value) in answers.items() if not fine]
        if wrong or len(answers) < self.world:
            self.end(at_once=True)
            self._start()
            raise AssertionError("\n".join(wrong) or f"only ranks {sorted(answers)} answered")
        return [answers[rank][1] for rank in range(self.world)]

    def end(self, *, at_once: bool = False) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(0 if at_once else 5)
            if process.is_alive():
                process.kill()
                process.join()


@contextmanager
def started(world: int) -> Iterator[Ranks]:
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(world, Path(folder))
        try:
            yield ranks
        finally:
            ranks.end()


def _serve(pipe: Connection, rank: int, world: int, store: str) -> None:
    import torch

    from mixtral.parallel import mesh as meshes
    from mixtral.parallel.plan import Axes

    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), meshes.STORE: store}
    with meshes.join(Axes(dp=world), device="cpu", timeout_s=WAIT_S / 2) as joined:
        found: Meshes = {f"dp={world}": joined}
        while True:
            try:
                job, axes, arguments = pipe.recv()
            except (EOFError, ConnectionError):
                return
            try:
                module, name = job.split(":")
                if axes not in found:
                    found[axes] = meshes.over(Axes.parse(axes), rank, joined.device)
                pipe.send((True, getattr(importlib.import_module(module), name)(found[axes], *arguments)))
            except BaseException:
                pipe.send((False, traceback.format_exc()))
