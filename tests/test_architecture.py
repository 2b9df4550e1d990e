"""The rules of the code's structure, read from the source alone. Every detector is also shown texts that break it."""

from __future__ import annotations

import ast
import re
import runpy
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "mixtral"
filemap = runpy.run_path(str(ROOT / "scripts" / "filemap.py"))

# part -> (parts of mixtral it may import, third-party modules it may import). Every part may import BASE.
BASE = {"errors", "config", "faults", "limits", "log"}
IMPORTS: dict[str, tuple[set[str], set[str]]] = {
    "errors": (set(), set()),
    "config": (set(), set()),
    "limits": (set(), set()),
    "faults": (set(), set()),
    "log": (set(), set()),
    "desk": (set(), set()),
    "plan": (set(), set()),
    "wire": (set(), {"msgspec"}),
    "tokenizer": (set(), {"mistral_common", "sentencepiece"}),
    "grammar": ({"tokenizer", "wire"}, {"llguidance", "numpy"}),
    "ops": ({"_native"}, {"torch", "numpy"}),
    "model": ({"ops"}, {"torch"}),
    "quant": ({"model", "ops", "_native"}, {"torch", "numpy", "gguf"}),
    "compiled": ({"model", "ops", "quant"}, {"torch"}),
    "files": ({"ops", "quant"}, {"torch", "numpy"}),
    "weights": ({"model", "ops", "quant", "files"}, {"torch", "numpy", "safetensors"}),
    "adapters": ({"model", "ops", "quant", "compiled", "weights", "files"}, {"torch"}),
    "engine": ({"model", "ops", "wire"}, {"torch", "numpy", "msgspec"}),
    "server": (
        {"wire", "tokenizer", "grammar"},
        {"fastapi", "starlette", "uvicorn", "h11", "msgspec", "prometheus_client"},
    ),
    "parallel": ({"model", "ops"}, {"torch", "safetensors"}),
    "train": (
        {"model", "ops", "parallel", "quant", "weights", "tokenizer", "desk", "adapters"},
        {"torch", "numpy", "safetensors"},
    ),
    "evaluate": ({"tokenizer", "wire", "desk"}, {"numpy"}),
    "results": ({"tokenizer", "wire"}, set()),
    "forms": ({"grammar", "tokenizer", "wire"}, {"numpy"}),
    "api": (
        {"forms", "results", "adapters", "compiled", "model", "ops", "weights", "tokenizer", "wire", "engine"},
        {"torch"},
    ),
    # The peers are imported in interpreters of theirs, by a script that imports nothing of mixtral.
    "bench": (
        {"api", "engine", "ops", "weights", "files", "quant", "plan"},
        {"torch", "numpy", "matplotlib", "llama_cpp", "transformers", "vllm"},
    ),
    "build": ({"api", "engine", "grammar", "wire"}, {"msgspec"}),
    "worker": ({"build", "engine", "wire"}, set()),
    "__init__": ({"api", "wire"}, set()),
    "__main__": ({"cli"}, set()),
    "cli": (set(), {"typer", "rich"}),  # imports the rest of mixtral inside functions only
}
FILE_LINES, FUNCTION_LINES, FUNCTION_LINES_P95, PART_LINES = 500, 60, 45, 2200
# Adapters that are trained, merged, read from files of others and served at once; writers of six skills in five
# languages, with their words; ten layouts, their checks, a cache; a scheduler and its parts; an HTTP edge that checks
# all fields, and two kinds of processes behind it; a file per command; three recipes with their configurations, the
# user's files, states, records and references.
OTHER_PART_LINES = {
    "adapters": 2400,
    "desk": 2700,
    "tokenizer": 1200,
    "quant": 2800,
    "weights": 3600,
    "engine": 2400,
    "server": 5800,
    "cli": 3200,
    "train": 4400,
}
MAY_PRINT = ("cli/output.py",)
MAY_READ_ENVIRONMENT = ("ops/native.py", "parallel/mesh.py", "parallel/ray.py", "bench/peers.py")
MAY_NAME_CUDA = ("ops/cuda.py", "ops/triton.py", "engine/graphs.py", "parallel/mesh.py", "offload/store.py")
MAY_START_THREADS = ("server/", "files/ahead.py", "engine/loop.py", "offload/store.py", "train/saves.py")
NO_ASSERT = ("server/", "wire/", "files/", "weights/", "tokenizer/", "grammar/")
PICKLES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "_pickle"}
MAY_UNPICKLE = ("files/pth.py",)  # with weights_only, behind an explicit option
PICKLING_CALLS = {
    *("torch.load", "torch.save", "gather_object", "all_gather_object"),
    *("broadcast_object_list", "scatter_object_list"),
}


