"""What is unusual about a checkpoint that can be read: told from its headers, its config and the names beside it."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixtral.config import PRESETS, MixtralConfig
from mixtral.errors import CheckpointError
from mixtral.files.gguf import ALIGNMENT_KEY, DEFAULT_ALIGNMENT
from mixtral.files.read import DTYPES
from mixtral.files.safetensors import INDEX_NAME, SINGLE_NAME, inside, read_json
from mixtral.quant.formats import FORMATS
from mixtral.quant.mixes import MIXES
from mixtral.weights.checkpoint import Checkpoint, read_any_config
from mixtral.weights.consolidated import STEM, pickled_files
from mixtral.weights.names import Piece, is_router, layer_of
from mixtral.weights.upgrade import VOCABULARIES

__all__ = ["config_oddities", "oddities"]

_PUBLISHED = ("8x7b", "8x22b")
_MUST_FIT = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")
_GUESSED = 1024  # llama.cpp adds it to a file type that it guessed
# Keys that other programs act on and this package does not, with the values that change nothing.
_UNREAD: Mapping[str, tuple[Any, ...]] = {
    "llama.attention.sliding_window": (0,),
    "llama.rope.scale_linear": (1.0,),
    "llama.rope.scaling.factor": (0.0, 1.0),
    "llama.rope.scaling.type": ("", "none"),
}
_TOKENIZER = "tokenizer.json"
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "lora.safetensors")
_LEFT = re.compile(r"\..+\.(partial|replaced\d+)")
_FULL_PRECISION = ("F32", "F16", "BF16")


def oddities(found: Checkpoint) -> list[str]:
    """One sentence for everything that other Mixtral checkpoints do not have, the config first; usually empty.

    Reads headers, the config, the index and the list of the folder; no value of a tensor.
    """
    kind = _gguf if found.metadata else _folder
    return [*config_oddities(found.path, found.config), *_formats(found), *kind(found), *_beside(found)]


def config_oddities(path: Path, config: MixtralConfig) -> list[str]:
    """The same for the config alone; ``path`` is where it came from."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        read_any_config(path)
    notes = list(dict.fromkeys(str(each.message) for each in told))
    experts = (config.num_local_experts, config.num_experts_per_tok)
    if experts != (8, 2):
        notes.append(f"{experts[0]} experts, of which {experts[1]} see a token; every published Mixtral has 8 and 2")
    if config.vocab_size not in VOCABULARIES.values():
        sizes = " nor ".join(f"{size:,} ({name})" for name, size in VOCABULARIES.items())
        notes.append(f"a vocabulary of {config.vocab_size:,} entries is neither {sizes}: only token ids can be used")
    for name in _PUBLISHED:
        known = PRESETS[name]
        if (config.hidden_size, config.num_hidden_layers) != (known.hidden_size, known.num_hidden_layers):
            continue
        got, expected = config.max_position_embeddings, known.max_position_embeddings
        if got != expected and not any("context" in note for note in notes):
            notes.append(f"a context of {got:,} tokens; Mixtral {name} was trained for {expected:,}")
        notes += [
            f"{field} is {getattr(config, field)}; Mixtral {name} has {getattr(known, field)}"
            for field in _MUST_FIT
            if getattr(config, field) != getattr(known, field)
        ]
    return notes


def _formats(found: Checkpoint) -> Iterator[str]:
    """Formats that differ where they should not. In GGUF files those of matrices differ by design."""
    pieces: dict[str, list[Piece]] = {"matrices": [], "routers": [], "norms": []}
    for piece in found.plan:
        role = "routers" if is_router(piece.parameter) else "matrices" if len(piece.shape) > 1 else "norms"
        pieces[role].append(piece)
    used = {role: _count(found, some) for role, some in pieces.items()}
    floats = [form for form in used["matrices"] if form in _FULL_PRECISION]
    if not found.metadata and len(floats) > 1:
        yield f"matrices of several dtypes ({_listed(used['matrices'])}); loading needs a choice of one"
    usual = FORMATS.get(next((form for form, _ in used["matrices"].most_common(1)), ""))
    for role, why in (("routers", "they decide which experts are chosen"), ("norms", "they cost nearly nothing")):
        coarse = [form for form in used[role] if form not in _FULL_PRECISION]
        if coarse:
            yield f"{role} are quantised ({', '.join(coarse)}), though {why}; Mixtral files keep them in full precision"
        elif usual is not None and any(FORMATS[form].bits < usual.bits for form in used[role]):
            yield f"{role} are stored in {_listed(used[role])}, less than the matrices ({_listed(used['matrices'])})"
    yield from _experts(found, pieces["matrices"])


