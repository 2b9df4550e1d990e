"""The command ``lm_eval`` with the arguments that this program gets, and no way out of this machine."""

from __future__ import annotations

from loopback import only_this_machine

with only_this_machine():
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
