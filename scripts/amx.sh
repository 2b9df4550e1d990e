#!/usr/bin/env bash
# Builds the compiled part with an emulation of AMX into build/amx, and runs the emulator's test and the kernel tests on it.
#
# Needs AVX-512 with VNNI and BF16. On a processor that has AMX, it is used itself. PYTHON names an environment with the
# tools for tests; ARGS goes to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
root=$PWD/build/amx

"$python" -m pip install --quiet --no-deps --upgrade --target "$root/site" . \
  -C build-dir="$root/objects" -C install.strip=false -C cmake.define.MIXTRAL_EMULATE_AMX=ON
PYTHONPATH="$root/site" "$python" -c '
import sys
import mixtral._native as native
assert "build/amx" in native.__file__, native.__file__
if "amx" not in native.kernel_levels():
    sys.exit("this processor has no AVX-512 with VNNI and BF16, which the kernels for AMX use too")'
"$root/objects/tiles"
"$root/objects/stress" amx
PYTHONPATH="$root/site" "$python" -m pytest -q -p no:cacheprovider -m "not slow and not peers" \
  tests/compiled tests/quant/test_panels.py tests/bench/test_limits.py ${ARGS:-}
