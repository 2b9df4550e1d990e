"""The three SentencePiece vocabularies of Mixtral (v1, v2, v3), read from the files that mistral-common ships."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from mixtral.errors import TokenizerError

__all__ = ["Tokenizer", "Version"]

Version = Literal["v1", "v2", "v3"]

# version -> (file in mistral-common, its sha256, number of pieces). A file is known by its content, not by its name.
_FILES: dict[Version, tuple[str, str, int]] = {
    "v1": ("tokenizer.model.v1", "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055", 32000),
    "v2": (
        "mistral_instruct_tokenizer_240216.model.v2",
        "37f00374dea48658ee8f5d0f21895b9bc55cb0103939607c8185bfd1c6ca1f89",
        32768,
    ),
    "v3": (
        "mistral_instruct_tokenizer_240323.model.v3",
        "9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33",
        32768,
    ),
}
_OF_SIZE: dict[int, Version] = {32000: "v1", 32768: "v3"}  # embedding rows of a model -> version
_UNKNOWN_TEXT = " \u2047 "  # what SentencePiece writes for <unk>


class Tokenizer:
    """Text <-> ids of one vocabulary. Immutable and safe to share between threads.

    ``respell`` replaces ids by other ids at the end of ``encode`` (for a model that has not learnt its rare ids).

    Raises:
        TokenizerError: the version is unknown, the vocabulary file is missing or not the expected one, or ``respell``
            names ids outside the vocabulary.
    """

    bos_id = 1
    eos_id = 2

    def __init__(self, version: Version, *, respell: Mapping[int, tuple[int, ...]] | None = None) -> None:
        if version not in _FILES:
            raise TokenizerError(
                f"tokenizer version is {version!r}; expected one of {', '.join(_FILES)}", param="version"
            )
        self.version: Version = version
        self.sha256 = _FILES[version][1]
        self.vocab_size = _FILES[version][2]
        self._model = _load(version)
        self._respell = dict(respell or {})
        for id, others in self._respell.items():
            if not others:
                raise TokenizerError(f"respell[{id}] is empty; expected at least one id")
            for each in (id, *others):
                self._check(each)

    @property
    def respell(self) -> dict[int, tuple[int, ...]]:
        """The ids that ``encode`` never gives, each with the ids that spell it; empty if every id was trained."""
        return dict(self._respell)

    @classmethod
    def from_version(cls, version: str, *, respell: Mapping[int, tuple[int, ...]] | None = None) -> Tokenizer:
        """The tokenizer "v1" (8x7B), "v2" or "v3" (8x22B Instruct). Raises TokenizerError for any other name."""
        return cls(cast(Version, version), respell=respell)

    @classmethod
    def for_vocab_size(cls, vocab_size: int) -> Tokenizer:
        """The tokenizer of a model with this many embedding rows: 32000 -> v1, 32768 -> v3; else TokenizerError."""
        version = cls.version_for(vocab_size)
        if version is None:
            raise TokenizerError(
                f"the model has {vocab_size} embedding rows; Mixtral tokenizers have 32000 (v1) or 32768 (v3) entries. "
                "Check that config.json and the weights belong to a Mixtral model.",
                param="vocab_size",
            )
        return cls.from_version(version)

    @staticmethod
    def version_for(vocab_size: int) -> Version | None:
        """The version that ``for_vocab_size`` takes, without loading it; None if none fits."""
        return _OF_SIZE.get(vocab_size)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of one text segment; names of control tokens in it stay text. Lone surrogates are read as U+FFFD."""
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        ids = cast("list[int]", self._model.encode(text))
        if self._respell:
            ids = [other for id in ids for other in self._respell.get(id, (id,))]
        return [*([self.bos_id] if bos else []), *ids, *([self.eos_id] if eos else [])]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``: control ids give none, one leading space is dropped, broken UTF-8 becomes U+FFFD."""
        for id in ids:
            self._check(id)
        return cast(str, self._model.decode(list(ids)))

    def token_bytes(self, id: int) -> bytes:
        """Surface bytes of one token: ``▁`` is a space, ``<0xNN>`` a byte, a control token nothing."""
        self._check(id)
        return _surfaces(self.version)[id]

    def piece(self, id: int) -> str:
        """The name of an id in the vocabulary, such as ``▁Hello``, ``<0x0A>`` or ``[INST]``."""
        self._check(id)
        return cast(str, self._model.id_to_piece(id))

    def score(self, id: int) -> float:
        """The score of an id in the vocabulary: pairs of pieces with a higher score are joined first."""
        self._check(id)
        return cast(float, self._model.get_score(id))

    def is_byte(self, id: int) -> bool:
        """Whether the id is one of the 256 byte pieces ``<0xNN>``."""
        self._check(id)
        return id in _bytes(self.version)

    def is_control(self, id: int) -> bool:
        """Whether the id is a control token: it has no text and never comes out of ``encode``."""
        self._check(id)
        return cast(bool, self._model.is_control(id))

    def control_id(self, name: str) -> int:
        """The id of a control token: ``[INST]`` is 3 in v3. Raises TokenizerError if the vocabulary lacks it."""
        id = cast(int, self._model.piece_to_id(name))
        if not self._model.is_control(id) or self._model.id_to_piece(id) != name:
            raise TokenizerError(f"the {self.version} vocabulary has no control token {name!r}")
        return id

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of ``len(encode(text))`` that costs no encoding: no piece is longer than 18 characters."""
        return -(-len(text) // 18)

    def _check(self, id: int) -> None:
        if not 0 <= id < self.vocab_size:
            raise TokenizerError(f"token id is {id}; expected 0 to {self.vocab_size - 1} ({self.version} vocabulary)")

    def __repr__(self) -> str:
        return f"Tokenizer({self.version!r}, {self.vocab_size} entries)"


@functools.cache
def _load(version: Version) -> Any:
    """The SentencePiece model of a version, checked against its sha256."""
    from sentencepiece import SentencePieceProcessor

    name, sha256, pieces = _FILES[version]
    path = importlib.resources.files("mistral_common") / "data" / name
    if not path.is_file():
        raise TokenizerError(f"mistral-common has no file data/{name}; install it again: pip install mistral-common")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise TokenizerError(
            f"data/{name} of mistral-common has sha256 {found[:12]}..., expected {sha256[:12]}... "
            "Its ids may not fit the model; install the published mistral-common again."
        )
    model = SentencePieceProcessor(model_proto=content)
    if model.get_piece_size() != pieces:
        raise TokenizerError(f"data/{name} has {model.get_piece_size()} pieces; expected {pieces}")
    return model


@functools.cache
def _bytes(version: Version) -> frozenset[int]:
    """The ids of byte pieces."""
    model = _load(version)
    return frozenset(id for id in range(model.get_piece_size()) if model.is_byte(id))


@functools.cache
def _surfaces(version: Version) -> tuple[bytes, ...]:
    """Surface bytes of every id."""
    model = _load(version)
    surfaces = []
    for id in range(model.get_piece_size()):
        piece = cast(str, model.id_to_piece(id))
        if model.is_unknown(id):
            surfaces.append(_UNKNOWN_TEXT.encode())
        elif model.is_control(id):
            surfaces.append(b"")
        elif model.is_byte(id):
            surfaces.append(bytes([int(piece[3:5], 16)]))
        else:
            surfaces.append(piece.replace("▁", " ").encode())
    return tuple(surfaces)
