"""Integer checkpoints with Hugging Face's names for each expert: GPTQ, AWQ, compressed-tensors.

A matrix ``X.weight`` [O, I] is made of several tensors, which are joined into one entry here, by their shapes::

    GPTQ                X.qweight I32 [I * bits / 32, O], X.qzeros I32 [G, O * bits / 32], X.scales [G, O], X.g_idx [I]
    AWQ (gemm)          X.qweight I32 [I, O / 8], X.qzeros I32 [G, O / 8], X.scales [G, O]
    compressed-tensors  X.weight_packed I32 [O, I * bits / 32], X.weight_scale [O, G], X.weight_shape [2],
                        X.weight_zero_point I32 [O * bits / 32, G], X.weight_g_idx [I]
      int-quantized     X.weight I8 [O, I], X.weight_scale [O, G], X.weight_zero_point I8 [O, G]

Packing: GPTQ and compressed-tensors as in ``quant/bits.py``, along the axis that is divided; AWQ puts columns 0 2 4 6 1
3 5 7 of eight into the nibbles of a word (AutoAWQ's ``gemm.py``). GPTQ stores zeros less one, except in its format
``gptq_v2``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mixtral.errors import CheckpointError
from mixtral.files.read import DTYPES, Entry, ShardReader
from mixtral.quant.bits import unpack_bits
from mixtral.quant.packed import Groups, group_label
from mixtral.quant.recode import GROUP, Kept, kept
from mixtral.weights.coding import Coding

__all__ = ["CodedEntry", "is_coded_part", "join_coded", "read_groups"]

Kind = Literal["gptq", "awq", "packed", "int8"]

_PARTS: Mapping[Kind, tuple[str, ...]] = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx", "bias"),
    "awq": ("qweight", "qzeros", "scales", "bias"),
    "packed": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "input_scale"),
    "int8": ("weight", "weight_scale", "weight_zero_point", "input_scale"),
}
_FLOATS = ("F16", "BF16", "F32")
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble of a word that holds column i of eight


@dataclass(frozen=True, slots=True)
class CodedEntry(Entry):
    """A matrix that several tensors make up. ``dtype`` is the label of its format; the bytes are those of the codes."""

    kind: Kind
    bits: int
    coding: Coding
    parts: Mapping[str, Entry]

    @property
    def blocks(self) -> str | None:
        """The GGML format that holds the same values, as far as the headers tell; None if there is none."""
        scales = self.parts.get("scales") or self.parts["weight_scale"]
        plain = kept(self.dtype, self.bits, GROUP) == Kept(zeros=False, order=False)
        return ("Q4_0" if self.bits <= 4 else "Q8_0") if plain and scales.dtype == "F16" else None


def is_coded_part(name: str) -> bool:
    """Whether a tensor of this name belongs to an integer matrix."""
    return name.endswith((".qweight", ".weight_packed", ".weight_scale"))


def join_coded(entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]], coding: Coding) -> dict[str, Entry]:
    """The entries with the parts of every integer matrix joined. ``shapes`` are those that the config asks for.

    Raises:
        CheckpointError: a part is missing, or has a shape or dtype that no integer matrix of that size has.
    """
    left = dict(entries)
    joined: dict[str, Entry] = {}
    for name, shape in shapes.items():
        stem = name.removesuffix(".weight")
        kind = _kind(stem, shape, entries)
        if kind is None:
            continue
        parts = {part: left.pop(f"{stem}.{part}") for part in _PARTS[kind] if f"{stem}.{part}" in left}
        joined[name] = _joined(name, (shape[0], shape[1]), kind, parts, coding)
    return {**left, **joined}


def _kind(stem: str, shape: tuple[int, ...], entries: Mapping[str, Entry]) -> Kind | None:
    main = entries.get(f"{stem}.qweight")
    if main is not None:
        # Both have O columns or O / 8 of them, and are told apart by that.
        return "gptq" if main.shape[1:] == shape[:1] else "awq"
    if f"{stem}.weight_packed" in entries:
        return "packed"
    weight = entries.get(f"{stem}.weight")
    return "int8" if weight is not None and weight.dtype == "I8" else None


def _joined(name: str, shape: tuple[int, int], kind: Kind, parts: Mapping[str, Entry], coding: Coding) -> CodedEntry:
    rows, columns = shape
    main = parts[_PARTS[kind][0]]
    scales = parts.get("scales" if kind in ("gptq", "awq") else "weight_scale")
    if scales is None:
        raise CheckpointError(f"{name!r}: {main.name!r} has no scales beside it")
    values = main.shape[0] * main.shape[-1] * (32 if main.dtype == "I32" else 8)
    bits = values // (rows * columns) if len(main.shape) == 2 and values % (rows * columns) == 0 else 0
    whole = columns * bits % 32 == 0 and (kind not in ("gptq", "awq") or rows * bits % 32 == 0)
    if bits not in coding.bits or not whole:
        raise CheckpointError(
            f"{main.name!r} is {main.dtype} {list(main.shape)}, which is no [{rows}, {columns}] matrix of "
            f"{' or '.join(map(str, coding.bits))} bits"
        )
    groups = _groups(scales, rows, columns, across=kind in ("gptq", "awq"))
    expected = _expected(kind, rows, columns, bits, groups)
    for part, entry in parts.items():
        dtypes, size = expected[part]
        if entry.dtype not in dtypes or (entry.shape != size and part not in ("scales", "weight_scale", "input_scale")):
            raise CheckpointError(
                f"{entry.name!r} is {entry.dtype} {list(entry.shape)}; expected {' or '.join(dtypes)} {list(size)}"
            )
    absent = [part for part in ("qzeros", "weight_shape") if part in expected and part not in parts]
    if absent:
        raise CheckpointError(f"{name!r}: {main.name!r} has no {absent[0]} beside it")
    zeros = not coding.symmetric if "qzeros" in parts else "weight_zero_point" in parts
    order = coding.ordered and bool({"g_idx", "weight_g_idx"} & parts.keys())
    label = group_label(bits, columns // groups, zeros=zeros, order=order)
    return CodedEntry(name, main.shard, label, shape, main.start, main.stop, kind, bits, coding, parts)


def _groups(scales: Entry, rows: int, columns: int, *, across: bool) -> int:
    """How many groups the columns are divided into; ``across`` where scales are [G, O]."""
    shape = scales.shape
    if not across and shape in ((), (1,), (rows,)):  # one scale for the matrix or for each row
        return 1
    fits = (len(shape) == 2 and shape[1 if across else 0] == rows) or (not across and shape == (1, 1))
    count = shape[0 if across else 1] if fits else 0
    if not count or columns % count:
        raise CheckpointError(f"{scales.name!r} is {list(shape)}, which divides no [{rows}, {columns}] matrix")
    return count


def _expected(
    kind: Kind, rows: int, columns: int, bits: int, groups: int
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Part -> dtypes and shape that it can have."""
    words = -(-rows * bits // 32)
    if kind in ("gptq", "awq"):
        main = (columns * bits // 32, rows) if kind == "gptq" else (columns, words)
        return {
            "qweight": (("I32",), main),
            "qzeros": (("I32",), (groups, words)),
            "scales": (_FLOATS, (groups, rows)),
            "g_idx": (("I32",), (columns,)),
            "bias": (_FLOATS, (rows,)),
        }
    if kind == "packed":
        return {
            "weight_packed": (("I32",), (rows, columns * bits // 32)),
            "weight_scale": (_FLOATS, (rows, groups)),
            "weight_shape": (("I64", "I32"), (2,)),
            "weight_zero_point": (("I32",), (words, groups)),
            "weight_g_idx": (("I32",), (columns,)),
            "input_scale": (_FLOATS, (1,)),
        }
    return {
        "weight": (("I8",), (rows, columns)),
        "weight_scale": (_FLOATS, (rows, groups)),
        "weight_zero_point": (("I8",), (rows, groups)),
        "input_scale": (_FLOATS, (1,)),
    }


def read_groups(reader: ShardReader, entry: CodedEntry) -> Groups:
    """Read a matrix as it is packed in memory: the same codes, scales and zeros.

    Raises:
        CheckpointError: what the parts hold does not fit together, a bias is not zero, or a scale is not finite.
    """
    parts = {name: _tensor(reader, part) for name, part in entry.parts.items() if name != "input_scale"}
    rows, columns = entry.shape
    if "bias" in parts and bool(parts["bias"].any()):
        raise CheckpointError(f"{entry.parts['bias'].name!r} is not zero; a Mixtral has no biases")
    said = parts.get("weight_shape")
    if said is not None and said.tolist() != [rows, columns]:
        raise CheckpointError(f"{entry.parts['weight_shape'].name!r} says {said.tolist()}, not {[rows, columns]}")
    try:
        return _READERS[entry.kind](parts, entry)
    except CheckpointError as error:
        raise CheckpointError(f"{entry.name!r}: {error}") from None


def _tensor(reader: ShardReader, part: Entry) -> Tensor:
    found = torch.empty(part.shape, dtype=DTYPES[part.dtype])
    reader.read(part, found)
    return found


def _gptq(parts: Mapping[str, Tensor], entry: CodedEntry) -> Groups:
    zeros = unpack_bits(_bytes(parts["qzeros"] + _zero_offset(entry, parts["qzeros"])), entry.bits).t()
    if entry.coding.stored_zeros == "less one" and entry.bits == 3:
        zeros = (zeros + 1) & 7
    if entry.coding.symmetric and bool((zeros != 1 << (entry.bits - 1)).any()):
        raise CheckpointError("its zeros are not those of the symmetric format that its config promises")
    codes = _bytes(parts["qweight"].t())
    return Groups(entry.bits, codes, parts["scales"].t(), zeros=zeros.contiguous(), order=parts.get("g_idx"))


def _zero_offset(entry: CodedEntry, words: Tensor) -> Tensor:
    """What makes the stored words the zeros: one in every field, added with carries as the writers subtract it."""
    offset = 0
    if entry.coding.stored_zeros == "less one" and entry.bits != 3:
        offset = sum(1 << place for place in range(0, 32, entry.bits))
    if entry.coding.stored_zeros == "less a pattern":
        # GPTQModel subtracts these words from those of its 3-bit files, though they are no ones in every field.
        fields = [0x24924924, 0x92492492 - (1 << 32), 0x49249249]
        return torch.tensor(fields, dtype=torch.int32).repeat(words.shape[1] // 3)
    return torch.tensor(offset, dtype=torch.int32)


def _awq(parts: Mapping[str, Tensor], entry: CodedEntry) -> Groups:
    nibbles = _awq_columns(parts["qweight"]).t()
    codes = (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).contiguous()
    return Groups(4, codes, parts["scales"].t(), zeros=_awq_columns(parts["qzeros"]).t().contiguous())


def _awq_columns(words: Tensor) -> Tensor:
    """int32 [N, O / 8] as nibbles in the order of the columns: uint8 [N, O]."""
    nibbles = unpack_bits(_bytes(words), 4).view(len(words), -1, 8)
    return nibbles[..., list(_AWQ_PLACES)].flatten(-2)


def _packed(parts: Mapping[str, Tensor], entry: CodedEntry) -> Groups:
    zeros = parts.get("weight_zero_point")
    if zeros is not None:
        rows = _bytes(zeros.t())
        padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % entry.bits))
        zeros = unpack_bits(padded, entry.bits)[:, : entry.shape[0]].t().contiguous()
    codes = _bytes(parts["weight_packed"])
    return Groups(entry.bits, codes, _per_row(parts, entry), zeros=zeros, order=parts.get("weight_g_idx"))


def _int8(parts: Mapping[str, Tensor], entry: CodedEntry) -> Groups:
    zeros = parts.get("weight_zero_point")
    # Signed numbers with their highest bit turned over are the same numbers plus 128.
    shifted = None if zeros is None else zeros.view(torch.uint8) ^ 128
    return Groups(8, parts["weight"].view(torch.uint8) ^ 128, _per_row(parts, entry), zeros=shifted)


def _per_row(parts: Mapping[str, Tensor], entry: CodedEntry) -> Tensor:
    """The scales as [O, G], also where the file has one for a row or for the whole matrix."""
    scales = parts["weight_scale"]
    return (
        scales
        if scales.dim() == 2 and len(scales) == entry.shape[0]
        else scales.reshape(-1, 1).expand(entry.shape[0], 1)
    )


def _bytes(words: Tensor) -> Tensor:
    return words.contiguous().view(torch.uint8)


_READERS = {"gptq": _gptq, "awq": _awq, "packed": _packed, "int8": _int8}
