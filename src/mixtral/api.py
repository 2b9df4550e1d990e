"""The Python API and composition root: ``load`` puts files, model, tokenizer and generator together into an ``LLM``."""

from __future__ import annotations

import difflib
import logging
import secrets
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch

from mixtral.adapters.named import NamedAdapter, NamedAdapters, add_adapters, check_name
from mixtral.adapters.use import use_adapter
from mixtral.compiled import compile_model
from mixtral.config import PRESETS, MixtralConfig
from mixtral.engine.config import EngineConfig
from mixtral.engine.engine import Engine
from mixtral.engine.generator import Generator as TokenGenerator
from mixtral.errors import CapacityError, CheckpointError, ConfigError, RequestError, TokenizerError
from mixtral.forms import Forms, is_single, read_stop, wrong_prompt
from mixtral.model.mixtral import Mixtral
from mixtral.ops.devices import device_of, use_threads
from mixtral.results import ChatCompletion, ChatDelta, Completion, Delta, TokenLogprob, Usage, completion_of, delta_of
from mixtral.tokenizer import TextStream, Tokenizer, ToolCall, check_pieces, encode_chat, parse_calls
from mixtral.weights import dtype_of, find_gguf, is_compact, load_compact, load_model, pieces_of, save_model
from mixtral.weights.respelling import respelling_of, write_respelling
from mixtral.wire import Constraint, SamplingParams, TokenEvent

__all__ = [
    "LLM",
    "ChatCompletion",
    "ChatDelta",
    "Completion",
    "Delta",
    "TokenLogprob",
    "Usage",
    "folder_of",
    "load",
]

_log = logging.getLogger("mixtral")
DEFAULT_MAX_TOKENS = 512
_FIELDS = frozenset(SamplingParams.__struct_fields__)

Prompt = str | Sequence[int]
"""Text, or token ids."""


