"""The single-device Mixtral: knows nothing of files, formats, sharding, sampling or text."""

from mixtral.model.batch import Batch, Context, Output
from mixtral.model.cache import PAGE_SIZE, PagedCache
from mixtral.model.documents import Documents
from mixtral.model.init import initial_values, initialise
from mixtral.model.mixtral import Mixtral

__all__ = [
    "PAGE_SIZE",
    "Batch",
    "Context",
    "Documents",
    "Mixtral",
    "Output",
    "PagedCache",
    "initial_values",
    "initialise",
]
