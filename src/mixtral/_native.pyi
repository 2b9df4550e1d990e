# What the compiled module offers; built from native/, called through mixtral.quant.native.

import numpy as np
import numpy.typing as npt

def levels() -> list[str]: ...
def encode(
    name: str,
    values: npt.NDArray[np.float32],
    importance: npt.NDArray[np.float32] | None,
    out: npt.NDArray[np.uint8],
    threads: int,
    level: str = "",
) -> tuple[int, int, int]: ...
def encode_groups(
    values: npt.NDArray[np.float32],
    bits: int,
    group: int,
    importance: npt.NDArray[np.float32] | None,
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.uint16],
    threads: int,
    level: str = "",
) -> tuple[int, int, int]: ...
