"""``python -m mixtral`` is the command ``mixtral``."""

import sys

from mixtral.cli import main

sys.exit(main())
