"""Find a base whose stored output head has other values than the embedding.

transformers 5 never ties such a head to the embedding, even if the config says that the two are
tied. The config of a T5 1.1 that transformers 5 saved is an example.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert.base.model import BaseModel
from vera_convert.base.quantized.unpack import unpacked
from vera_convert.base.tied import is_head
from vera_convert.base.vocabulary import shared_embedding
from vera_convert.errors import SurroundingsError
from vera_convert.files.tensorfile import NUMPY_DTYPE
from vera_convert.hub.lookup import HubAccess, open_file

_SAMPLES = 4


def stored_heads(base: BaseModel) -> Iterator[tuple[str, str]]:
    """Yield each stored output head, and the stored embedding of the same shape."""
    for name, tensor in base.tensors.items():
        shape = tensor.info.shape
        if len(shape) == 2 and is_head(name, base):
            embedding = shared_embedding(base, *shape)
            if embedding is not None and base.tensors[embedding].info.shape == shape:
                yield name, embedding


def shows_own_head(base: BaseModel, access: HubAccess) -> bool:
    """Say whether a few rows of a stored head differ from the embedding's.

    On the Hub, each row costs a request of some kilobytes. Without these rows, the answer is no.
    """
    whole = unpacked(base)
    for pair in stored_heads(whole.view):
        # A packed weight has tensors of its own.
        if not whole.weights.keys().isdisjoint(pair) or _rows_differ(base, *pair, access):
            return True
    return False


def _rows_differ(base: BaseModel, head: str, embedding: str, access: HubAccess) -> bool:
    try:
        rows, others = (_rows(base, name, access) for name in (embedding, head))
    except SurroundingsError:
        return False
    return others.astype(rows.dtype).tobytes() != rows.tobytes()


def _rows(base: BaseModel, name: str, access: HubAccess) -> NDArray[Any]:
    """Return some rows of a matrix, at equal distances."""
    tensor = base.tensors[name]
    (rows, columns), dtype = tensor.info.shape, NUMPY_DTYPE[tensor.info.dtype]
    start, size = base.files[tensor.file].data_start + tensor.info.start, columns * dtype.itemsize
    chosen = [(2 * n + 1) * rows // (2 * _SAMPLES) for n in range(_SAMPLES)]
    with open_file(base.location, tensor.file, access) as file:
        found = b"".join(file.read_at(start + row * size, size) for row in chosen)
    return np.frombuffer(found, dtype)
