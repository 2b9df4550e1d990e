#!/usr/bin/env bash
# Builds the compiled part with sanitizers into build/sanitize, and runs the kernel tests and the stress test on it.
#
# Needs GCC with libasan, libubsan and libtsan. PYTHON names an environment with the tools for tests; ARGS goes to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
compiler=${CXX:-c++}
root=$PWD/build/sanitize

library() {
  local found
  found=$("$compiler" -print-file-name="$1")
  [[ $found == /* ]] || { echo "$compiler has no $1; the sanitizers of GCC are needed" >&2; exit 1; }
  echo "$found"
}

# build KIND SANITIZERS: the package into $root/KIND/site, objects beside it.
build() {
  echo "== $2"
  "$python" -m pip install --quiet --no-deps --upgrade --target "$root/$1/site" . \
    -C build-dir="$root/$1/objects" -C install.strip=false -C cmake.define.MIXTRAL_SANITIZE="$2"
}

# finds WORDS COMMAND...: a fault that is there on purpose ends the command, with these words.
finds() {
  local words=$1 told
  shift
  if told=$("$@" 2>&1) || ! grep -q "$words" <<<"$told"; then
    echo "$told"
    echo "a fault was not found: $*" >&2
    exit 1
  fi
}

asan=$(library libasan.so)
build address address,undefined
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
finds heap-buffer-overflow "$root/address/objects/stress" beyond
finds 'signed integer overflow' "$root/address/objects/stress" overflow
levels=$(LD_PRELOAD="$asan $(library libstdc++.so)" PYTHONPATH="$root/address/site" "$python" -c '
import mixtral._native as native
assert "build/sanitize" in native.__file__, native.__file__
print(*native.kernel_levels())')
"$root/address/objects/stress" $levels
# Capturing in Python alone: what a sanitizer says goes to the terminal.
LD_PRELOAD="$asan $(library libstdc++.so)" PYTHONPATH="$root/address/site" "$python" -m pytest -q --capture=sys \
  -p no:cacheprovider --timeout=300 -m "not peers and not slow" \
  tests/compiled tests/ops/test_compiled.py tests/quant/test_panels.py tests/quant/test_native.py ${ARGS:-}

library libtsan.so >/dev/null
build thread thread
# Addresses that are too random are none that it knows; in a child its threads are those of the parent.
plain=(setarch "$(uname -m)" -R)
"${plain[@]}" true 2>/dev/null || plain=()
export TSAN_OPTIONS=die_after_fork=0:halt_on_error=1
finds 'data race' "${plain[@]}" "$root/thread/objects/stress" race
"${plain[@]}" "$root/thread/objects/stress" $levels
