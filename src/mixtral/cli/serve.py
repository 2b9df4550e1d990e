"""``mixtral serve``: an OpenAI-compatible API and a chat page, over an engine process that is watched."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixtral.cli import output
from mixtral.cli.generate import (
    DecodeOption,
    DeviceOption,
    DtypeOption,
    KvCacheOption,
    ModelOption,
    PackedCacheOption,
    ReferenceOption,
    ThreadsOption,
)
from mixtral.cli.serving import (
    AdaptersOption,
    CacheMemoryOption,
    ContextOption,
    SequencesOption,
    ServedNameOption,
    StepTokensOption,
    start_of,
)
from mixtral.errors import ConfigError

if TYPE_CHECKING:
    from mixtral.server.keys import KeyRing

__all__ = ["CONTEXT", "run"]

# Options -> fields of ServerConfig.
_CONFIG = {
    "host": "host",
    "port": "port",
    "queue_size": "queue_size",
    "queue_timeout": "queue_timeout_s",
    "request_timeout": "request_timeout_s",
    "drain_timeout": "drain_s",
    "stall_timeout": "engine_stall_s",
    "tls_cert": "tls_cert",
    "tls_key": "tls_key",
}
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
    "--enable-lora": "name adapters with --adapter NAME=PATH; leave it out",
    "--enforce-eager": "there are no graphs to capture on this device; leave it out",
    "--guided-decoding-backend": "constraints are always llguidance's; leave it out",
    "--load-format": "the format is found out from the files; leave it out",
    "--lora-modules": "use --adapter NAME=PATH, once for each",
    "--max-lora-rank": "adapters may have any rank; leave it out",
    "--max-loras": "any number of adapters may be in one batch; leave it out",
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

PortOption = Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")]
AllowedHostOption = Annotated[
    list[str] | None, typer.Option("--allowed-host", help="Name that a proxy in front uses; may be repeated.")
]
AllowedOriginOption = Annotated[
    list[str] | None,
    typer.Option("--allowed-origin", help="Site whose pages may use the API, https://NAME; may be repeated."),
]
KeyFileOption = Annotated[
    Path | None, typer.Option("--api-key-file", help="TOML file of key digests; see docs/serving.md.")
]
KeyOption = Annotated[
    list[str] | None,
    typer.Option("--api-key", help="A key in the clear, seen by all in the process list; better: --api-key-file."),
]
CertOption = Annotated[Path | None, typer.Option("--tls-cert", help="Certificate for HTTPS, with --tls-key.")]
CertKeyOption = Annotated[Path | None, typer.Option("--tls-key", help="Private key of the certificate.")]
PrefixOption = Annotated[
    bool,
    typer.Option(
        "--enable-prefix-caching/--no-enable-prefix-caching", help="Reuse what equal beginnings of prompts share."
    ),
]
BesideOption = Annotated[
    int,
    typer.Option(
        "--max-tokens-beside-answers",
        help="Tokens of a step that also writes answers: fewer for even gaps between tokens, more for throughput.",
    ),
]
RanksOption = Annotated[int, typer.Option("--tensor-parallel-size", help="Devices that share each layer; 1.")]
ShareOption = Annotated[float | None, typer.Option("--gpu-memory-utilization", help="Refused: see --kv-cache-memory.")]
QueueOption = Annotated[int, typer.Option("--queue-size", help="Requests that may wait.")]
QueueTimeOption = Annotated[float, typer.Option("--queue-timeout", help="Seconds that a request may wait.")]
RequestTimeOption = Annotated[float, typer.Option("--request-timeout", help="Seconds for a whole answer.")]
DrainOption = Annotated[float, typer.Option("--drain-timeout", help="Seconds that running requests get after SIGTERM.")]
StallOption = Annotated[
    float, typer.Option("--stall-timeout", help="Seconds after which an engine that stands still is restarted.")
]
LogOption = Annotated[str, typer.Option("--log-format", help="text or json.")]

_READY = "{} is ready: {} (Ctrl-C stops)"


def run(
    context: typer.Context,
    model: ModelOption = "embedded",
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need API keys.")] = "127.0.0.1",
    port: PortOption = 8000,
    served_model_name: ServedNameOption = None,
    allowed_host: AllowedHostOption = None,
    allowed_origin: AllowedOriginOption = None,
    api_key_file: KeyFileOption = None,
    api_key: KeyOption = None,
    tls_cert: CertOption = None,
    tls_key: CertKeyOption = None,
    max_model_len: ContextOption = None,
    max_num_seqs: SequencesOption = 64,
    max_num_batched_tokens: StepTokensOption = 512,
    max_tokens_beside_answers: BesideOption = 64,
    kv_cache_memory: CacheMemoryOption = None,
    enable_prefix_caching: PrefixOption = True,
    tensor_parallel_size: RanksOption = 1,
    gpu_memory_utilization: ShareOption = None,
    queue_size: QueueOption = 128,
    queue_timeout: QueueTimeOption = 60.0,
    request_timeout: RequestTimeOption = 3600.0,
    drain_timeout: DrainOption = 30.0,
    stall_timeout: StallOption = 60.0,
    log_format: LogOption = "text",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    decode: DecodeOption = False,
    reference: ReferenceOption = False,
    kv_cache_dtype: KvCacheOption = None,
    packed_cache: PackedCacheOption = None,
    adapter: AdaptersOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Serve a model over HTTP: OpenAI-compatible API, chat page."""
    from mixtral import log
    from mixtral.server import Client, Grammars, ServerConfig, process, serve

    _refuse(context, tensor_parallel_size, gpu_memory_utilization)
    lines: log.Format = "json" if log_format == "json" else "text"
    if log_format != lines:
        raise ConfigError(f"--log-format is {log_format!r}; expected text or json", param="log_format")
    options = {field: context.params[option] for option, field in _CONFIG.items()}
    config = ServerConfig(
        allowed_hosts=tuple(allowed_host or ()),
        allowed_origins=tuple(allowed_origin or ()),
        keys=_keys(api_key_file, api_key or []),
        **options,
    )
    if not config.loopback and tls_cert is None:
        output.note("keys and texts are sent in the clear; use --tls-cert and --tls-key, or a proxy that encrypts")
    start = start_of(context.params, log=lines)
    client = Client(process(start), config)
    with log.started(lines):
        serve(
            client, config, grammar=Grammars(client), on_ready=lambda url: output.note(_READY.format(client.name, url))
        )


def _keys(path: Path | None, plain: list[str]) -> KeyRing | None:
    from mixtral.server.keys import KeyRing

    if plain:
        output.note("--api-key can be read in the list of processes; use --api-key-file where others have accounts")
    if path is not None:
        return KeyRing.load(path, more=plain)
    return KeyRing.of(plain) if plain else None


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