def _experts(found: Checkpoint, matrices: Iterable[Piece]) -> Iterator[str]:
    """C6: early files hold experts of one layer in different formats, which their writer mixed up in some of them."""
    formats: dict[tuple[str, str], set[str]] = {}
    for piece in matrices:
        if piece.expert is not None and found.metadata:
            formats.setdefault((piece.parameter, piece.half), set()).add(found.entries[piece.name].dtype)
    mixed = {key: forms for key, forms in formats.items() if len(forms) > 1}
    if mixed:
        layers = sorted({layer_of(parameter) for parameter, _ in mixed})
        forms = sorted(set().union(*mixed.values()))
        yield (
            f"experts of one layer in different formats ({', '.join(forms)}) in {len(layers)} layers, the first is "
            f"{layers[0]}: llama.cpp wrote such files in its first weeks of Mixtral, and some of them are broken"
        )


def _gguf(found: Checkpoint) -> Iterator[str]:
    # Any key may hold an array, which can be compared with nothing.
    metadata = {k: v if isinstance(v, str | int | float) else "an array" for k, v in found.metadata.items()}
    if found.layout == "gguf-split":
        yield (
            "a tensor for every expert, as before April 2024, which llama.cpp does not read any more; "
            "mixtral convert --to gguf joins them, without quantising anew where the formats agree"
        )
    if found.layout == "gguf-gate-up":
        yield (
            "gate and up in one tensor, which llama.cpp does not read for Mixtral (its architecture llama); "
            "mixtral convert --to gguf divides them"
        )
    yield from _file_type(found)
    yield from _tokens(found, metadata)
    alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if alignment != DEFAULT_ALIGNMENT:
        yield f"{ALIGNMENT_KEY} is {alignment}; nearly every file has {DEFAULT_ALIGNMENT}"
    for key, silent in _UNREAD.items():
        if key in metadata and metadata[key] not in silent:
            yield f"{key} is {metadata[key]!r:.40}, which is ignored: Mixtral has nothing of the kind"
    for key in ("llama.attention.key_length", "llama.attention.value_length"):
        if metadata.get(key, found.config.head_dim) != found.config.head_dim:
            yield f"{key} is {metadata[key]!r:.40}, but heads have {found.config.head_dim} values; it is ignored"


def _file_type(found: Checkpoint) -> Iterator[str]:
    said = found.metadata.get("general.file_type")
    if said is None:
        return
    if type(said) is not int:
        yield f"general.file_type is {said!r:.40}; expected a number"
        return
    known = {mix.file_type: (name, mix.base) for name, mix in MIXES.items()}
    name, base = known.get(said & ~_GUESSED, ("", ""))
    # Gate and up matrices: the larger part of the file, and all in the format that gives a mix its name.
    found_forms = _count(found, (piece for piece in found.plan if piece.half != "both"))
    if base and found_forms and found_forms.most_common(1)[0][0] != base:
        yield f"general.file_type is {said} ({name}), whose experts are {base}, but these are {_listed(found_forms)}"


def _tokens(found: Checkpoint, metadata: Mapping[str, Any]) -> Iterator[str]:
    tokens = found.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        yield "no tokenizer in the file; llama.cpp needs one"
        return
    for name in ("scores", "token_type"):
        values = found.metadata.get(f"tokenizer.ggml.{name}")
        count = len(values) if isinstance(values, list | np.ndarray) else 0
        if count != len(tokens):
            yield f"{len(tokens):,} tokens, but {count:,} entries in tokenizer.ggml.{name}"
    said = metadata.get("llama.vocab_size", len(tokens))
    if said != len(tokens):
        yield f"llama.vocab_size is {said!r:.40}, but there are {len(tokens):,} tokens"
    if metadata.get("tokenizer.ggml.model", "llama") != "llama":
        yield f"tokenizer.ggml.model is {metadata['tokenizer.ggml.model']!r:.40}; that of a Mixtral is 'llama'"
    if metadata.get("tokenizer.ggml.add_bos_token", True) is not True:
        yield "tokenizer.ggml.add_bos_token is off; Mixtral was trained with a BOS token before every text"
    for key, expected in (("bos", 1), ("eos", 2)):
        if (said := metadata.get(f"tokenizer.ggml.{key}_token_id", expected)) != expected:
            yield f"tokenizer.ggml.{key}_token_id is {said!r:.40}; that of a Mixtral is {expected}"


