"""Constrained output: schemas, regexes, grammars and function calls as token masks. Needs no torch.

What a client gives becomes a ``Source`` (``text_constraint``, ``calls_constraint``), is tried by a ``Guard`` in a child
process, and goes as text to an engine, where a ``Grammar`` compiles it and a ``Matcher`` follows one answer.
"""

from mixtral.grammar.functions import calls_constraint
from mixtral.grammar.guard import Guard, Limits
from mixtral.grammar.mask import Grammar, Matcher
from mixtral.grammar.source import Source
from mixtral.grammar.text import text_constraint

__all__ = ["Grammar", "Guard", "Limits", "Matcher", "Source", "calls_constraint", "text_constraint"]
