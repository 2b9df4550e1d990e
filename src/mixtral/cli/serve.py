"""``mixtral serve``: an OpenAI-compatible API and a chat page."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
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
    ReferenceOption,
    ThreadsOption,
)

if TYPE_CHECKING:
    from mixtral.server.keys import KeyRing

__all__ = ["run"]

OriginOption = Annotated[
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


def run(
    model: ModelOption = "embedded",
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need API keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option("--served-model-name", help="Name in the API; default: that of the model.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option("--allowed-host", help="Name that a proxy in front uses; may be repeated.")
    ] = None,
    allowed_origin: OriginOption = None,
    api_key_file: KeyFileOption = None,
    api_key: KeyOption = None,
    tls_cert: CertOption = None,
    tls_key: CertKeyOption = None,
    queue_size: Annotated[int, typer.Option("--queue-size", help="Requests that may wait.")] = 128,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    decode: DecodeOption = False,
    reference: ReferenceOption = False,
    kv_cache_dtype: KvCacheOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Serve a model over HTTP: OpenAI-compatible API, chat page."""
    from mixtral.server import Plain, ServerConfig, ThreadEngine, serve

    config = ServerConfig(
        host=host,
        port=port,
        allowed_hosts=tuple(allowed_host or ()),
        allowed_origins=tuple(allowed_origin or ()),
        keys=_keys(api_key_file, api_key or []),
        tls_cert=tls_cert,
        tls_key=tls_key,
        queue_size=queue_size,
    )
    if not config.loopback and tls_cert is None:
        output.note("keys and texts are sent in the clear; use --tls-cert and --tls-key, or a proxy that encrypts")
    from mixtral.api import load

    llm = load(
        model,
        device=device,
        dtype=dtype,
        decode=decode,
        reference=reference,
        kv_dtype=kv_cache_dtype,
        threads=threads,
        name=served_model_name,
    )
    llm.tokenizer  # noqa: B018 - a model without one cannot be served; say so before listening
    with _request_log():
        engine = ThreadEngine(Plain(llm), config)
        serve(engine, config, on_ready=lambda address: output.note(f"{llm.name} is ready: {address} (Ctrl-C stops)"))


def _keys(path: Path | None, plain: list[str]) -> KeyRing | None:
    from mixtral.server.keys import KeyRing

    if plain:
        output.note("--api-key can be read in the list of processes; use --api-key-file where others have accounts")
    if path is not None:
        return KeyRing.load(path, more=plain)
    return KeyRing.of(plain) if plain else None


@contextmanager
def _request_log() -> Iterator[None]:
    """The server's log on standard error: a line per request, and what went wrong."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("mixtral.server")
    before = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
