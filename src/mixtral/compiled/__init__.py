"""A loaded model on compiled kernels: CPU inference in which a token's bits depend on nothing but its own sequence."""

from mixtral.compiled.attach import compile_model
from mixtral.compiled.cache import KV_DTYPES, CompiledCache

__all__ = ["KV_DTYPES", "CompiledCache", "compile_model"]
