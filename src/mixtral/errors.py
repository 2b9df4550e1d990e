"""Every error a user, a file or a peer can cause. Knows no HTTP and no command line.

::

    MixtralError
    ├── ConfigError        a config file or an option is wrong
    ├── CheckpointError    weight files are missing, damaged or do not fit the config
    ├── TokenizerError     text or ids that the tokenizer cannot take, or a tokenizer that does not fit the model
    ├── MessagesError      a conversation breaks the rules of the chat format
    ├── RequestError       a generation parameter is unknown, unsupported or out of range
    ├── GrammarError       a schema, regex or grammar is wrong, unsupported or too costly
    ├── MatcherError       an accepted grammar failed while an answer was being written
    ├── BusyError          there is no room for the request now; the same request may succeed later
    ├── CapacityError      the request does not fit the context or the memory it was given
    ├── NumericalError     the model produced NaN or infinity
    ├── EngineError        the engine process cannot be kept running
    ├── TrainingError      a training run cannot start, continue or save
    └── BenchError         a side of a comparison is missing, dies, hangs or answers nonsense

A message says what was got, what is expected and what to do. ``code`` is stable and machine-readable; ``param`` names
the field, when one field is to blame.
"""

from __future__ import annotations

__all__ = [
    "BenchError",
    "BusyError",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "EngineError",
    "GrammarError",
    "MatcherError",
    "MessagesError",
    "MixtralError",
    "NumericalError",
    "RequestError",
    "TokenizerError",
    "TrainingError",
]


class MixtralError(Exception):
    """Base of all errors of this package. ``code`` is stable, ``param`` names the field to blame, if there is one."""

    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class ConfigError(MixtralError):
    """A config file, a preset name or an option is wrong."""

    code = "invalid_config"


class CheckpointError(MixtralError):
    """Weight files are missing, damaged, or do not fit the config."""

    code = "invalid_checkpoint"


class TokenizerError(MixtralError):
    """Ids or text that the tokenizer cannot take, or a tokenizer that does not fit the model."""

    code = "invalid_tokens"


class MessagesError(MixtralError):
    """A conversation breaks the rules of the chat format."""

    code = "invalid_messages"


class RequestError(MixtralError):
    """A generation parameter is unknown, unsupported or out of range."""

    code = "invalid_value"


class GrammarError(MixtralError):
    """A schema, regex or grammar that an answer cannot be held to.

    ``code`` is schema_unsupported, schema_invalid, regex_invalid, grammar_invalid or grammar_too_complex.
    """

    code = "grammar_invalid"


class MatcherError(MixtralError):
    """A grammar that was accepted failed while an answer was being written; that answer ends, others go on."""

    code = "grammar_failed"


class BusyError(MixtralError):
    """There is no room for the request now; the same request may succeed later."""

    code = "server_overloaded"


class CapacityError(MixtralError):
    """The request does not fit the context window or the memory it was given."""

    code = "context_length_exceeded"


class NumericalError(MixtralError):
    """The model produced NaN or infinity; the token was not sampled."""

    code = "numerical_error"


class EngineError(MixtralError):
    """The engine process ends again and again, or is not the one that was started."""

    code = "engine_dead"


class TrainingError(MixtralError):
    """A training run cannot start, continue or save."""

    code = "training_failed"


class BenchError(MixtralError):
    """A side of a comparison is missing what it needs, dies, does not answer in time, or answers nonsense."""

    code = "benchmark_failed"
