"""The HTTP edge: OpenAI-compatible routes and a chat page over an engine that the caller hands in. Needs no torch."""

from mixtral.server.app import build
from mixtral.server.config import ServerConfig
from mixtral.server.engine import Engine
from mixtral.server.local import Plain, ThreadEngine
from mixtral.server.run import Server, serve

__all__ = ["Engine", "Plain", "Server", "ServerConfig", "ThreadEngine", "build", "serve"]
