"""``mixtral serve``: an OpenAI-compatible API and a chat page, over an engine process that is watched."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from mixtral.cli import output
from mixtral.cli.generate import (
    DecodeOption,
    DeviceOption,
    DtypeOption,
    KvCacheOption,
    ModelOption,
    ReferenceOption,
    ThreadsOption,
)
from mixtral.errors import ConfigError

__all__ = ["CONTEXT", "read_bytes", "run"]

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
# Options of other servers that mean nothing here -> what to do instead.
_FOREIGN = {
    "--block-size": "pages always hold 64 tokens",
    "--cpu-offload-gb": "weights are mapped or held in memory as they are; take a smaller format",
    "--chat-template": "the chat format belongs to the tokenizer and is code, not a template",
    "--device-ids": "use --device",
    "--disable-log-requests": "requests are logged without their content; there is nothing to disable",
    "--enable-auto-tool-choice": "tools need no option; leave it out",
    "--enable-chunked-prefill": "prompts are always read in chunks, next to other requests; leave it out",
    "--enforce-eager": "there are no graphs to capture on this device; leave it out",
    "--guided-decoding-backend": "constraints are always llguidance's; leave it out",
    "--load-format": "the format is found out from the files; leave it out",
    "--max-num-batched-requests": "use --max-num-seqs",
    "--num-scheduler-steps": "each step makes one token of each request, or checks several; leave it out",
    "--pipeline-parallel-size": "a model is not cut into stages; leave it out",
    "--quantization": "the format is found out from the files; `mixtral quantize` makes others",
    "--reasoning-parser": "Mixtral models write no separate reasoning; leave it out",
    "--revision": "nothing is downloaded; give a folder",
    "--swap-space": "preempted requests are computed again instead of swapped; leave it out",
    "--tokenizer": "the tokenizer follows from the vocabulary; leave it out",
    "--tool-call-parser": "function calls are read as the tokenizer defines them; leave it out",
    "--trust-remote-code": "no code of a model folder is ever run; leave it out",
}
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def run(
    context: typer.Context,
    model: ModelOption = "embedded",
    host: Annotated[str, typer.Option(help="Loopback address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option("--served-model-name", help="Name in the API; default: that of the model.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option("--allowed-host", help="Name that a proxy in front uses; may be repeated.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", help="Tokens of prompt and answer; default: the model's context.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option("--max-num-seqs", help="Answers that are written at once.")] = 64,
    max_num_batched_tokens: Annotated[
        int, typer.Option("--max-num-batched-tokens", help="Tokens that one step computes.")
    ] = 512,
    kv_cache_memory: Annotated[
        str | None,
        typer.Option("--kv-cache-memory", help="For keys and values, such as 4G; default: what four contexts need."),
    ] = None,
    prefix_caching: Annotated[
        bool,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching", help="Reuse what equal beginnings of prompts share."
        ),
    ] = True,
    tensor_parallel_size: Annotated[
        int, typer.Option("--tensor-parallel-size", help="Devices that share each layer; 1.")
    ] = 1,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option("--gpu-memory-utilization", help="Refused: see --kv-cache-memory.")
    ] = None,
    queue_size: Annotated[int, typer.Option("--queue-size", help="Requests that may wait.")] = 128,
    queue_timeout: Annotated[float, typer.Option("--queue-timeout", help="Seconds that a request may wait.")] = 60.0,
    request_timeout: Annotated[float, typer.Option("--request-timeout", help="Seconds for a whole answer.")] = 3600.0,
    drain_timeout: Annotated[
        float, typer.Option("--drain-timeout", help="Seconds that running requests get after SIGTERM.")
    ] = 30.0,
    stall_timeout: Annotated[
        float, typer.Option("--stall-timeout", help="Seconds after which an engine that stands still is restarted.")
    ] = 60.0,
    log_format: Annotated[str, typer.Option("--log-format", help="text or json.")] = "text",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    decode: DecodeOption = False,
    reference: ReferenceOption = False,
    kv_cache_dtype: KvCacheOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Serve a model over HTTP: OpenAI-compatible API, chat page."""
    from mixtral import log
    from mixtral.server import Client, ServerConfig, process, serve
    from mixtral.wire import Start

    _refuse(context, tensor_parallel_size, gpu_memory_utilization)
    config = ServerConfig(
        host=host,
        port=port,
        allowed_hosts=tuple(allowed_host or ()),
        queue_size=queue_size,
        queue_timeout_s=queue_timeout,
        request_timeout_s=request_timeout,
        drain_s=drain_timeout,
        engine_stall_s=stall_timeout,
    )
    if log_format not in ("text", "json"):
        raise ConfigError(f"--log-format is {log_format!r}; expected text or json", param="log_format")
    lines: log.Format = "json" if log_format == "json" else "text"
    start = Start(
        model=model,
        name=served_model_name,
        device=device,
        dtype=dtype,
        threads=threads,
        decode=decode,
        reference=reference,
        kv_dtype=kv_cache_dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        cache_bytes=None if kv_cache_memory is None else read_bytes("--kv-cache-memory", kv_cache_memory),
        prefix_cache=prefix_caching,
        log=lines,
    )
    client = Client(process(start), config)
    with log.started(lines):
        serve(client, config, on_ready=lambda url: output.note(f"{client.name} is ready: {url} (Ctrl-C stops)"))


def read_bytes(option: str, text: str) -> int:
    """A size such as ``4G``, ``512MiB`` or a plain number of bytes; units are powers of 1024.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"([0-9]{1,15})\s?([kmgt]?)(?:i?b)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{option} is {text!r}; expected a size such as 4G or 512M", param=option)
    return int(match[1]) * _UNITS[match[2].lower()]


def _refuse(context: typer.Context, ranks: int, share: float | None) -> None:
    """Raise for options that this server does not have."""
    for argument in context.args:
        name = argument.split("=")[0]
        plain = name.replace("--no-", "--", 1)
        if plain in _FOREIGN:
            raise ConfigError(f"{name} is an option of another server: {_FOREIGN[plain]}", param=name)
        context.fail(f"No such option or argument: {name}")
    if ranks != 1:
        raise ConfigError(
            f"--tensor-parallel-size is {ranks}; this version runs a model on one device: leave it out, and use "
            "--threads for more cores",
            param="tensor_parallel_size",
        )
    if share is not None:
        raise ConfigError(
            "--gpu-memory-utilization is not supported: a share of a device that is also in use by others is no fixed "
            "size. Say with --kv-cache-memory how much memory keys and values get",
            param="gpu_memory_utilization",
        )
