"""What a stranger meets first: light imports, a pinned public surface, and a README whose file map is the tree."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import mixtral

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "mixtral"
filemap = runpy.run_path(str(ROOT / "scripts" / "filemap.py"))

TORCH_FREE = ("errors.py", "config.py", "desk", "plan", "wire", "tokenizer", "grammar", "server", "evaluate", "cli")
TORCH_FREE_FILES = (
    "__init__.py",
    *(f"engine/{name}.py" for name in ("config", "request", "pages", "scheduler", "heap")),
)
HEAVY = ("torch", "numpy", "fastapi", "mistral_common", "safetensors")


def run_python(code: str, folder: Path = ROOT / "src") -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds modules in `folder`; its last line names the heavy ones it loaded."""
    first = f"import sys; sys.path.insert(0, {str(folder)!r})"
    last = f"print('LOADED', *[name for name in {HEAVY} if name in sys.modules])"
    return subprocess.run(
        [sys.executable, "-c", f"{first}\n{code}\n{last}"], capture_output=True, text=True, check=False, timeout=60
    )


def loaded(result: subprocess.CompletedProcess[str]) -> list[str]:
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1].split()[1:]


def test_torch_free_modules_import_without_torch() -> None:
    names = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")]
    chosen = [name for name in names if name.split("/")[0] in TORCH_FREE or name in TORCH_FREE_FILES]
    assert "config.py" in chosen
    modules = [f"mixtral.{path.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__") for path in chosen]
    assert "torch" not in loaded(run_python("\n".join(f"import {module}" for module in modules)))


def test_importing_mixtral_is_light() -> None:
    assert loaded(run_python("import mixtral")) == []


def test_the_help_text_is_light() -> None:
    call = "from mixtral.cli import main\nsys.argv = ['mixtral', '--help']\ntry:\n    main()\n"
    result = run_python(call + "except SystemExit as end:\n    assert not end.code, end.code")
    assert loaded(result) == []
    assert "serve" in result.stdout


def test_a_heavy_import_is_seen(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "sly.py").write_text("import torch")
    assert loaded(run_python("import sly", tmp_path)) == ["torch"]


def test_public_names_are_the_pinned_ones() -> None:
    pinned = (ROOT / "tests" / "pinned" / "public.txt").read_text(encoding="utf-8").split()
    assert sorted(mixtral.__all__) == pinned
    assert [name for name in pinned if getattr(mixtral, name, None) is None] == []


def test_the_file_map_of_the_readme_is_the_tree() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert filemap["replace"](readme, filemap["render"](ROOT)) == readme, "run: make map"


@pytest.mark.parametrize("change", ["add", "remove", "rename"])
def test_a_wrong_file_map_is_seen(tmp_path: Path, change: str) -> None:
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text('"""Something."""\n')
    readme = f"# Title\n{filemap['render'](tmp_path)}\nrest\n"
    assert "a.py  Something" in readme
    if change == "add":
        (tmp_path / "c.py").write_text('"""More."""\n')
    elif change == "remove":
        (tmp_path / "a.py").unlink()
    else:
        (tmp_path / "a.py").rename(tmp_path / "d.py")
    assert filemap["replace"](readme, filemap["render"](tmp_path)) != readme


def test_a_file_that_says_nothing_of_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"a\.py: nothing describes it"):
        filemap["render"](tmp_path)
