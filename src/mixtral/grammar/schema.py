"""The JSON Schema that answers can be held to: every keyword is enforced, is an annotation, or is refused by name.

The rules are those of Draft 2020-12 as far as the grammar library keeps them. What it would keep only nearly (numbers
that a float cannot hold, patterns that programs read differently, a count of members that repeats could reach) is
refused as well, so a finished answer is always valid.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from mixtral.errors import GrammarError
from mixtral.grammar.patterns import rewrite_pattern

__all__ = ["ANNOTATIONS", "FORMATS", "KEYWORDS", "Checked", "check_schema"]

BYTES = 64 * 1024
PROPERTIES = 2048
ENUM_VALUES = 4096
REFERENCES = 256
DEPTH = 32  # of schemas in each other
_JSON_DEPTH = 64  # of the text; a level of schemas takes up to two
_COPIES = 3  # of options of oneOf in each other
_NODES = 8192  # written, after options of oneOf have been copied to their place

# `discriminator` never changes which values are valid (OpenAPI); generators of schemas put it beside oneOf.
_TEXTS = ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly")
ANNOTATIONS = frozenset([*_TEXTS, "$schema", "$comment", "discriminator"])
FORMATS = frozenset(["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"])
_TYPES = ("null", "boolean", "number", "integer", "string", "array", "object")
_DEFINITIONS = ("$defs", "definitions")

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Checked:
    """A schema that the grammar library takes as it is: ``root`` and, under ``definitions``, what its ``$ref`` name.

    Annotations are gone, patterns are rewritten, and references read ``#/$defs/NAME``.
    """

    root: Any
    definitions: dict[str, Any]

    def whole(self) -> dict[str, Any]:
        """Root and definitions as one schema."""
        root = {True: {}, False: {"not": {}}}[self.root] if isinstance(self.root, bool) else self.root
        return {**root, "$defs": self.definitions} if self.definitions else root


def check_schema(schema: object, where: str, *, prefix: str = "d") -> Checked:
    """Check a schema and write it anew. ``where`` is its path in the request; ``prefix`` begins names of definitions.

    Raises:
        GrammarError: schema_unsupported (a keyword, named with its path), schema_invalid (a value a keyword cannot
            have), or grammar_too_complex (a limit of this module). Depth is looked at first and without recursion.
    """
    _check_depth(schema, where)
    try:
        size = len(json.dumps(schema, ensure_ascii=False).encode())
    except (UnicodeEncodeError, TypeError, ValueError) as error:
        raise GrammarError(f"{where} is no JSON: {error}", param=where, code="schema_invalid") from None
    if size > BYTES:
        raise _too_much(where, f"{size:,} bytes", f"{BYTES:,}")
    reader = _Reader(where)
    reader.read(schema, (), 0)
    return reader.write(prefix)


def _check_depth(value: object, where: str) -> None:
    layer: list[object] = [value]
    for _ in range(_JSON_DEPTH):
        layer = [member for each in layer for member in _members(each)]
        if not layer:
            return
    raise _too_much(where, "more levels of lists and objects", str(_JSON_DEPTH))


def _members(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


@dataclass(slots=True)
class _Reader:
    """First reads all schemas in place, then writes the root and what is referred to."""

    where: str
    places: dict[Path, Any] = field(default_factory=dict)  # every schema inside the schema
    references: dict[Path, str] = field(default_factory=dict)  # schema with a $ref -> its pointer
    properties: int = 0
    enum_values: int = 0

    def read(self, node: object, path: Path, depth: int) -> None:
        if depth > DEPTH:
            raise _too_much(self.show(path), "more schemas in each other", str(DEPTH))
        self.places[path] = node
        if isinstance(node, bool):
            return
        if not isinstance(node, dict):
            raise self.invalid(path, node, "a schema: an object, true or false")
        for key, value in node.items():
            if key in ANNOTATIONS or (key == "$id" and not path):
                continue
            if key not in KEYWORDS:
                raise self.unsupported((*path, key), f"the keyword {key!r:.64}")
            KEYWORDS[key](self, node, key, value, path, depth)

    # --- one method for each kind of keyword; all take (node, key, value, path, depth) ---

    def schema(self, _node: Any, key: str, value: Any, path: Path, depth: int) -> None:
        self.read(value, (*path, key), depth + 1)

    def schemas(self, _node: Any, key: str, value: Any, path: Path, depth: int) -> None:
        if not isinstance(value, list) or not value:
            raise self.invalid((*path, key), value, "a list with at least one schema")
        for place, each in enumerate(value):
            self.read(each, (*path, key, place), depth + 1)

    def schemas_by_name(self, _node: Any, key: str, value: Any, path: Path, depth: int) -> None:
        if not isinstance(value, dict):
            raise self.invalid((*path, key), value, "an object of schemas")
        if key in ("properties", "patternProperties"):
            self.properties += len(value)
            if self.properties > PROPERTIES:
                raise _too_much(self.show((*path, key)), f"{self.properties:,} properties", f"{PROPERTIES:,}")
        for name, each in value.items():
            if key == "properties":
                self._text(name, (*path, key, name))
            if key == "patternProperties":
                rewrite_pattern(name, self.show((*path, key, name)))
            self.read(each, (*path, key, name), depth + 1)

    def count(self, node: Any, key: str, value: Any, path: Path, _depth: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            raise self.invalid((*path, key), value, "a whole number from 0 to 2147483647")
        if key == "minProperties" and value > max(1, len(_names(node))):
            # A member that no schema names may be written twice, and would count twice.
            raise self.unsupported((*path, key), f"minProperties {value}, more than the number of required properties,")

    def number(self, _node: Any, key: str, value: Any, path: Path, _depth: int) -> None:
        self._number(value, (*path, key))
        if key == "multipleOf" and not (value > 0 and len(Decimal(str(value)).normalize().as_tuple().digits) <= 4):
            # The grammar has a state for each remainder.
            raise self.unsupported((*path, key), f"{value!r}, not a positive number of one to four digits and zeros,")

    def names(self, _node: Any, key: str, value: Any, path: Path, _depth: int) -> None:
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value) or _repeats(value):
            raise self.invalid((*path, key), value, "a list of different names")
        for place, each in enumerate(value):
            self._text(each, (*path, key, place))

    def types(self, _node: Any, key: str, value: Any, path: Path, _depth: int) -> None:
        listed = value if isinstance(value, list) else [value]
        if not listed or not all(isinstance(each, str) and each in _TYPES for each in listed) or _repeats(listed):
            raise self.invalid((*path, key), value, f"one of {', '.join(_TYPES)}, or a list of different ones")

    def values(self, _node: Any, key: str, value: Any, path: Path, _depth: int) -> None:
        if not isinstance(value, list) or not value:
            raise self.invalid((*path, key), value, "a list with at least one value")
        self.enum_values += len(value)
        if self.enum_values > ENUM_VALUES:
            raise _too_much(self.show((*path, key)), f"{self.enum_values:,} values", f"{ENUM_VALUES:,}")
        for place, each in enumerate(value):
            self.value(_node, key, each, path, place)

    def value(self, _node: Any, key: str, value: Any, path: Path, _depth: int) -> None:
        for each in _leaves(value):
            if isinstance(each, str):
                self._text(each, (*path, key))
            elif isinstance(each, int | float) and not isinstance(each, bool):
                self._number(each, (*path, key))

    def pattern(self, _node: Any, key: str, value: Any, path: Path, _depth: int) -> None:
        if not isinstance(value, str):
            raise self.invalid((*path, key), value, "a regular expression")
        rewrite_pattern(value, self.show((*path, key)))

    def format(self, _node: Any, key: str, value: Any, path: Path, _depth: int) -> None:
        if not isinstance(value, str):
            raise self.invalid((*path, key), value, "the name of a format")
        if value not in FORMATS:
            raise self.unsupported((*path, key), f"the format {value!r:.64} (known: {', '.join(sorted(FORMATS))})")

    def reference(self, _node: Any, key: str, value: Any, path: Path, _depth: int) -> None:
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
            raise self.invalid((*path, key), value, 'a place in this schema, such as "#/$defs/name"')
        self.references[path] = value
        if len(self.references) > REFERENCES:
            raise _too_much(self.show((*path, key)), f"{len(self.references):,} references", f"{REFERENCES:,}")

    # --- values ---

    def _text(self, value: str, path: Path) -> None:
        # The grammar writes each character in one way only, and has none for these.
        if any((character < " " and character not in "\b\f\n\r\t") or character == "\x7f" for character in value):
            raise self.unsupported(path, "a control character")

    def _number(self, value: object, path: Path) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.invalid(path, value, "a number")
        size = abs(value)
        if size > 2**53 or (isinstance(value, float) and (0 < size < 1e-9 or size > 1e15)):
            raise self.unsupported(path, f"the number {value!r:.64} (known: integers up to 2^53, others 1e-9 to 1e15)")

    # --- writing ---

    def write(self, prefix: str) -> Checked:
        targets = {path: self._target(path, pointer) for path, pointer in self.references.items()}
        # A union is written once, with its options in place, and referred to: it may be part of its own options.
        unions = [path for path, node in self.places.items() if self._is_union(node, path)]
        names = {
            target: f"{prefix}{number}" for number, target in enumerate(dict.fromkeys([*targets.values(), *unions]))
        }
        writer = _Writer(self, targets, names)
        root = writer.node(())
        return Checked(root, {name: writer.node(target, whole=True) for target, name in names.items()})

    def _is_union(self, node: Any, path: Path) -> bool:
        options = node.get("oneOf", ()) if isinstance(node, dict) else ()
        return any((*path, "oneOf", place) in self.references for place in range(len(options)))

    def _target(self, path: Path, pointer: str) -> Path:
        parts = [unquote(part).replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]
        target: Path = ()
        for part in parts:
            # A number is a place in a list only where the path so far says so.
            target = (*target, int(part) if target and target[-1] in _LISTS and part.isdecimal() else part)
        if target not in self.places:
            raise self.invalid((*path, "$ref"), pointer, "a place in this schema where a schema is")
        return target

    # --- errors ---

    def show(self, path: Path) -> str:
        """A place as the path of a request."""
        shown = self.where
        for part in path:
            if isinstance(part, str) and part.replace("$", "").replace("_", "").isalnum():
                shown += f".{part}"
            else:
                shown += f"[{json.dumps(part)[:64]}]"
        return shown

    def invalid(self, path: Path, value: object, expected: str) -> GrammarError:
        where = self.show(path)
        shown = repr(value)
        shown = shown if len(shown) <= 64 else shown[:61] + "..."
        return GrammarError(f"{where} is {shown}; expected {expected}", param=where, code="schema_invalid")

    def unsupported(self, path: Path, what: str) -> GrammarError:
        where = self.show(path)
        return GrammarError(
            f"{where}: {what} is not supported; nothing is ignored, so leave it out or say it otherwise",
            param=where,
            code="schema_unsupported",
        )


_Check = Callable[[_Reader, Any, str, Any, Path, int], None]
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
KEYWORDS: dict[str, _Check] = {
    **dict.fromkeys(("items", "additionalProperties"), _Reader.schema),
    **dict.fromkeys(_LISTS, _Reader.schemas),
    **dict.fromkeys(("properties", "patternProperties", *_DEFINITIONS), _Reader.schemas_by_name),
    **dict.fromkeys(["minItems", "maxItems", "minLength", "maxLength"], _Reader.count),
    **dict.fromkeys(["minProperties", "maxProperties"], _Reader.count),
    **dict.fromkeys(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"], _Reader.number),
    "required": _Reader.names,
    "type": _Reader.types,
    "enum": _Reader.values,
    "const": _Reader.value,
    "pattern": _Reader.pattern,
    "format": _Reader.format,
    "$ref": _Reader.reference,
}
"""The keywords that are enforced, each with its check."""


@dataclass(slots=True)
class _Writer:
    reader: _Reader
    targets: Mapping[Path, Path]
    names: Mapping[Path, str]
    open: list[Path] = field(default_factory=list)  # definitions that are being copied
    nodes: int = 0

    def node(self, path: Path, *, whole: bool = False) -> Any:
        """The schema at a place, or a reference to it if it has a name and ``whole`` is not set."""
        self.nodes += 1
        if self.nodes > _NODES:
            raise _too_much(
                self.reader.where, "more schemas, with options of oneOf copied to their place", f"{_NODES:,}"
            )
        if path in self.names and not whole:
            return {"$ref": f"#/$defs/{self.names[path]}"}
        given = self.reader.places[path]
        if isinstance(given, bool):
            return given
        written = {}
        for key, value in given.items():
            if key in KEYWORDS and key not in _DEFINITIONS:
                written[key] = self._value(key, value, path)
        if written.get("minProperties", PROPERTIES + 1) <= len(_names(given)):
            del written["minProperties"]  # said by `required`, and some forms of it are beyond the library
        return written

    def _value(self, key: str, value: Any, path: Path) -> Any:
        inner = (*path, key)
        if key == "$ref":
            return f"#/$defs/{self.names[self.targets[path]]}"
        if key in ("items", "additionalProperties"):
            return self.node(inner)
        if key == "oneOf":
            return [self._option((*inner, place)) for place in range(len(value))]
        if key in _LISTS:
            return [self.node((*inner, place)) for place in range(len(value))]
        if key == "properties":
            return {name: self.node((*inner, name)) for name in value}
        if key == "patternProperties":
            return {rewrite_pattern(name, self.reader.show(inner)): self.node((*inner, name)) for name in value}
        return rewrite_pattern(value, self.reader.show(inner)) if key == "pattern" else value

    def _option(self, path: Path) -> Any:
        """An option of oneOf. A mere reference is replaced by what it names: only then are options seen to differ."""
        target, passed = path, {path, *self.open}
        while target in self.targets and set(self.reader.places[target]) <= ANNOTATIONS | {"$ref"}:
            target = self.targets[target]
            if target in passed:
                return self.node(path)
            passed.add(target)
        if target == path or len(self.open) == _COPIES:
            return self.node(path)
        self.open.append(target)
        try:
            return self.node(target, whole=True)
        finally:
            self.open.pop()


def _names(node: Any) -> list[str]:
    listed = node.get("required")
    return listed if isinstance(listed, list) else []


def _repeats(values: list[Any]) -> bool:
    return len(set(values)) < len(values)


def _leaves(value: object) -> Iterator[object]:
    """All values in a value, names of members too."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        yield each
        if isinstance(each, Mapping):
            waiting.extend(each)
        waiting.extend(_members(each))


def _too_much(where: str, got: str, most: str) -> GrammarError:
    return GrammarError(
        f"{where} has {got}; the limit is {most}. Make the schema smaller", param=where, code="grammar_too_complex"
    )
