"""Frames of messages between two processes: a length, then a list of messages as msgpack, over a connected socket."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec

from mixtral.errors import MixtralError

__all__ = ["FRAME_BYTES", "Channel", "ChannelClosedError", "ChannelError", "Frames", "frames_of"]

FRAME_BYTES = 64 * 2**20
"""The longest frame that either side sends or takes, without its length."""

_HEAD = struct.Struct("<I")
_READ_BYTES = 2**18
_encoder = msgspec.msgpack.Encoder()
T = TypeVar("T")


class ChannelError(MixtralError):
    """The other process sent what is no message, or cannot be sent one."""

    code = "channel_error"


class ChannelClosedError(ChannelError):
    """The other process closed its end, or is gone."""


def frames_of(messages: Sequence[Any]) -> bytes:
    """The bytes that carry ``messages``, in as few frames as their sizes allow; none for no messages.

    Raises:
        ChannelError: one message alone is longer than a frame may be.
    """
    if not messages:
        return b""
    packed = _encoder.encode(list(messages))
    if len(packed) <= FRAME_BYTES:
        return _HEAD.pack(len(packed)) + packed
    if len(messages) == 1:
        kind = type(messages[0]).__name__
        raise ChannelError(f"a message of kind {kind} has {len(packed)} bytes; expected at most {FRAME_BYTES}")
    half = len(messages) // 2
    return frames_of(messages[:half]) + frames_of(messages[half:])


class Frames(Generic[T]):
    """Bytes as they come in -> messages of the type (or union of types) ``kind``. Does no input itself.

    A frame is not kept before it is complete, so its announced length is checked first.
    """

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(list[kind])
        self._kept = bytearray()

    def feed(self, data: bytes | memoryview) -> list[T]:
        """Messages that are complete now, in order.

        Raises:
            ChannelError: a frame is longer than allowed, is not msgpack, or holds anything but known messages.
        """
        self._kept += data
        found: list[T] = []
        place = 0
        while len(self._kept) - place >= _HEAD.size:
            (length,) = _HEAD.unpack_from(self._kept, place)
            if length > FRAME_BYTES:
                raise ChannelError(f"a frame announces {length} bytes; expected at most {FRAME_BYTES}")
            end = place + _HEAD.size + length
            if len(self._kept) < end:
                break
            found += self._decode(bytes(memoryview(self._kept)[place + _HEAD.size : end]))
            place = end
        if place:
            del self._kept[:place]
        return found

    def finish(self) -> None:
        """To be called at the end of the input. Raises ChannelError if it ended inside a frame."""
        if self._kept:
            raise ChannelError(f"the other process closed the channel after {len(self._kept)} bytes of a frame")

    def _decode(self, packed: bytes) -> list[T]:
        try:
            found: list[T] = self._decoder.decode(packed)
        except (msgspec.MsgspecError, MixtralError, UnicodeDecodeError, RecursionError) as error:
            raise ChannelError(f"a frame of {len(packed)} bytes is not a list of known messages: {error}") from error
        return found


class Channel(Generic[T]):
    """The blocking end of a channel. One thread receives; any may send, each call's messages staying together."""

    def __init__(self, sock: socket.socket, kind: Any) -> None:
        self._sock = sock
        self._sock.setblocking(True)
        self._frames: Frames[T] = Frames(kind)
        self._sending = threading.Lock()

    def send(self, messages: Sequence[Any]) -> None:
        """Send messages, waiting for room. Raises ChannelClosedError when nobody can receive them."""
        self.send_bytes(frames_of(messages))

    def send_bytes(self, data: bytes) -> None:
        """Send bytes as they are; for frames that were made before, and for tests of broken ones."""
        with self._sending:
            try:
                self._sock.sendall(data)
            except OSError as error:
                raise ChannelClosedError(f"the other process cannot be reached ({error.strerror})") from error

    def receive(self, *, wait: bool) -> list[T]:
        """All messages that are there. With ``wait``, at least one: without using the processor until it comes.

        Raises:
            ChannelClosedError: the other process closed its end between two frames.
            ChannelError: it closed it inside a frame, or sent what is no message.
        """
        found: list[T] = []
        while True:
            flags = 0 if wait and not found else socket.MSG_DONTWAIT
            try:
                data = self._sock.recv(_READ_BYTES, flags)
            except BlockingIOError:
                return found
            except OSError as error:
                raise ChannelClosedError(f"the other process cannot be reached ({error.strerror})") from error
            if not data:
                if found:
                    return found  # the next call finds the end again
                self._frames.finish()
                raise ChannelClosedError("the other process closed the channel")
            found += self._frames.feed(data)

    def close(self) -> None:
        """Close this end; a thread that waits on it wakes up."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
