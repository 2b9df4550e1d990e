"""What the compiled module is made of: outside of an instruction set's own code, what every x86-64 processor runs."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from mixtral.ops.native import module

NATIVE = Path(__file__).resolve().parents[2] / "native"
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl")
# The namespaces of kernels, with the options that native/CMakeLists.txt has for them; and those of encoders.
KERNELS = {
    "baseline": (),
    "avx2": AVX2,
    "avx512vnni": (*AVX2, *AVX512, "-mavx512vnni"),
    "avx512bf16": (*AVX2, *AVX512, "-mavx512vnni", "-mavx512bf16", "-DMIXTRAL_BF16"),
    "amx": (*AVX2, *AVX512, "-mavx512vnni", "-mavx512bf16", "-DMIXTRAL_BF16", "-DMIXTRAL_AMX"),
}
ENCODERS = {"baseline": (), "avx2": ("-mavx2",), "avx512": AVX512}
LEVELS = ("baseline", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx")
SOURCES = [
    (name, level)
    for level in KERNELS
    if level != "amx"
    for name in ("gemm", "rows", "attention", "decode", "dense", "documents", "passes", "peaks")
]
SOURCES += [("documents_bf16", "avx512bf16")]
SOURCES += [(name, "amx") for name in ("amx", "amx_dense", "peaks")]

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="not an x86-64 processor")

# --- instructions, as objdump writes them ----------------------------------------------------------------------------

FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
VEX = re.compile(r"\t(?:\{\w+\} )?v")
EVEX = re.compile(r"%zmm|%k[0-7]|%[xy]mm(?:1[6-9]|2\d|3[01])")
VNNI, BF16 = re.compile(r"\tvpdp[bw]"), re.compile(r"\tv(?:dpbf16|cvtne)")
AMX = re.compile(r"%tmm|\t(?:ld|st)tilecfg|\ttilerelease")
AFTER_SSE2 = re.compile(
    r"\t(?:popcnt|lzcnt|crc32|movbe|pshufb|palignr|ptest|p?blend|round[sp][sd]|pmov[sz]x|pinsr[bdq]|pextr[bdq]|pmulld"
    r"|pmulhrsw|pmaddubsw|pabs|psign|ph(?:add|sub)|h(?:add|sub)p|addsubp|lddqu|movddup|movs[hl]dup|pmin(?:u[wd]|s[bd])"
    r"|pmax(?:u[wd]|s[bd])|pcmp(?:eqq|gtq|.str)|dpp[sd]|insertps|extractps|packusdw|andn\b|bextr|bls|bzhi|mulx|pdep"
    r"|pext\b|rorx|sarx|shlx|shrx|adcx|adox)"
)
FORBIDDEN = {
    "": (VEX, EVEX, AFTER_SSE2, AMX),
    "baseline": (VEX, EVEX, AFTER_SSE2, AMX),
    "avx2": (EVEX, VNNI, BF16, AMX),
    "avx512": (VNNI, BF16, AMX),
    "avx512vnni": (BF16, AMX),
    "avx512bf16": (AMX,),
    "amx": (),
}


def level_of(name: str) -> str:
    """The level of a function by its name as the linker has it; empty for what has none."""
    return next((level for level in LEVELS if f"7mixtral{len(level)}{level}" in name), "")


def functions(lines: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Functions, and the instructions of each."""
    name, body = "", list[str]()
    for line in lines:
        if found := FUNCTION.match(line):
            yield name, body
            name, body = found[1], []
        elif "\t" in line:
            body.append(line.partition(" <")[0])  # what follows is the name of a function, not an operand
    yield name, body


def wrong(lines: Iterable[str]) -> list[str]:
    """Instructions that a function's level does not have."""
    return [
        f"{name}: {line.strip()}"
        for name, body in functions(lines)
        for pattern in FORBIDDEN[level_of(name)]
        if pattern.search("\n".join(body))
        for line in body
        if pattern.search(line)
    ]


