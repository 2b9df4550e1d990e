"""Python runs this at its start wherever this folder is on the path: writes down what a process reaches for.

One line of JSON per event goes to the file in WATCH_FILE. What would leave the process is also refused.
"""

import json
import os
import sys

_FILE = os.environ.get("WATCH_FILE")
_OUTWARD = {
    *("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendto"),
    *("urllib.Request", "ftplib.connect", "smtplib.connect", "http.client.connect"),
}
_MODULES = {"jinja2", "torch", "transformers", "requests", "aiohttp"}


def _write(descriptor: int, event: str, what: str) -> None:
    line = {"pid": os.getpid(), "program": sys.orig_argv, "event": event, "what": what, "optimise": sys.flags.optimize}
    os.write(descriptor, json.dumps(line).encode() + b"\n")


def _watch(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    _write(descriptor, "start", "")

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in _OUTWARD:
            _write(descriptor, event, repr(arguments[1:] or arguments))
            raise RuntimeError(f"{event} {arguments!r}")
        if event == "socket.bind":
            _write(descriptor, event, repr(arguments[1]))
        elif event == "import" and arguments[0] in _MODULES:
            _write(descriptor, event, str(arguments[0]))

    sys.addaudithook(hook)


if _FILE:
    _watch(_FILE)
