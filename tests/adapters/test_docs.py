"""The example in ``docs/adapters.md`` runs as it stands there, and does what the text says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mixtral

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_example_trains_an_adapter(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    block = re.search(r"(?ms)^    import torch, mixtral$.*?^    write_adapter\(.*?$", text)
    assert block is not None
    code = "\n".join(line.removeprefix("    ") for line in block[0].splitlines())
    call = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n{code}\nprint(loss.item())"
    found = subprocess.run([sys.executable, "-c", call], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout.splitlines()[-1]) < 0.5
    prompt = "The ferry to the island leaves at 9"
    adapted = mixtral.load("embedded", adapter=tmp_path / "ferry").generate(prompt, max_tokens=12, temperature=0)
    assert adapted.text.startswith(":15 from pier")
    assert not mixtral.load("embedded").generate(prompt, max_tokens=12, temperature=0).text.startswith(":15")
