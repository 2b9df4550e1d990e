"""HTTPS with a certificate of its own authority, and what happens on that port without it."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import trustme
from command import served
from fake import FakeEngine, listening

from mixtral.errors import ConfigError
from mixtral.server import ServerConfig


@dataclass(frozen=True)
class Identity:
    """Certificate and key as files, and a context of a client that trusts them."""

    cert: Path
    key: Path
    context: ssl.SSLContext


def identity(folder: Path, name: str) -> Identity:
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1", "localhost")
    cert, key = folder / f"{name}.cert.pem", folder / f"{name}.key.pem"
    cert.write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))
    made.private_key_pem.write_to_path(str(key))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return Identity(cert, key, context)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return identity(tmp_path_factory.mktemp("own"), "own")


@pytest.fixture(scope="module")
def place(own: Identity) -> Iterator[tuple[str, int]]:
    config = ServerConfig(port=0, tls_cert=own.cert, tls_key=own.key, header_timeout_s=0.5)
    with listening(FakeEngine("Yes."), config) as address:
        parts = urlsplit(address)
        yield parts.hostname or "", parts.port or 0


def until_closed(connection: socket.socket) -> bytes:
    found = b""
    try:
        while part := connection.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found


def test_a_client_that_trusts_it_is_answered(place: tuple[str, int], own: Identity) -> None:
    chat = {"model": "fake", "messages": [{"role": "user", "content": "a"}]}
    with httpx.Client(verify=own.context, base_url=f"https://{place[0]}:{place[1]}") as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"] == "Yes."
        with client.stream("POST", "/v1/chat/completions", json=chat | {"stream": True}) as stream:
            assert stream.read().endswith(b"data: [DONE]\n\n")
        origin = {"origin": f"https://{place[0]}:{place[1]}"}
        assert client.post("/v1/chat/completions", json=chat, headers=origin).status_code == 200


def test_a_client_that_does_not_trust_it_ends_the_connection(place: tuple[str, int]) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"https://{place[0]}:{place[1]}/health")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1:DeprecationWarning")
def test_old_versions_are_refused(place: tuple[str, int], version: ssl.TLSVersion) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    context.set_ciphers("ALL:@SECLEVEL=0")
    with (
        socket.create_connection(place, timeout=50) as connection,
        pytest.raises((ssl.SSLError, ConnectionResetError)),
    ):
        context.wrap_socket(connection)


@pytest.mark.parametrize(
    "sent",
    [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01\x00", b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n", b"\x00" * 600],
)
def test_what_is_no_handshake_ends_soon(place: tuple[str, int], own: Identity, sent: bytes) -> None:
    began = time.monotonic()
    with socket.create_connection(place, timeout=50) as connection:
        connection.sendall(sent)
        found = until_closed(connection)
    assert time.monotonic() - began < 40  # asyncio's own limit is a minute
    assert b"HTTP" not in found
    assert httpx.get(f"https://{place[0]}:{place[1]}/health", verify=own.context).status_code == 200


@pytest.mark.parametrize("wrong", ["other key", "no certificate", "no key", "no file", "folder", "passphrase"])
def test_a_pair_that_cannot_be_used_is_refused_at_start(tmp_path: Path, own: Identity, wrong: str) -> None:
    other = identity(tmp_path, "other")
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    locked = tmp_path / "locked.pem"
    locked.write_text(
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\n"
        "MIGbMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAjZ4Yp0ZJ5V6wICCAAwDAYIKoZIhvcNAgkFADAdBglghkgBZQMEASoE\n"
        "-----END ENCRYPTED PRIVATE KEY-----\n"
    )
    cert, key = {
        "other key": (own.cert, other.key),
        "no certificate": (junk, own.key),
        "no key": (own.cert, junk),
        "no file": (tmp_path / "nothing.pem", own.key),
        "folder": (tmp_path, own.key),
        "passphrase": (own.cert, locked),
    }[wrong]
    config = ServerConfig(port=0, tls_cert=cert, tls_key=key)
    with (
        pytest.raises(ConfigError, match=r"cannot be used .*; expected PEM files") as caught,
        listening(FakeEngine(), config),
    ):
        pass
    assert str(cert) in str(caught.value)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command(own: Identity, tmp_path: Path) -> None:
    with served("--tls-cert", str(own.cert), "--tls-key", str(own.key)) as server:
        assert server.address.startswith("https://")
        assert httpx.get(f"{server.address}/ready", verify=own.context).json() == {"status": "ready"}
    other = identity(tmp_path, "other")
    with (
        pytest.raises(RuntimeError, match=r"mixtral: error: the certificate .* cannot be used"),
        served("--tls-cert", str(own.cert), "--tls-key", str(other.key)),
    ):
        pass
