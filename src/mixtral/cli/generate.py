"""``mixtral generate``: continue a text or a list of token ids."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtral.cli import output
from mixtral.errors import RequestError

if TYPE_CHECKING:
    from mixtral.api import LLM, Completion, TokenLogprob

__all__ = [
    "AdapterOption",
    "DecodeOption",
    "DeviceOption",
    "DtypeOption",
    "KvCacheOption",
    "MaxTokensOption",
    "MinPOption",
    "ModelOption",
    "PackedCacheOption",
    "ReferenceOption",
    "SeedOption",
    "ThreadsOption",
    "TopKOption",
    "TopPOption",
    "check_sampling",
    "read_prompt",
    "run",
]

ModelOption = Annotated[str, typer.Option(help='"embedded", or a folder with config.json and safetensors.')]
DeviceOption = Annotated[str, typer.Option(help="Where to compute, as torch names it.")]
DtypeOption = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: that of the files.")]
DecodeOption = Annotated[
    bool, typer.Option("--decode", help="Decode quantised weights when loading; takes the memory of --dtype.")
]
ReferenceOption = Annotated[
    bool, typer.Option("--reference", help="Plain torch; quantised weights are decoded where they are used.")
]
KvCacheOption = Annotated[
    str | None,
    typer.Option("--kv-cache-dtype", help="Keys and values: bfloat16, float32 or int8; default: as the model."),
]
PackedCacheOption = Annotated[
    Path | None,
    typer.Option("--packed-cache", help="Folder for packed weights: written the first time, mapped from then on."),
]
AdapterOption = Annotated[
    Path | None,
    typer.Option(help="Folder of a LoRA adapter: added to dense weights, computed beside quantised ones."),
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, max=1024, help="CPU threads; default: the physical cores that it may use.")
]
MaxTokensOption = Annotated[
    int | None, typer.Option("--max-tokens", help="Longest answer; default 512, or what the context leaves.")
]
TopKOption = Annotated[int, typer.Option("--top-k", help="Choose among this many tokens; 0 is all.")]
TopPOption = Annotated[float, typer.Option("--top-p", help="Choose among the likeliest with this share; 1 is all.")]
MinPOption = Annotated[float, typer.Option("--min-p", help="Drop tokens below this share of the likeliest.")]
SeedOption = Annotated[int | None, typer.Option(help="Same seed, same text; default: drawn.")]


def run(
    model: ModelOption = "embedded",
    prompt: Annotated[str | None, typer.Option(help="Text to continue; default: standard input.")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids to continue, such as 1,22557; nothing is added.")] = None,
    max_tokens: MaxTokensOption = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: Annotated[float, typer.Option("--repetition-penalty", help="1 is off.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option("--presence-penalty", help="0 is off.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option("--frequency-penalty", help="0 is off.")] = 0.0,
    seed: SeedOption = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")] = None,
    logprobs: Annotated[int | None, typer.Option(help="Report log-probabilities and this many alternatives.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of text.")] = False,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Write as tokens come; default: in a terminal.")
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    decode: DecodeOption = False,
    reference: ReferenceOption = False,
    kv_cache_dtype: KvCacheOption = None,
    packed_cache: PackedCacheOption = None,
    adapter: AdapterOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Continue a text or a list of token ids."""
    from mixtral.api import load

    given = read_prompt(prompt, ids)
    options: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
        "logprobs": logprobs,
        "max_tokens": max_tokens,
    }
    check_sampling(options)
    options["stop"] = tuple(stop or ())
    llm = load(
        model,
        device=device,
        dtype=dtype,
        decode=decode,
        reference=reference,
        kv_dtype=kv_cache_dtype,
        packed_cache=packed_cache,
        adapter=adapter,
        threads=threads,
    )
    streamed = stream if stream is not None else sys.stdout.isatty() and not as_json
    (_stream if streamed else _whole)(llm, given, options, as_json=as_json)


def check_sampling(options: Mapping[str, Any]) -> None:
    """Raise RequestError for an option that is out of range: before a model is loaded, which may take minutes."""
    from mixtral.wire import SamplingParams

    SamplingParams(**{name: value for name, value in options.items() if value is not None})


def read_prompt(prompt: str | None, ids: str | None) -> str | list[int]:
    """The prompt from its option, from ``ids``, or from standard input; exactly one of them.

    Raises:
        RequestError: both are given, ids are no integers, nothing is given, or standard input is not UTF-8.
    """
    if prompt is not None and ids is not None:
        raise RequestError("--prompt and --ids are both given; expected one of them", param="prompt")
    if ids is not None:
        words = ids.replace(",", " ").split()
        try:
            return [int(word) for word in words]
        except ValueError:
            raise RequestError(f"--ids is {ids!r}; expected integers such as 1,22557", param="ids") from None
    if prompt is not None:
        return prompt
    if sys.stdin.isatty():
        raise RequestError("no prompt; give --prompt, --ids, or text on standard input", param="prompt")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8 (byte {error.start}); expected UTF-8 text") from None


def _whole(llm: LLM, prompt: str | list[int], options: Mapping[str, Any], *, as_json: bool) -> None:
    completion = llm.generate(prompt, **options)
    if as_json:
        output.write_json(_completion(completion))
        return
    output.say(completion.text if llm.has_tokenizer else " ".join(map(str, completion.ids)))
    for token in completion.logprobs or ():
        output.say(_logprob_line(llm, token))


def _stream(llm: LLM, prompt: str | list[int], options: Mapping[str, Any], *, as_json: bool) -> None:
    listed: list[TokenLogprob] = []
    for delta in llm.generate(prompt, stream=True, **options):
        listed.extend(delta.logprobs or ())
        if as_json:
            line = {"text": delta.text, "ids": delta.ids, "finish_reason": delta.finish_reason}
            output.write_json(line | _logprobs(delta.logprobs))
        else:
            output.write(delta.text if llm.has_tokenizer else "".join(f"{id} " for id in delta.ids))
    if not as_json:
        output.say()
        for token in listed:
            output.say(_logprob_line(llm, token))


def _completion(completion: Completion) -> dict[str, Any]:
    return {
        "text": completion.text,
        "ids": completion.ids,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": len(completion.ids),
        "seed": completion.seed,
    } | _logprobs(completion.logprobs)


def _logprobs(tokens: list[TokenLogprob] | None) -> dict[str, Any]:
    if tokens is None:
        return {}
    listed = [
        {"id": t.id, "logprob": t.logprob, "top": [{"id": c.id, "logprob": c.logprob} for c in t.top]} for t in tokens
    ]
    return {"logprobs": listed}


def _logprob_line(llm: LLM, token: TokenLogprob) -> str:
    def named(id: int, logprob: float) -> str:
        return f"{repr(llm.tokenizer.piece(id)) if llm.has_tokenizer else id} {logprob:.4f}"

    others = "".join(f"  {named(c.id, c.logprob)}" for c in token.top)
    return named(token.id, token.logprob) + (f"  |{others}" if others else "")
