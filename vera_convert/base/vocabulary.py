"""The vocabulary of a base: the embedding, the rows, and the config's fields for the size."""

from __future__ import annotations

from collections.abc import Mapping

from vera_convert.base.model import BaseModel
from vera_convert.embeddings import is_embedding


def embedding_rows(base: BaseModel) -> int | None:
    """Return the number of rows of the base's embedding; None if unknown or ambiguous."""
    rows = {
        tensor.info.shape[0]
        for name, tensor in base.tensors.items()
        if is_embedding(name.removesuffix(".weight")) and len(tensor.info.shape) == 2
    }
    return rows.pop() if len(rows) == 1 else None


def shared_embedding(base: BaseModel, rows: int | None, widest: int | None = None) -> str | None:
    """Return the embedding to share with an output head; None if absent or ambiguous.

    Args:
        base: the base.
        rows: rows of the head and of the embedding; None for any number.
        widest: the most columns of the embedding; None for any number.
    """
    found = [
        name
        for name, tensor in base.tensors.items()
        if is_embedding(name.removesuffix(".weight"))
        and len(tensor.info.shape) == 2
        and rows in (None, tensor.info.shape[0])
        and (widest is None or tensor.info.shape[1] <= widest)
    ]
    # T5 and BART store a copy for each stack beside the shared embedding.
    shared = [name for name in found if name.endswith("shared.weight")]
    return (shared or found)[0] if len(shared or found) == 1 else None


def vocabulary_fields(base: BaseModel, rows: int) -> list[tuple[str, ...]]:
    """Return the paths of the config's ``vocab_size`` fields with the value `rows`."""
    found: list[tuple[str, ...]] = []
    if base.config.get("vocab_size") == rows:
        found.append(("vocab_size",))
    for name, part in base.config.items():
        if isinstance(part, Mapping) and part.get("vocab_size") == rows:
            found.append((name, "vocab_size"))
    return found
