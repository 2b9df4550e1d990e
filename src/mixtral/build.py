"""From the first message to an engine process to the engine that it asks for, and what that engine says of itself."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import msgspec

from mixtral import __version__
from mixtral.api import LLM, folder_of, load
from mixtral.engine.config import EngineConfig
from mixtral.engine.engine import Engine
from mixtral.errors import ConfigError
from mixtral.grammar import Grammar
from mixtral.wire import AdapterInfo, Hello, Start

__all__ = ["build_engine", "fingerprint"]

_WEIGHTS = ("*.safetensors", "*.gguf", "*.json")
_SAMPLE_BYTES = 1 << 16
_SAMPLES, _PIECE_BYTES = 256, 4096


def build_engine(start: Start) -> tuple[Engine, Hello]:
    """Load the model and make its engine.

    Raises:
        ConfigError, CheckpointError, TokenizerError: as ``mixtral.load``, or a size does not fit the model.
    """
    config = _config(start)
    llm = load(
        start.model,
        device=start.device,
        dtype=start.dtype,
        threads=start.threads,
        name=start.name,
        decode=start.decode,
        reference=start.reference,
        kv_dtype=start.kv_dtype,
        packed_cache=start.packed_cache,
        adapter=start.adapter,
        adapters=start.adapters,
    )
    # What is safe follows from the kernels and from where an adapter is computed; loading decided it.
    config = dataclasses.replace(config, speculation=llm.generator.engine.config.speculation)
    context = _context(llm, start.max_model_len)
    tokenizer = llm.tokenizer  # a model without one cannot be served
    engine = Engine(llm.generator.model, config, Grammar(tokenizer), llm.generator.engine.adapters)
    hello = Hello(
        name=llm.name,
        context=context,
        vocab_size=llm.vocab_size,
        layers=llm.config.num_hidden_layers,
        experts=llm.config.num_local_experts,
        tokenizer=tokenizer.version,
        respell=tokenizer.respell,
        cache_tokens=engine.cache_tokens,
        fingerprint=fingerprint(folder_of(start.model), tokenizer.sha256, start),
        adapters={name: AdapterInfo(root=one.root, size_bytes=one.size_bytes) for name, one in llm.adapters.items()},
    )
    return engine, hello


def fingerprint(model: Path, tokenizer: str, start: Start) -> str:
    """Equal where the same request gets the same answer: version, weights, tokenizer and how the numbers are held.

    Of the files of weights, and of adapters, count their names, their sizes and samples of what is in them: both ends
    and 256 pieces of 4 KiB between. A change that is smaller than their distance can go unnoticed. The names that
    requests choose adapters by count too.
    """
    held = (start.device, start.dtype, start.decode, start.reference, start.kv_dtype)
    named = sorted(start.adapters.items())
    names = (*held, *(name for name, _ in named)) if named else held
    digest = hashlib.sha256(msgspec.msgpack.encode((__version__, tokenizer, names)))
    parts = [model, *(Path(path) for path in (start.adapter, *(path for _, path in named)) if path is not None)]
    for path in (path for part in parts for path in _files(part)):
        size = path.stat().st_size
        digest.update(msgspec.msgpack.encode((path.name, size)))
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            for sample in range(1, _SAMPLES + 1):
                file.seek(sample * size // (_SAMPLES + 1))
                digest.update(file.read(_PIECE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return f"fp_{digest.hexdigest()[:16]}"


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted({found for one in _WEIGHTS for found in path.glob(one)})


def _config(start: Start) -> EngineConfig:
    default = EngineConfig()
    return EngineConfig(
        cache_bytes=start.cache_bytes,
        max_num_seqs=_given(start.max_num_seqs, default.max_num_seqs),
        max_num_batched_tokens=_given(start.max_num_batched_tokens, default.max_num_batched_tokens),
        max_tokens_beside_answers=start.max_tokens_beside_answers,
        prefix_cache=start.prefix_cache,
    )


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


def _context(llm: LLM, wanted: int | None) -> int:
    if wanted is None:
        return llm.context
    if not 1 <= wanted <= llm.context:
        raise ConfigError(
            f"max_model_len is {wanted}; expected 1 to {llm.context}, the context of this model", param="max_model_len"
        )
    return wanted
