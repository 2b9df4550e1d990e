"""Containers of tensors on disk: safetensors, GGUF, pickled archives. What the tensors mean is told by ``weights``."""
