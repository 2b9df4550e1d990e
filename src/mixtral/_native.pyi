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
def read_speed(memory: npt.NDArray[np.uint8], threads: int, seconds: float, level: str = "") -> float: ...
def peak_speed(kind: str, threads: int, seconds: float, level: str = "") -> float | None: ...
def kernel_levels() -> list[str]: ...
def panel_bytes(kind: int, rows: int, columns: int, group: int) -> int: ...
def decode_groups(
    codes: npt.NDArray[np.uint8],
    bits: int,
    scales: npt.NDArray[np.float32],
    zeros: npt.NDArray[np.uint8] | None,
    out: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    threads: int,
    level: str = "",
) -> None: ...
def block_bytes(head_size: int, kind: int) -> int: ...

class Matrix: ...

class DenseMatrix(Matrix):
    def __init__(self, kind: int, rows: int, columns: int, data: npt.NDArray[np.uint8]) -> None: ...

class PackedMatrix(Matrix):
    def __init__(self, kind: int, rows: int, columns: int, group: int, data: npt.NDArray[np.uint8]) -> None: ...
    def pack_blocks(self, blocks: npt.NDArray[np.uint8], threads: int) -> bool: ...
    def unpack_blocks(self, blocks: npt.NDArray[np.uint8], threads: int) -> None: ...
    def pack_groups(
        self,
        codes: npt.NDArray[np.uint8],
        bits: int,
        scales: npt.NDArray[np.uint16],
        zeros: npt.NDArray[np.uint8] | None,
        threads: int,
    ) -> None: ...
    def unpack_groups(
        self,
        codes: npt.NDArray[np.uint8],
        scales: npt.NDArray[np.uint16],
        zeros: npt.NDArray[np.uint8],
        threads: int,
    ) -> None: ...

class ExpertSet:
    def __init__(self, gate: list[Matrix], up: list[Matrix], down: list[Matrix]) -> None: ...

class Spans:
    def __init__(self, spans: list[tuple[list[int], int, int]]) -> None: ...

def project(
    x: npt.NDArray[np.float32],
    matrices: list[Matrix],
    out: npt.NDArray[np.float32],
    threads: int,
    norm: npt.NDArray[np.float32] | None = None,
    eps: float = 0.0,
    residual: npt.NDArray[np.float32] | None = None,
    level: str = "",
) -> None: ...
def experts(
    x: npt.NDArray[np.float32],
    picks: npt.NDArray[np.int64],
    shares: npt.NDArray[np.float32],
    weights: ExpertSet,
    out: npt.NDArray[np.float32],
    threads: int,
    level: str = "",
) -> None: ...
def mixture(
    x: npt.NDArray[np.float32],
    router: npt.NDArray[np.float32],
    weights: ExpertSet,
    out: npt.NDArray[np.float32],
    logits: npt.NDArray[np.float32],
    picks: npt.NDArray[np.int64],
    shares: npt.NDArray[np.float32],
    threads: int,
    norm: npt.NDArray[np.float32] | None = None,
    eps: float = 0.0,
    residual: npt.NDArray[np.float32] | None = None,
    level: str = "",
) -> None: ...
def attend(
    qkv: npt.NDArray[np.float32],
    cosines: npt.NDArray[np.float32],
    sines: npt.NDArray[np.float32],
    spans: Spans,
    store: npt.NDArray[np.uint8],
    out: npt.NDArray[np.float32],
    head_size: int,
    kind: int,
    threads: int,
    level: str = "",
) -> None: ...
def norm(
    x: npt.NDArray[np.float32],
    weight: npt.NDArray[np.float32],
    eps: float,
    out: npt.NDArray[np.float32],
    level: str = "",
) -> None: ...
