"""The HTTP edge: OpenAI-compatible routes and a chat page over an engine that the caller hands in. Needs no torch."""

from mixtral.server.app import build
from mixtral.server.client import Client
from mixtral.server.config import ServerConfig
from mixtral.server.engine import Engine
from mixtral.server.grammars import Grammars
from mixtral.server.run import Server, serve
from mixtral.server.supervisor import process

__all__ = ["Client", "Engine", "Grammars", "Server", "ServerConfig", "build", "process", "serve"]