def tool(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed (package binutils)")
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout.splitlines()


def test_every_function_keeps_to_its_level() -> None:
    if not tool("nm", module().__file__):
        pytest.skip("the compiled module has no symbols: it was installed from a wheel")
    lines = tool("objdump", "-d", "--no-show-raw-insn", module().__file__)
    assert wrong(lines) == []
    seen = Counter(level_of(name) for name, _ in functions(lines))
    assert set(seen) == {"", *LEVELS}
    assert min(seen.values()) >= 3, seen
    # The detectors see what is there: the same functions would be wrong one level below.
    for level, below in zip(LEVELS[1:], LEVELS, strict=False):
        body = "\n".join(line for name, body in functions(lines) if level_of(name) == level for line in body)
        assert any(pattern.search(body) for pattern in FORBIDDEN[below]), level


@pytest.mark.parametrize(
    ("name", "instruction", "fine"),
    [
        ("_ZN7mixtral8baseline12_GLOBAL__N_13dotE", "movaps %xmm1,%xmm0", True),
        ("_ZN7mixtral8baseline12_GLOBAL__N_13dotE", "tzcnt  %eax,%eax", True),  # older processors read it as bsf
        ("_ZN7mixtral8baseline12_GLOBAL__N_13dotE", "vmovaps %xmm1,%xmm0", False),
        ("_ZN7mixtral8baseline12_GLOBAL__N_13dotE", "pmulld %xmm1,%xmm0", False),
        ("_ZN7mixtral6attendE", "vaddps %ymm0,%ymm1,%ymm2", False),
        ("_ZNK7mixtral5Heads6paddedEv", "{vex} vpdpbusd %xmm0,%xmm1,%xmm2", False),
        ("_ZN7mixtral4avx212_GLOBAL__N_13dotE", "vaddps %ymm0,%ymm1,%ymm2", True),
        ("_ZN7mixtral4avx212_GLOBAL__N_13dotE", "vaddps %ymm0,%ymm1,%ymm16", False),
        ("_ZN7mixtral4avx212_GLOBAL__N_13dotE", "vaddps %zmm0,%zmm1,%zmm2", False),
        ("_ZN7mixtral6avx51212_GLOBAL__N_13dotE", "vaddps %zmm0,%zmm1,%zmm2{%k1}{z}", True),
        ("_ZN7mixtral6avx51212_GLOBAL__N_13dotE", "vpdpbusd %zmm0,%zmm1,%zmm2", False),
        ("_ZN7mixtral10avx512vnni12_GLOBAL__N_13dotE", "vpdpbusd %zmm0,%zmm1,%zmm2", True),
        ("_ZN7mixtral10avx512vnni12_GLOBAL__N_13dotE", "vdpbf16ps %zmm0,%zmm1,%zmm2", False),
        ("_ZN7mixtral10avx512bf1612_GLOBAL__N_13dotE", "vdpbf16ps %zmm0,%zmm1,%zmm2", True),
        ("_ZN7mixtral10avx512bf1612_GLOBAL__N_13dotE", "tdpbssd %tmm2,%tmm1,%tmm0", False),
        ("_ZN7mixtral7projectE", "ldtilecfg 0x10(%rip)", False),
        ("_ZN7mixtral3amx12_GLOBAL__N_13dotE", "tdpbssd %tmm2,%tmm1,%tmm0", True),
        ("_ZN7mixtral3amx12_GLOBAL__N_13dotE", "tilerelease", True),
        ("_ZN7mixtral10avx512vnni12_GLOBAL__N_13dotE", "tilerelease", False),
        ("main", "call 10 <vaddps %zmm0>", True),
    ],
)
def test_a_wrong_instruction_is_seen(name: str, instruction: str, fine: bool) -> None:
    assert (wrong([f"0000000000001000 <{name}>:", f"    1000:\t{instruction}"]) == []) == fine


# --- names that the linker could take from the wrong level -----------------------------------------------------------


def shared(lines: Iterable[str]) -> list[str]:
    """Defined names of an object file, as nm lists them, that another one may have too, or that run at import."""
    found = (line.split() for line in lines)
    return [parts[-1] for parts in found if parts[-2] in "WVu" or parts[-1].startswith("_GLOBAL__sub_I")]


def compiled(source: Path, folder: Path, *options: str) -> list[str]:
    """Names in an object file in which no function has been inlined that need not be."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = folder / "one.o"
    command = [compiler, "-std=c++20", "-O0", "-fPIC", f"-I{NATIVE / 'include'}", f"-I{NATIVE / 'src'}", *options]
    subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True, timeout=100)
    return tool("nm", "--defined-only", str(target))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "level"), SOURCES)
def test_kernels_share_no_function_with_other_levels(name: str, level: str, tmp_path: Path) -> None:
    """The linker keeps one copy of an inline function: it must not be one with the widest registers."""
    lanes = {"baseline": 4, "avx2": 8}.get(level, 16)
    options = ("-DMIXTRAL_X86", f"-DMIXTRAL_LEVEL={level}", f"-DMIXTRAL_LANES={lanes}", *KERNELS[level])
    assert shared(compiled(NATIVE / "src" / f"{name}.cpp", tmp_path, *options)) == []


@pytest.mark.slow
@pytest.mark.parametrize("level", ENCODERS)
@pytest.mark.parametrize("name", ["kquants", "groups"])
def test_encoders_share_no_function_with_other_levels(name: str, level: str, tmp_path: Path) -> None:
    width = {"baseline": 4, "avx2": 8}.get(level, 16)
    options = ("-DMIXTRAL_X86", f"-DMIXTRAL_LEVEL={level}", f"-DMIXTRAL_WIDTH={width}", *ENCODERS[level])
    assert shared(compiled(NATIVE / "src" / f"{name}.cpp", tmp_path, *options)) == []


@pytest.mark.slow
def test_a_shared_function_is_seen(tmp_path: Path) -> None:
    source = tmp_path / "one.cpp"
    source.write_text(
        '#include "mixtral/inline.h"\n'
        "struct A { int b; inline int c() const { return b; } MIXTRAL_INLINE int d() const { return b; } };\n"
        "int made(); int once = made();\n"
        "int e(const A& a) { return a.c() + a.d(); }\n"
    )
    assert sorted(shared(compiled(source, tmp_path))) == ["_GLOBAL__sub_I_one.cpp", "_ZNK1A1cEv"]