class LLM:
    """A model with its tokenizer, ready to generate; also an engine for ``mixtral.server``.

    One thread at a time may use it. Streams may be open side by side; they are computed together.
    """

    def __init__(
        self,
        model: Mixtral,
        tokenizer: Tokenizer | None,
        *,
        name: str,
        engine: EngineConfig | None = None,
        adapters: NamedAdapters | None = None,
    ) -> None:
        self._forms = None if tokenizer is None else Forms(tokenizer)
        self.generator = TokenGenerator(Engine(model, engine, self._forms, adapters))
        self.adapters: Mapping[str, NamedAdapter] = {} if adapters is None else adapters.known
        self.name = name
        self._tokenizer = tokenizer

    @property
    def config(self) -> MixtralConfig:
        """The numbers of the model."""
        return self.generator.config

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.config.max_position_embeddings

    @property
    def vocab_size(self) -> int:
        """Token ids are 0 .. vocab_size - 1."""
        return self.config.vocab_size

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can be used; otherwise only token ids."""
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises TokenizerError if none fits the vocabulary."""
        if self._tokenizer is None:
            raise TokenizerError(
                f"no tokenizer fits the vocabulary of {self.vocab_size} entries (known: 32000 is v1, 32768 is v3). "
                "Use token ids instead of text"
            )
        return self._tokenizer

    @property
    def supports_tools(self) -> bool:
        """Whether the chat format has function calls (v3, not v1)."""
        return self._tokenizer is not None and self._tokenizer.version != "v1"

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        stop: Sequence[str] | None = None,
        response_format: Mapping[str, Any] | None = None,
        adapter: str | None = None,
        stream: Literal[False] = False,
        **params: Any,
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: Sequence[str] | Sequence[Sequence[int]],
        *,
        stop: Sequence[str] | None = None,
        response_format: Mapping[str, Any] | None = None,
        adapter: str | None = None,
        stream: Literal[False] = False,
        **params: Any,
    ) -> list[Completion]: ...
    @overload
    def generate(
        self,
        prompt: Prompt | Sequence[str] | Sequence[Sequence[int]],
        *,
        stop: Sequence[str] | None = None,
        response_format: Mapping[str, Any] | None = None,
        adapter: str | None = None,
        stream: Literal[True],
        **params: Any,
    ) -> Iterator[Delta]: ...
    def generate(
        self,
        prompt: Any,
        *,
        stop: Sequence[str] | None = None,
        response_format: Mapping[str, Any] | None = None,
        adapter: str | None = None,
        stream: bool = False,
        **params: Any,
    ) -> Any:
        """Continue text (BOS is put before it) or token ids (taken as they are), or a list of either as one batch.

        ``params`` are the fields of ``SamplingParams``; ``max_tokens`` is 512 or what the context leaves. A stop string
        ends the answer and is not part of its text. ``stream=True`` gives an iterator of ``Delta``; closing it stops.
        ``response_format`` is that of the server (``docs/constrained.md``): an answer that ends with "stop" has it.
        ``adapter`` is a name of ``load``'s ``adapters``; None is the base.

        Raises:
            RequestError: an option is unknown, out of range or contradicts another, or a prompt is empty.
            GrammarError: the schema, regex or grammar in ``response_format`` cannot be used.
            TokenizerError: an id is outside the vocabulary, or text is given and the model has no tokenizer.
            CapacityError: prompt and ``max_tokens`` do not fit the context.
        """
        single = is_single(prompt)
        prompts = [self._ids(each) for each in ([prompt] if single else prompt)]
        chosen, stops = self._params(prompts, params), read_stop(stop)
        constraint = None
        if response_format is not None:
            constraint = self._known_forms().of_text(response_format, chosen, stops)
        deltas = self._deltas(prompts, chosen, stops, constraint, adapter)
        if stream:
            return deltas
        gathered: list[list[Delta]] = [[] for _ in prompts]
        for delta in deltas:
            gathered[delta.sequence].append(delta)
        done = [completion_of(prompts[i], found, chosen) for i, found in enumerate(gathered)]
        return done[0] if single else done

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        response_format: Mapping[str, Any] | None = None,
        stop: Sequence[str] | None = None,
        adapter: str | None = None,
        stream: Literal[False] = False,
        **params: Any,
    ) -> ChatCompletion: ...
    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        response_format: Mapping[str, Any] | None = None,
        stop: Sequence[str] | None = None,
        adapter: str | None = None,
        stream: Literal[True],
        **params: Any,
    ) -> Iterator[ChatDelta]: ...
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        response_format: Mapping[str, Any] | None = None,
        stop: Sequence[str] | None = None,
        adapter: str | None = None,
        stream: bool = False,
        **params: Any,
    ) -> Any:
        """Answer a conversation in the OpenAI format; see ``generate`` for ``stop``, ``adapter``, ``stream``, others.

        ``tool_choice``, ``parallel_tool_calls`` and ``response_format`` are those of the server (``docs/serving.md``):
        calls are of the ``tools`` and valid by their schemas, and without tools there are none.

        Raises:
            MessagesError: the messages or tools break a rule, or the model wrote calls that cannot be read.
            RequestError, GrammarError, TokenizerError, CapacityError: as ``generate``.
        """
        ids = encode_chat(self.tokenizer, messages, tools, max_tokens=self.context).ids
        chosen, stops = self._params([ids], params), read_stop(stop)
        continues = messages[-1]["role"] == "assistant"
        constraint = self._known_forms().of_turn(
            chosen,
            stops,
            response_format=response_format,
            tools=tools or (),
            tool_choice=tool_choice,
            parallel=parallel_tool_calls,
            continues=continues,
        )
        text = TextStream(self.tokenizer, stop=stops, continues=continues)
        dropped: set[int] = set()
        events = self.generator.stream([ids], chosen, dropped, constraint=constraint, adapter=adapter)
        deltas = self._read_chat(events, text, dropped, len(ids))
        if stream:
            return deltas
        found = list(deltas)
        last = found[-1]
        if last.finish_reason is None or last.usage is None:
            raise RuntimeError("the answer has no end")
        return ChatCompletion("".join(d.content for d in found), last.tool_calls, last.finish_reason, last.usage)

    def logits(self, ids: Prompt, *, adapter: str | None = None) -> torch.Tensor:
        """Raw logits after each of the T ids: float32 [T, V]. Text becomes ids, and ``adapter`` is, as in ``generate``.

        Raises:
            RequestError, TokenizerError, CapacityError: no ids, an id outside the vocabulary, more than the context.
        """
        return self.generator.logits(self._ids(ids), adapter)

    def save(
        self,
        folder: str | Path,
        *,
        layout: Literal["per-expert", "fused", "consolidated"] = "per-expert",
        overwrite: bool = False,
    ) -> None:
        """Write config and safetensors in the dtype of the model; ``load``, transformers or Mistral's tools read it.

        Packed matrices are decoded first, all of them.

        Raises:
            ConfigError: there is no such layout.
            CheckpointError: the folder is not empty (and not ``overwrite``), or cannot be written.
        """
        save_model(self.generator.model, Path(folder), layout=layout, overwrite=overwrite)
        write_respelling(Path(folder), self._tokenizer.respell if self._tokenizer else {})

    def stream(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Iterator[TokenEvent]:
        """Token events of several prompts; what the server asks of an engine."""
        return self.generator.stream(prompts, params)

    def _ids(self, prompt: object) -> list[int]:
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty; expected text or token ids", param="prompt")
            return self.tokenizer.encode(prompt, bos=True)
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise wrong_prompt(prompt)
        return list(prompt)

    def _params(self, prompts: Sequence[Sequence[int]], given: Mapping[str, Any]) -> SamplingParams:
        unknown = sorted(given.keys() - _FIELDS)
        if unknown:
            near = difflib.get_close_matches(unknown[0], [*_FIELDS, "adapter", "stop", "stream"], n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise RequestError(f"unknown option {unknown[0]!r}{hint}", param=unknown[0])
        fields = dict(given)
        if fields.get("max_tokens") is None:
            room = self.context - max((len(ids) for ids in prompts), default=0)
            if room < 1:
                raise CapacityError(
                    f"the prompt has {self.context - room} tokens and the context of this model is {self.context}: "
                    "no room for an answer. Shorten the prompt",
                    param="prompt",
                )
            fields["max_tokens"] = min(DEFAULT_MAX_TOKENS, room)
        if fields.get("seed") is None:
            fields["seed"] = secrets.randbits(63)
        return SamplingParams(**fields)

    def _known_forms(self) -> Forms:
        if self._forms is None:
            self.tokenizer  # noqa: B018 - says that there is none
            raise RuntimeError("a tokenizer came after the engine")
        return self._forms

    def _deltas(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        stop: Sequence[str],
        constraint: Constraint | None,
        adapter: str | None,
    ) -> Generator[Delta, None, None]:
        # Without a tokenizer there is no text, and asking for stop strings is asking for the tokenizer.
        texts = [
            TextStream(self.tokenizer, stop=stop, continues=True) if stop or self.has_tokenizer else None
            for _ in prompts
        ]
        dropped: set[int] = set()
        events = self.generator.stream(prompts, params, dropped, constraint=constraint, adapter=adapter)
        return self._read(events, texts, dropped)

    def _read(
        self, events: Generator[TokenEvent, None, None], texts: Sequence[TextStream | None], dropped: set[int]
    ) -> Generator[Delta, None, None]:
        try:
            for event in events:
                delta = delta_of(event, texts[event.sequence])
                if delta.finish_reason is not None:
                    dropped.add(event.sequence)
                yield delta
        finally:
            events.close()

    def _read_chat(
        self, events: Generator[TokenEvent, None, None], text: TextStream, dropped: set[int], prompt_tokens: int
    ) -> Generator[ChatDelta, None, None]:
        """Text until ``[TOOL_CALLS]``; what follows is kept back and read at the end."""
        control = self.tokenizer.control_id("[TOOL_CALLS]") if self.supports_tools else None
        calls: list[int] = []
        try:
            for count, event in enumerate(events, 1):
                if event.id == control or calls:
                    content = "" if calls else text.finish()
                    calls.append(event.id)
                    finish, found = event.finish_reason, []
                    if finish is not None and not text.stopped:
                        found = _calls(self.tokenizer, calls, cut=finish == "length")
                else:
                    delta = delta_of(event, text)
                    content, finish, found = delta.text, delta.finish_reason, []
                if text.stopped:
                    finish = "stop"
                if finish is None:
                    if content:
                        yield ChatDelta(content)
                    continue
                dropped.add(0)
                yield ChatDelta(content, found, "tool_calls" if found else finish, Usage(prompt_tokens, count))
                return
        finally:
            events.close()


def load(
    model: str | Path = "embedded",
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    threads: int | None = None,
    name: str | None = None,
    unpickle: bool = False,
    decode: bool = False,
    reference: bool = False,
    kv_dtype: str | None = None,
    packed_cache: str | Path | None = None,
    adapter: str | Path | None = None,
    adapters: Mapping[str, str | Path] | None = None,
) -> LLM:
    """Load a model: "embedded" (ships with this package), a folder of Hugging Face's or Mistral's files, or GGUF.

    ``dtype`` None keeps that of the files. Quantised matrices stay so in memory; ``decode`` decodes all of them now,
    which takes the memory of ``dtype``. On the CPU the model runs on compiled kernels, which round the inputs of
    quantised matrices to int8 in blocks of 256; with ``reference``, and on other devices, in torch, which decodes
    matrices where they are used. ``kv_dtype`` is what the kernels store keys and values as, "bfloat16", "float32" or
    "int8"; default: bfloat16 for bfloat16 models, else float32. ``threads`` sets the CPU threads of the whole process;
    default: the physical cores that it may use, by affinity and quota, unless torch was told to use fewer. ``name`` is
    what the server calls the model; default: the folder's name. ``unpickle`` allows ``.pth`` files, which could carry
    code. ``packed_cache`` is a folder for the weights as the kernels read them: the first load writes a file there, as
    large as the weights, and others map it. ``adapter`` is a folder of a LoRA adapter: it is added to weights that are
    not quantised, and computed beside those that are; the log says which. ``adapters`` are such folders by name, for
    calls that choose one: they are computed beside the weights, which stay those of the base.

    Raises:
        ConfigError: the device, dtype, threads, ``config.json`` or name of an adapter is wrong, ``adapter`` and
            ``adapters`` are both given, or a preset is, which has no weights.
        CheckpointError: files are missing or damaged, or do not fit the config; or the adapter is, or does not fit.
    """
    target, kind = device_of(device), dtype_of(dtype)
    compiled = not reference and target.type == "cpu"
    if kv_dtype is not None and not compiled:
        raise ConfigError(
            "kv_dtype is for compiled kernels, which run on the CPU and without reference", param="kv_dtype"
        )
    folder = folder_of(model)
    use_threads(threads)
    name = name or ("embedded" if str(model) == "embedded" else folder.resolve().name.removesuffix(".gguf"))
    _check_adapters(adapter, adapters, name)
    if is_compact(folder):
        compact = load_compact(folder, device=target, dtype=kind, packed=compiled and not decode)
        engine, named = _ready(compact.model, adapter, adapters, compiled=compiled, kv_dtype=kv_dtype)
        if packed_cache is not None:
            _log.info("packed cache: nothing in this model is packed, so none is written")
        version = Tokenizer.for_vocab_size(compact.model.config.vocab_size).version
        respelling = Tokenizer.from_version(version, respell=compact.respell)
        return LLM(compact.model, respelling, name=name, engine=engine, adapters=named)
    options: dict[str, Any] = {"unpickle": unpickle, "decode": decode, "packed_cache": packed_cache}
    found = load_model(folder, device=target, dtype=kind, reference=reference, **options)
    engine, named = _ready(found, adapter, adapters, compiled=compiled, kv_dtype=kv_dtype)
    fitting = Tokenizer.version_for(found.config.vocab_size)
    tokenizer = Tokenizer.from_version(fitting, respell=respelling_of(folder)) if fitting else None
    if tokenizer and (pieces := pieces_of(folder)):
        check_pieces(tokenizer, pieces, source=str(folder))
    return LLM(found, tokenizer, name=name, engine=engine, adapters=named)


def _check_adapters(adapter: str | Path | None, adapters: Mapping[str, str | Path] | None, base: str) -> None:
    """Raise ConfigError for what is wrong before anything is read."""
    if adapter is not None and adapters:
        raise ConfigError("adapter and adapters are both given; expected one of them", param="adapter")
    for name in adapters or ():
        check_name(name, base)


def _ready(
    model: Mixtral,
    adapter: str | Path | None,
    adapters: Mapping[str, str | Path] | None,
    *,
    compiled: bool,
    kv_dtype: str | None,
) -> tuple[EngineConfig, NamedAdapters | None]:
    """Put an adapter into a model, the model on kernels, and named adapters beside it; and what its engine may do."""
    beside = adapter is not None and use_adapter(model, Path(adapter), kernels=compiled)
    if compiled:
        compile_model(model, kv_dtype=kv_dtype)
    # A draft is checked beside other rows, and only on compiled kernels a row is the same in any company.
    named = add_adapters(model, adapters) if adapters else None
    return EngineConfig(speculation=compiled and not beside), named


def folder_of(model: str | Path) -> Path:
    """The folder, or GGUF file, of a model that can be loaded.

    Raises:
        ConfigError: it is the name of a preset, which has no weights.
        CheckpointError: there is no such folder, or this installation has no embedded model.
    """
    if str(model) == "embedded":
        folder = Path(__file__).parent / "embedded"
        if not (folder / "model.safetensors").is_file():
            raise CheckpointError(
                "this installation has no embedded model (mixtral/embedded/model.safetensors is missing); "
                "give the folder of a model instead, or install the package again",
                param="model",
            )
        return folder
    folder = Path(model)
    if folder.is_dir() or (folder.is_file() and find_gguf(folder)):
        return folder
    if folder.is_file():
        raise CheckpointError(
            f"{folder}: is a file; expected the folder that holds config.json, or a GGUF file", param="model"
        )
    if str(model).lower() in PRESETS:
        raise ConfigError(
            f'{str(model)!r} is a preset: sizes without weights. Give the folder that holds its files, or "embedded"; '
            f"`mixtral inspect {model}` shows the sizes",
            param="model",
        )
    raise CheckpointError(f'{folder}: no such folder; expected "embedded" or a folder with config.json', param="model")


def _calls(tokenizer: Tokenizer, ids: Sequence[int], *, cut: bool) -> list[ToolCall]:
    """The calls in the ids from ``[TOOL_CALLS]`` on; an answer that was cut short has none."""
    if not cut:
        return parse_calls(tokenizer, ids, salt=secrets.token_hex(8))[1]
    return []
