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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

WAIT_S = 60.0
Meshes = dict[str, Any]


class Ranks:
    """``ranks("jobs:name", axes, ...)`` calls ``name(mesh, ...)`` on every rank and gives the list of results."""

    def __init__(self, world: int, folder: Path) -> None:
        self.world = world
        start = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world):
            ours, theirs = start.Pipe()
            process = start.Process(target=_serve, args=(theirs, rank, world, str(folder / "store")), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self, job: str, axes: str, *arguments: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((job, axes, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(WAIT_S):
                raise TimeoutError(f"rank {rank} does not answer")
            answers.append(pipe.recv())
        for rank, (fine, value) in enumerate(answers):
            if not fine:
                raise AssertionError(f"rank {rank}: {value}")
        return [value for _, value in answers]

    def end(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
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
