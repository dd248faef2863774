"""The vocabulary of a base: the embedding, its rows, the config's fields, tokens without a row."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack

from vera_convert import rules
from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.saved_modules import replaced_name
from vera_convert.base.model import BaseModel
from vera_convert.base.side_files import tokenizer_files
from vera_convert.embeddings import is_embedding
from vera_convert.errors import CheckpointError
from vera_convert.files.reading import ByteSource, open_local
from vera_convert.files.strict_json import read_json

_TOKENS_LIMIT = 100_000_000
_LONGEST_ID = 20  # digits; a longer number is beyond the rows of any embedding


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


# --- the adapter's tokenizer ---------------------------------------------------------------------


def check_tokens(sources: Mapping[str, ByteSource], rows: int | None, *, place: str) -> None:
    """Refuse a tokenizer with a token beyond the rows of the embedding.

    Args:
        sources: the tokenizer's files by name; the files with lists of added tokens are read.
        rows: rows of the merged model's embedding; None if unknown.
        place: the adapter's name in messages.

    Raises:
        CheckpointError: a token lacks a row.
    """
    largest = max((token for name in sources for token in _tokens(name, sources[name])), default=-1)
    if rows is not None and largest >= rows:
        reason = f"its largest token is {largest:,}, the embedding has {rows:,} rows."
        raise CheckpointError(rules.TOKENIZER_TOO_LARGE.at(place, reason))


def check_own_tokens(
    adapter: Adapter, copied: Collection[str], base: BaseModel | None, *, place: str
) -> None:
    """Refuse an adapter's tokenizer with a token beyond the rows of the trained embedding.

    Args:
        adapter: the adapter; its embedding counts before the base's.
        copied: the files beside the adapter that are copied.
        base: the base; None if unknown.
        place: the adapter's name in messages.

    Raises:
        CheckpointError: a token lacks a row.
    """
    folder = adapter.folder
    with ExitStack() as stack:
        sources = {
            name: stack.enter_context(open_local(folder / name, within=folder))
            for name in tokenizer_files(copied)
        }
        check_tokens(sources, _rows_of_trained(adapter, base), place=place)


def _rows_of_trained(adapter: Adapter, base: BaseModel | None) -> int | None:
    """Return the rows of the adapter's embedding, or else of the base's; None if not known."""
    for tensor in adapter.replacements:
        if is_embedding(replaced_name(tensor.name).rpartition(".")[0]) and len(tensor.shape) == 2:
            return tensor.shape[0]
    return embedding_rows(base) if base is not None else None


def _tokens(name: str, source: ByteSource) -> Iterator[int]:
    """Yield the ids of the added tokens in a file of a tokenizer."""
    if name not in ("tokenizer.json", "added_tokens.json", "tokenizer_config.json"):
        return
    document, _ = read_json(source, limit=_TOKENS_LIMIT, pythons_numbers=True)
    if not isinstance(document, dict):
        return
    found: list[object] = []
    if name == "added_tokens.json":
        found += document.values()
    elif name == "tokenizer_config.json":
        decoder = document.get("added_tokens_decoder")
        keys = decoder if isinstance(decoder, dict) else {}
        found += [int(key[:_LONGEST_ID]) for key in keys if key.isdecimal()]
    else:
        added = document.get("added_tokens")
        entries = added if isinstance(added, list) else []
        found += [entry.get("id") for entry in entries if isinstance(entry, dict)]
    yield from (token for token in found if isinstance(token, int))