@dataclass(frozen=True)
class Source:
    """One Python file; `path` is relative to src/mixtral."""

    path: str
    text: str

    @property
    def part(self) -> str:
        return self.path.split("/")[0].removesuffix(".py")

    @property
    def tree(self) -> ast.Module:
        return parse(self.text)


@cache
def parse(text: str) -> ast.Module:
    return ast.parse(text)


@cache
def walk(text: str) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(parse(text)))


@cache
def package_sources() -> tuple[Source, ...]:
    return tuple(
        Source(path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    )


def functions(source: Source) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in walk(source.text) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def dotted(node: ast.AST) -> str:
    """`a.b.c` for names and attributes, else the empty string."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imported(source: Source, node: ast.AST) -> list[str]:
    """Full names that an import statement asks for; relative ones resolved."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    module = node.module or ""
    if node.level:
        folder = ["mixtral", *source.path.split("/")[:-1]]
        module = ".".join([*folder[: len(folder) - node.level + 1], *filter(None, [module])])
    return [f"{module}.{alias.name}" for alias in node.names]


def outside_functions(tree: ast.Module) -> set[ast.AST]:
    """Nodes that run at import; bodies of functions and of `if TYPE_CHECKING` left out."""
    found: set[ast.AST] = set()
    queue: list[ast.AST] = [tree]
    while queue:
        node = queue.pop()
        found.add(node)
        if isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING"):
            queue.extend(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            queue.extend(ast.iter_child_nodes(node))
    return found


# --- detectors: each yields "line: what is wrong" ---------------------------------------------------------------------


def bad_imports(source: Source) -> Iterator[str]:
    ours, foreign = IMPORTS.get(source.part, (set(), set()))
    at_import = outside_functions(source.tree) if source.part == "cli" else set()
    for node in walk(source.text):
        for name in imported(source, node):
            top, _, rest = name.partition(".")
            part = rest.split(".")[0]
            if top == "mixtral":
                free = source.part == "cli" and node not in at_import
                if not (free or part in ours | BASE | {source.part, "__version__"}):
                    yield f"{node.lineno}: {source.part} may not import {name}"
            elif top not in sys.stdlib_module_names | foreign | {"__future__"}:
                yield f"{node.lineno}: {source.part} may not import {name}"


def long_code(source: Source) -> Iterator[str]:
    lines = source.text.count("\n")
    if lines > FILE_LINES:
        yield f"1: {lines} lines; the limit is {FILE_LINES}"
    for node in functions(source):
        if function_lines(node) > FUNCTION_LINES:
            yield f"{node.lineno}: {node.name} has {function_lines(node)} lines; the limit is {FUNCTION_LINES}"


def untyped(source: Source) -> Iterator[str]:
    for node in functions(source):
        a = node.args
        arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
        bare = [x.arg for x in arguments if x.annotation is None and x.arg not in {"self", "cls"}]
        if bare or node.returns is None:
            yield f"{node.lineno}: {node.name} lacks types: {', '.join(bare) or 'return'}"


def printing(source: Source) -> Iterator[str]:
    for node in walk(source.text):
        call = isinstance(node, ast.Call) and dotted(node.func) in {"print", "builtins.print"}
        if call and source.path not in MAY_PRINT:
            yield f"{node.lineno}: print belongs in cli/output.py"


def environment(source: Source) -> Iterator[str]:
    names = {"os.environ", "os.environb", "os.getenv", "os.putenv"}
    for node in walk(source.text):
        if names & {dotted(node), *imported(source, node)} and source.path not in MAY_READ_ENVIRONMENT:
            yield f"{node.lineno}: no environment variable changes behaviour"


def unsafe(source: Source) -> Iterator[str]:
    for node in walk(source.text):
        names = {name.split(".")[0] for name in imported(source, node)} & PICKLES
        names |= {name for name in [dotted(node), *imported(source, node)] if ends_in(name, PICKLING_CALLS)}
        if source.path in MAY_UNPICKLE and (not isinstance(node, ast.Call) or is_safe_load(node)):
            names.discard("torch.load")
        elif isinstance(node, ast.Call) and dotted(node.func) == "torch.load":
            names.add("torch.load")
        if isinstance(node, ast.Call):
            names |= {dotted(node.func)} & {"eval", "exec", "builtins.eval", "builtins.exec", "os.system"}
            for keyword in node.keywords:
                if keyword.arg in {"shell", "allow_pickle"} and getattr(keyword.value, "value", None) is not False:
                    names.add(f"{keyword.arg}=")
        for name in sorted(names):
            yield f"{node.lineno}: {name} can run code that came from outside"


def is_safe_load(node: ast.Call) -> bool:
    """Whether a call of ``torch.load`` says ``weights_only=True``."""
    return any(word.arg == "weights_only" and getattr(word.value, "value", None) is True for word in node.keywords)


def ends_in(name: str, endings: set[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def concurrency(source: Source) -> Iterator[str]:
    for node in walk(source.text):
        waits = isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith)
        loops = {name.split(".")[0] for name in imported(source, node)} & {"asyncio", "anyio", "trio"}
        if (waits or loops) and not source.path.startswith("server/"):
            yield f"{node.lineno}: asynchronous code belongs in server/"
        starts = isinstance(node, ast.Call) and ends_in(dotted(node.func), {"Thread", "ThreadPoolExecutor"})
        if starts and not source.path.startswith(MAY_START_THREADS):
            yield f"{node.lineno}: no thread is started here"


def asserting(source: Source) -> Iterator[str]:
    for node in walk(source.text):
        if isinstance(node, ast.Assert) and source.path.startswith(NO_ASSERT):
            yield f"{node.lineno}: assert vanishes under -O; raise instead"


def careless(source: Source) -> Iterator[str]:
    makers = {"list", "dict", "set", "bytearray", "defaultdict", "collections.defaultdict"}
    mutable = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
    for node in walk(source.text):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{node.lineno}: bare except"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
                if isinstance(default, mutable) or (isinstance(default, ast.Call) and dotted(default.func) in makers):
                    yield f"{default.lineno}: a default argument that can change"


def probing(source: Source) -> Iterator[str]:
    """`hasattr(x, "name")` hides which type x has; features of torch and of the system may be probed."""
    for node in walk(source.text):
        if isinstance(node, ast.Call) and dotted(node.func) in {"hasattr", "getattr"} and len(node.args) > 1:
            fixed = isinstance(node.args[1], ast.Constant)
            if fixed and dotted(node.args[0]).split(".")[0] not in {"torch", "os", "sys", "signal"}:
                yield f"{node.lineno}: {dotted(node.func)} with a constant name"


def naming_cuda(source: Source) -> Iterator[str]:
    for node in walk(source.text):
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        attribute = isinstance(node, ast.Attribute) and node.attr in {"cuda", "is_cuda"}
        module = any(name.split(".")[:2] == ["torch", "cuda"] for name in imported(source, node))
        if (re.fullmatch(r"cuda(:.*)?", text) or attribute or module) and source.path not in MAY_NAME_CUDA:
            yield f"{node.lineno}: names one kind of device"


def exports(source: Source) -> Iterator[str]:
    """`__all__` lists defined names, and all public classes and functions; a file of one docstring needs none."""
    body = source.tree.body
    if source.path == "__main__.py" or (len(body) == 1 and ast.get_docstring(source.tree)) or not body:
        return
    lists = [n.value for n in body if isinstance(n, ast.Assign) and any(dotted(t) == "__all__" for t in n.targets)]
    if len(lists) != 1:
        yield "1: no __all__"
        return
    try:
        listed = set(ast.literal_eval(lists[0]))
    except ValueError:
        yield f"{lists[0].lineno}: __all__ is not a literal"
        return
    classes = [n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    public = {n.name for n in classes if not n.name.startswith("_") and n.name != "main"}
    yield from (f"1: {name!r} is missing from __all__" for name in sorted(public - listed))
    yield from (f"1: __all__ lists {name!r}, which is not defined" for name in sorted(listed - defined(source)))


def defined(source: Source) -> set[str]:
    """Names bound outside functions, those under `if TYPE_CHECKING` included (they are resolved lazily)."""
    names: set[str] = set()
    for node in walk(source.text):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def own_paths(source: Source) -> Iterator[str]:
    """Paths of one person's machine."""
    pattern = r"(?<![\w.:/])/(?:" + "|".join(["home", "work", "Users"]) + r")/\w"
    for number, line in enumerate(source.text.splitlines(), 1):
        if re.search(pattern, line):
            yield f"{number}: a path of one machine"


# detector -> texts that break its rule, each as (path, text)
DETECTORS: dict[Callable[[Source], Iterator[str]], list[tuple[str, str]]] = {
    bad_imports: [
        ("ops/x.py", "from mixtral.model import Mixtral"),
        ("ops/x.py", "def f():\n    import mixtral.weights.load"),
        ("ops/x.py", "from mixtral import engine"),
        ("ops/x.py", "from ..model import Mixtral"),
        ("model/x.py", "if TYPE_CHECKING:\n    from mixtral.api import LLM"),
        ("server/x.py", "def f():\n    import torch"),
        ("desk/x.py", "import numpy as np"),
        ("cli/x.py", "from mixtral.api import load"),
        ("config.py", "from mixtral.desk import source"),
        ("server/x.py", "import mixtral"),
        ("server/x.py", "from mixtral import load"),
    ],
    long_code: [
        ("ops/x.py", "x = 1\n" * 501),
        ("ops/x.py", "def f():\n" + "    x = 1\n" * 60),
    ],
    untyped: [
        ("ops/x.py", "def f(a, b: int) -> int: ..."),
        ("ops/x.py", "def f(a: int): ..."),
        ("ops/x.py", "async def f(*a) -> int: ..."),
        ("ops/x.py", "def f(a: int, **b) -> int: ..."),
        ("ops/x.py", "class C:\n    def f(self, *, a) -> int: ..."),
    ],
    printing: [("cli/chat.py", "def f():\n    print(1)")],
    environment: [
        ("cli/x.py", "import os\nos.environ['A']"),
        ("cli/x.py", "from os import environ"),
        ("cli/x.py", "import os\nos.getenv('A')"),
    ],
    unsafe: [
        ("ops/x.py", "import pickle"),
        ("ops/x.py", "def f():\n    from marshal import loads"),
        ("ops/x.py", "eval('1')"),
        ("ops/x.py", "exec('1')"),
        ("ops/x.py", "subprocess.run('ls', shell=True)"),
        ("weights/x.py", "torch.load(path, weights_only=True)"),
        ("files/pth.py", "torch.load(path)"),
        ("files/pth.py", "torch.load(path, weights_only=False)"),
        ("weights/x.py", "from torch import load"),
        ("ops/x.py", "torch.distributed.broadcast_object_list(x)"),
        ("ops/x.py", "np.load(path, allow_pickle=True)"),
    ],
    concurrency: [
        ("engine/x.py", "async def f(): ..."),
        ("engine/x.py", "import asyncio"),
        ("engine/x.py", "threading.Thread(target=f)"),
    ],
    asserting: [("wire/x.py", "assert x"), ("weights/x.py", "def f():\n    assert x, 'why'")],
    careless: [
        ("ops/x.py", "def f(a=[]): ..."),
        ("ops/x.py", "def f(*, a={}): ..."),
        ("ops/x.py", "f = lambda a=set(): a"),
        ("ops/x.py", "try:\n    f()\nexcept:\n    pass"),
    ],
    probing: [("ops/x.py", "hasattr(x, 'y')"), ("ops/x.py", "getattr(x, 'y', None)")],
    naming_cuda: [
        ("model/x.py", "x.to('cuda')"),
        ("model/x.py", "x.to('cuda:0')"),
        ("model/x.py", "torch.cuda.is_available()"),
        ("model/x.py", "x.cuda()"),
        ("model/x.py", "from torch import cuda"),
    ],
    exports: [
        ("ops/x.py", "x = 1"),
        ("ops/x.py", "__all__ = ['y']\nx = 1"),
        ("ops/x.py", "__all__ = ['f']\ndef f(): ...\ndef g(): ..."),
        ("ops/x.py", "__all__ = [*names]"),
    ],
    own_paths: [("ops/x.py", "x = '/" + "home/someone/file'"), ("ops/x.py", "# see /" + "work/file")],
}


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda detector: detector.__name__)
def test_the_package_keeps_the_rule(detector: Callable[[Source], Iterator[str]]) -> None:
    found = [f"src/mixtral/{source.path}:{text}" for source in package_sources() for text in detector(source)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("detector", "path", "text"),
    [(detector, *case) for detector, cases in DETECTORS.items() for case in cases],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_the_detector_sees_a_broken_rule(detector: Callable[[Source], Iterator[str]], path: str, text: str) -> None:
    assert list(detector(Source(path, text)))


def test_detectors_accept_what_is_allowed() -> None:
    good = """'Fine.'
from __future__ import annotations
import os
import torch
from mixtral.errors import ConfigError
from mixtral.ops import linear
__all__ = ["Layer"]
class Layer:
    def eval(self, a: int = 1) -> None:
        assert a
        self.eval(a)
        os.replace("cudart", f"{a}")
        getattr(torch, "x", None)
"""
    assert [text for detector in DETECTORS for text in detector(Source("model/x.py", good))] == []


# --- the tree as a whole ----------------------------------------------------------------------------------------------


def test_every_part_has_a_row_in_the_import_table() -> None:
    assert {source.part for source in package_sources()} == set(IMPORTS)


def test_the_import_table_has_no_cycle() -> None:
    rows = {part: set(ours) for part, (ours, _) in IMPORTS.items()}
    while leaves := [part for part, ours in rows.items() if not ours & rows.keys()]:
        for part in leaves:
            del rows[part]
    assert not rows


def test_parts_stay_within_their_size() -> None:
    sizes: Counter[str] = Counter()
    for source in package_sources():
        sizes[source.part if "/" in source.path else "top level"] += source.text.count("\n")
    assert OTHER_PART_LINES.keys() <= sizes.keys()
    assert {part: lines for part, lines in sizes.items() if lines > OTHER_PART_LINES.get(part, PART_LINES)} == {}


def test_most_functions_are_short() -> None:
    lengths = [function_lines(node) for source in package_sources() for node in functions(source)]
    assert statistics.quantiles(lengths, n=20)[-1] <= FUNCTION_LINES_P95


def test_tests_and_scripts_keep_the_file_limit() -> None:
    names = [name for name in filemap["project_files"](ROOT) if name.endswith(".py")]
    lines = {name: (ROOT / name).read_text(encoding="utf-8").count("\n") for name in names}
    assert {name: count for name, count in lines.items() if count > FILE_LINES} == {}


def test_no_text_names_a_path_of_one_machine() -> None:
    texts = [name for name in filemap["project_files"](ROOT) if not name.endswith((".safetensors", ".bin", ".npz"))]
    found = []
    for name in texts:
        source = Source(name, (ROOT / name).read_text(encoding="utf-8", errors="replace"))
        found += [f"{name}:{text}" for text in own_paths(source)]
    assert not found, "\n".join(found)
