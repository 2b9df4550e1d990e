"""The ranks of a training run: joining them, who sits where, and the sums that the training loop itself asks for."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mixtral.errors import ConfigError, TrainingError
from mixtral.parallel.plan import Axes, Place

__all__ = ["STORE", "Mesh", "alone", "in_a_launch", "join", "over", "rank_variables"]

STORE = "MIXTRAL_STORE"
"""Launcher variable: the file in a private folder through which the ranks of one machine find each other."""


# How gloo's errors, which have no class of their own, can be told from others.
_GLOO = ("gloo", "pair closure", "Connection closed", "Connection reset")


@dataclass(frozen=True, slots=True)
class Mesh:
    """All ranks, as one of them sees them. ``alone()`` is a mesh of one, without processes behind it."""

    axes: Axes
    rank: int
    device: torch.device
    devices: Mapping[str, DeviceMesh]

    @property
    def place(self) -> Place:
        """Where this rank sits."""
        return self.axes.place(self.rank)

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes the log and the commits."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there are no other ranks."""
        return not self.devices

    def submesh(self, axis: str) -> DeviceMesh:
        """The ranks along ``dp``, ``tp``, ``ep`` or ``rest`` through this one, as torch's sharding wants them."""
        if self.is_alone:
            raise TrainingError(f"there is no axis {axis}: this process was not started together with others")
        return self.devices[axis]

    def group(self, axis: str) -> dist.ProcessGroup:
        """The same ranks, as collectives want them."""
        return self.submesh(axis).get_group()

    def sum(self, values: Tensor, axis: str | None = None) -> Tensor:
        """The sum over the ranks of an axis, or over all, on the device that ``values`` are on. They are changed."""
        if self.is_alone:
            return values
        there = values.to(self.device)
        dist.all_reduce(there, group=None if axis is None else self.group(axis))
        return there.to(values.device)

    def gather(self, values: Tensor) -> list[Tensor]:
        """What all ranks have, in their order; all have the same shape and dtype."""
        if self.is_alone:
            return [values]
        there = values.to(self.device)
        parts = [torch.empty_like(there) for _ in range(self.axes.world)]
        dist.all_gather(parts, there)
        return [part.to(values.device) for part in parts]

    def most(self, number: int) -> int:
        """The largest number that any rank has."""
        return max(int(value) for value in self.gather(torch.tensor([number])))

    def any(self, flag: bool) -> bool:
        """Whether any rank says so: what one decides, all do, since nobody can go on alone."""
        return bool(self.sum(torch.tensor([int(flag)])).item())


def alone(device: torch.device | str = "cpu") -> Mesh:
    """A mesh of one rank."""
    return Mesh(Axes(), 0, torch.device(device), {})


def in_a_launch() -> bool:
    """Whether a launcher (torchrun, or ``parallel.launch``) started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank_variables(rank: int, world: int, store: Path) -> dict[str, str]:
    """The environment of one of the ranks of this machine, as a launcher hands it over."""
    return os.environ | {
        "RANK": f"{rank}",
        "LOCAL_RANK": f"{rank}",
        "WORLD_SIZE": f"{world}",
        "LOCAL_WORLD_SIZE": f"{world}",
        STORE: f"{store}",
    }


@contextmanager
def join(axes: Axes, *, device: str | None = None, timeout_s: float = 600.0) -> Iterator[Mesh]:
    """Meet the other ranks; leave them at the end. NCCL on accelerators, gloo on the CPU.

    A collective that waits longer than ``timeout_s`` for another rank raises. Ranks that are all on this machine talk
    through the loopback interface alone.

    Raises:
        ConfigError: a launcher variable is missing, or it started another number of processes than the axes need.
        TrainingError: the ranks cannot meet, or lost each other on the way.
    """
    rank, world, local = (_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if world != axes.world:
        raise ConfigError(
            f"dp={axes.dp} times tp={axes.tp} needs {axes.world} processes; {world} were started", param="parallel"
        )
    own = _device(device, local)
    if world == _number("LOCAL_WORLD_SIZE"):
        _stay_inside(os.environ)
    try:
        dist.init_process_group(
            dist.get_default_backend_for_device(own),
            timeout=timedelta(seconds=timeout_s),
            device_id=None if own.type == "cpu" else own,
            **_meeting_point(rank, world),
        )
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"rank {rank} of {world} cannot meet the others: {error}") from None
    try:
        yield over(axes, rank, own)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(word in str(error) for word in _GLOO):
            raise
        raise TrainingError(
            f"rank {rank} of {world} lost another rank, or waited for it longer than {timeout_s:.0f} s; "
            f"start again from the last state ({str(error).splitlines()[0]})"
        ) from None
    # Not after an error: the others may be waiting in the middle of a collective, and the end of the process ends that.
    dist.destroy_process_group()


def over(axes: Axes, rank: int, device: torch.device) -> Mesh:
    """A mesh over the processes that have met already, with other axes than the first one, say."""
    devices = init_device_mesh(device.type, (axes.rest, axes.ep, axes.tp), mesh_dim_names=("rest", "ep", "tp"))
    found = {name: devices[name] for name in ("rest", "ep", "tp")} | {"dp": devices["rest", "ep"]._flatten("dp")}
    return Mesh(axes, rank, device, found)


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise ConfigError(
            f"the launcher variable {name} is {value!r}; expected a number. Start with "
            "torchrun --nproc-per-node N -m mixtral train ..., or without a launcher",
            param="parallel",
        )
    return int(value)


def _device(name: str | None, local: int) -> torch.device:
    if name is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        name = "cpu" if accelerator is None else accelerator.type
    if name == "cpu":
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    if local >= count:
        raise ConfigError(f"process {local} of this machine has no device: there are {count}", param="parallel")
    own = torch.device(name, local)
    torch.accelerator.set_device_index(local)
    return own


def _stay_inside(environment: MutableMapping[str, str]) -> None:
    """Make gloo and NCCL use the loopback interface, unless the user chose one."""
    inside = [name for _, name in socket.if_nameindex() if name in {"lo", "lo0"}]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if inside:
            environment.setdefault(variable, inside[0])


def _meeting_point(rank: int, world: int) -> dict[str, Any]:
    path = os.environ.get(STORE)
    if path is None:
        return {"init_method": "env://"}
    folder = Path(path).parent
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(f"{folder}: must be this user's own and closed to others (mode 0700)", param="parallel")
    return {"init_method": f"file://{path}", "rank": rank, "world_size": world}
