"""The unit for systemd: its options exist, and systemd understands it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNIT = Path(__file__).resolve().parents[2] / "docs" / "mixtral.service"


def test_its_options_are_those_of_the_command() -> None:
    command = re.search(r"^ExecStart=((?:.*\\\n)*.*)$", UNIT.read_text(), re.MULTILINE)
    assert command is not None
    words = command[1].replace("\\\n", " ").split()
    assert words[1] == "serve"
    done = subprocess.run(
        [sys.executable, "-m", "mixtral", "serve", "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    options = [word for word in words if word.startswith("--")]
    assert len(options) >= 6
    assert [option for option in options if not re.search(rf"{option}\b", done.stdout)] == []


@pytest.mark.parametrize("change", ["", "Restart=sometimes"])
def test_systemd_understands_it(tmp_path: Path, change: str) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    unit = tmp_path / "mixtral.service"
    text = UNIT.read_text().replace("/opt/mixtral/bin/mixtral", "/bin/true")
    unit.write_text(text.replace("[Install]", f"{change}\n[Install]"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    complaints = [line for line in done.stderr.splitlines() if str(unit) in line]
    assert bool(complaints) == bool(change)
