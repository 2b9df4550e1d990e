"""Text <-> token ids of Mixtral: vocabularies v1, v2, v3, chat encoding, function calls, streaming. Needs no torch."""

from mixtral.tokenizer.calls import CallDelta, CallReader, ToolCall, parse_calls
from mixtral.tokenizer.chat import EncodedChat, encode_chat
from mixtral.tokenizer.stream import TextStream
from mixtral.tokenizer.tokenizer import Tokenizer
from mixtral.tokenizer.vocabulary import check_pieces, gguf_vocabulary

__all__ = [
    "CallDelta",
    "CallReader",
    "EncodedChat",
    "TextStream",
    "Tokenizer",
    "ToolCall",
    "check_pieces",
    "encode_chat",
    "gguf_vocabulary",
    "parse_calls",
]
