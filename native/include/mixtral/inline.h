// How functions are written in headers that the kernels of every instruction set include.
#pragma once

// Never a function of its own. As one it would be compiled for each instruction set, and the linker, which keeps one copy
// of an inline function, might keep that of the widest registers for everybody (tests/compiled/test_objects.py).
#define MIXTRAL_INLINE __attribute__((always_inline)) inline
