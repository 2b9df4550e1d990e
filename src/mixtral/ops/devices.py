"""Where a model computes: devices by name, and the CPU threads of this process."""

from __future__ import annotations

import torch

from mixtral.errors import ConfigError
from mixtral.ops.cores import usable_cores

__all__ = ["device_of", "use_threads"]


def device_of(device: str | torch.device) -> torch.device:
    """The device of that name. Raises ConfigError for one that this machine lacks."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device is {device!r}; expected cpu, or what torch calls a GPU", param="device") from None
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    known = {"cpu", *([accelerator.type] if accelerator else [])}
    if found.type not in known or (found.index or 0) >= _count(found):
        raise ConfigError(f"device is {device!r}, which this machine lacks; it has {', '.join(known)}", param="device")
    return found


def _count(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.accelerator.device_count()


def use_threads(threads: int | None) -> None:
    """Let torch use that many; None: the physical cores that it may use, or fewer if it was told so.

    Raises:
        ConfigError: the number is out of range.
    """
    if threads is not None and not 1 <= threads <= 1024:
        raise ConfigError(f"threads is {threads!r}; expected 1 to 1024", param="threads")
    # Torch knows no quotas and may take two CPUs of one core for two; a number below that was somebody's choice.
    chosen = threads or min(torch.get_num_threads(), usable_cores())
    if chosen != torch.get_num_threads():
        torch.set_num_threads(chosen)
