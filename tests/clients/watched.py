"""Runs the program that its argument names; the program may not leave this machine."""

from __future__ import annotations

import runpy
import sys

from loopback import only_this_machine

with only_this_machine():
    runpy.run_path(sys.argv[1], run_name="__main__")