def _folder(found: Checkpoint) -> Iterator[str]:
    chosen = _families(found.path)[0][1]
    if any(name.endswith((".pth", ".pt")) for name in chosen):
        yield f"{chosen[0]} is a pickle, which can carry code; mixtral convert --unpickle writes safetensors instead"
    for name in chosen:
        if name.endswith(".index.json"):
            yield from _index(found, name)
    if found.layout in ("per-expert", "fused"):
        yield from _said_dtype(found)
    yield from _tokenizer(found)


def _index(found: Checkpoint, name: str) -> Iterator[str]:
    values = read_json(inside(found.path, name), name)
    told = values.get("metadata")
    said = told.get("total_size") if isinstance(told, dict) else None
    named = set(values["weight_map"].values())
    size = sum(_data_bytes(inside(found.path, shard)) for shard in named)
    if said != size:
        shown = f"{said:,}" if type(said) is int and abs(said) < 1 << 64 else f"{said!r:.40}"
        yield f"{name}: total_size is {shown}, but the tensors have {size:,} bytes"
    stem = name.partition(".")[0]
    strays = sorted(path.name for path in found.path.glob(f"{stem}-*.safetensors") if path.name not in named)
    if strays:
        yield f"{_few(strays)} beside the shards that {name} names; not read"


def _data_bytes(path: Path) -> int:
    """What the tensors of a safetensors file take, which was found to be all that follows its header."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_size - 8 - int.from_bytes(file.read(8), "little")


def _said_dtype(found: Checkpoint) -> Iterator[str]:
    """transformers converts to the dtype that the config says; this package keeps that of the tensors."""
    values = read_json(inside(found.path, "config.json"), "config.json")
    said = values.get("torch_dtype") or values.get("dtype")
    forms = [form for form in _count(found, found.plan) if form in _FULL_PRECISION]
    used = {str(DTYPES[form]).removeprefix("torch.") for form in forms}
    if said is not None and said not in used:
        yield f"config.json says the dtype {said!r:.40}, but the tensors are {', '.join(sorted(used))}"


def _tokenizer(found: Checkpoint) -> Iterator[str]:
    """D2: a tokenizer with other ids than the embedding makes a base model speak of control tokens."""
    if not os.path.lexists(found.path / _TOKENIZER):
        return
    try:
        values = read_json(inside(found.path, _TOKENIZER), _TOKENIZER)
    except CheckpointError as error:
        yield f"{error}; it is not needed here, but transformers will not load it"
        return
    model, added = values.get("model"), values.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = {each.get("id") for each in added if isinstance(each, dict)} if isinstance(added, list) else set()
    if isinstance(vocabulary, dict):
        ids |= set(vocabulary.values())
    count = max((number for number in ids if type(number) is int), default=-1) + 1
    if count != found.config.vocab_size:
        yield f"{_TOKENIZER} has {count:,} tokens, but the embedding {found.config.vocab_size:,} rows"


def _beside(found: Checkpoint) -> Iterator[str]:
    """Other files of the folder that somebody may take for a part of the model."""
    if not found.path.is_dir():
        return
    chosen, *others = _families(found.path)
    for what, names in others:
        yield f"the folder also has a model as {what} ({_few(names)}), which was not chosen; read is {chosen[0]}"
    adapters = sorted(name for name in _ADAPTERS if os.path.lexists(found.path / name))
    if adapters:
        yield f"{_few(adapters)}: an adapter, which is not applied"
    left = sorted(path.name for path in found.path.iterdir() if _LEFT.fullmatch(path.name))
    if left:
        yield f"{_few(left)}: left by a save that was interrupted"


def _families(folder: Path) -> list[tuple[str, list[str]]]:
    """The forms in which a folder has a model, with the names of the files; the first is the one that is read."""
    found = [
        ("Hugging Face's files", [name for name in (INDEX_NAME, SINGLE_NAME) if os.path.lexists(folder / name)]),
        (f"{STEM}.*", sorted(path.name for path in folder.glob(f"{STEM}*.safetensors*")) + pickled_files(folder)),
        ("GGUF", sorted(path.name for path in folder.glob("*.gguf"))),
        ("pytorch_model.*", sorted(path.name for path in folder.glob("pytorch_model*.bin*"))),
    ]
    return [(what, names) for what, names in found if names]


def _count(found: Checkpoint, some: Iterable[Piece]) -> Counter[str]:
    """How many tensors have which format."""
    return Counter(found.entries[name].dtype for name in {piece.name for piece in some} & found.entries.keys())


def _listed(forms: Counter[str]) -> str:
    return ", ".join(f"{count} x {form}" for form, count in forms.most_common())


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
