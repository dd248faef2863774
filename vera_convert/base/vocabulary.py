"""The vocabulary of a base: the embedding, its rows, the config's fields, tokens without a row."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from itertools import chain, islice, takewhile

from vera_convert import rules
from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.saved_modules import replaced_name
from vera_convert.base.model import BaseModel
from vera_convert.base.side_files import tokenizer_files
from vera_convert.embeddings import is_embedding, is_output_head
from vera_convert.errors import CheckpointError
from vera_convert.files.reading import ByteSource, open_local
from vera_convert.files.strict_json import read_json
from vera_convert.hub.repos import TOKENIZER_LIMIT
from vera_convert.tables import table
from vera_convert.text import printable

_STACKS = ("encoder", "decoder", "text_encoder", "text_decoder")
_IN_STACK = {"shared": "embed_tokens", "word_embeddings": "word_embeddings"}
"""The embedding in each stack of an encoder-decoder, by the last part of the shared embedding."""
_DECODERS_WITHOUT_BIAS = frozenset(("bridgetower", "esm", "lxmert"))
"""Model types whose layer ``X.decoder`` has no bias: the head ``X`` adds its own bias."""
_OF_STACK = re.compile(r"(?:^|[._])(?:en|de)coder\.")
_FIELDS = ("vocab_size", "decoder_vocab_size")
"""The fields of a config with the size of the vocabulary; Marian has both."""
_MOST_EMBEDDINGS = 64  # that a head could share; more are ambiguous
_LONGEST_ID = 20  # digits; a longer number is beyond the rows of any embedding


def embeddings(base: BaseModel) -> dict[str, tuple[int, int]]:
    """Return the rows and columns of each embedding of a base, by the tensor's name."""
    return {
        name: (shape[0], shape[1])
        for name, tensor in base.tensors.items()
        if len(shape := tensor.info.shape) == 2 and is_embedding(name.removesuffix(".weight"))
    }


def embedding_rows(base: BaseModel) -> int | None:
    """Return the number of rows of the base's embedding; None if unknown or ambiguous."""
    rows = _embeddings(base)
    return next(iter(rows)) if len(rows) == 1 else None


@lru_cache(maxsize=8)
def _embeddings(base: BaseModel) -> Mapping[int, Sequence[tuple[int, str]]]:
    """Return columns and name of each embedding by rows, the narrowest first.

    The cache helps because each embedding in an adapter's file is compared with the base's.
    """
    found: dict[int, list[tuple[int, str]]] = {}
    for name, (rows, columns) in embeddings(base).items():
        found.setdefault(rows, []).append((columns, name))
    return {rows: sorted(those) for rows, those in found.items()}


def shared_embedding(
    base: BaseModel, head: str, rows: int | None, widest: int | None = None
) -> str | None:
    """Return the embedding to share with an output head; None if absent or ambiguous.

    Each part of a model can have an embedding, such as the Q-Former and the language model of
    InstructBLIP; the head shares the embedding of its own part. An encoder-decoder can store an
    embedding for each stack. The head shares the embedding beside the stacks, as in T5, or else the
    decoder's, as in T5Gemma.

    Args:
        base: the base.
        head: the name of the head's weight in the base, or the path of the head.
        rows: rows of the head and of the embedding; None for any number.
        widest: the most columns of the embedding; None for any number.
    """
    by_rows = _embeddings(base)
    lists = by_rows.values() if rows is None else (by_rows.get(rows, ()),)
    wide = (takewhile(lambda each: widest is None or each[0] <= widest, those) for those in lists)
    names = [name for _, name in islice(chain.from_iterable(wide), _MOST_EMBEDDINGS + 1)]
    if len(names) > _MOST_EMBEDDINGS:
        return None
    near = [_common(name, head) for name in names]
    found = [name for name, common in zip(names, near, strict=True) if common == max(near)]
    if len(found) > 1:
        beside = [name for name in found if _OF_STACK.search(name) is None]
        found = beside or [name for name in found if "decoder." in name]
    return found[0] if len(found) == 1 else None


def resized_head(module: str, outputs: int, base: BaseModel) -> str:
    """Return a sentence about an adapted head that is taller or shorter than the tied embedding.

    The result is empty for another layer, and for a head as tall as the embedding.

    Args:
        module: the layer's path in the adapter.
        outputs: the layer's outputs.
        base: the base, which lacks the layer's tensor.
    """
    if not is_output_head(module, base.model_type) or base.tie_word_embeddings is False:
        return ""
    embedding = shared_embedding(base, module, None)
    rows = 0 if embedding is None else base.tensors[embedding].info.shape[0]
    if embedding is None or rows == outputs:
        return ""
    return (
        f' The head shares "{printable(embedding)}", which has {rows:,} rows, and lambda_b has '
        f"{outputs:,} values: the training resized the vocabulary, and the adapter does not store "
        "the new rows. Pass the resized base as transformers saved it."
    )


def _common(first: str, second: str) -> int:
    """Return how many path elements two names have in common at their beginnings."""
    pairs = zip(first.split("."), second.split("."), strict=False)
    return len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])


def tied_copies(base: BaseModel) -> Iterator[tuple[str, str]]:
    """Yield each tensor that a base leaves out while its head is tied, and the equal stored tensor.

    The field that ties the head also ties the embeddings in the stacks of an encoder-decoder, in
    transformers 5, and the two names of a head's bias. A model without tied head therefore needs
    each tensor under its own name, and a base without tied head can store each.
    """
    yield from _embeddings_of_stacks(base)
    copies = {
        f"{head}.decoder.bias": f"{head}.bias"
        for head in (name[: -len(".bias")] for name in base.tensors if name.endswith(".bias"))
        if is_output_head(f"{head}.decoder", base.model_type)
        and base.model_type not in _DECODERS_WITHOUT_BIAS
    }
    copies |= table(__file__, "tied_copies.toml").get(base.model_type or "", {})
    for copy, name in copies.items():
        if name in base.tensors:
            yield copy, name


def _embeddings_of_stacks(base: BaseModel) -> Iterator[tuple[str, str]]:
    """Yield each embedding in a stack of an encoder-decoder, and the embedding stored for both."""
    for name in base.tensors:
        path, _, parameter = name.rpartition(".")
        if parameter != "weight":
            continue
        start, dot, last = path.rpartition(".")
        own = _IN_STACK.get(last)
        if path.endswith("decoder.embed_tokens") and base.model_type == "fsmt":
            start, own = start.removesuffix("decoder").rstrip("."), last
            dot = "." if start else ""
        for stack in _STACKS if own else ():
            copy = f"{start}{dot}{stack}.{own}.weight"
            is_stack = any(each.startswith(f"{start}{dot}{stack}.") for each in base.tensors)
            if is_stack and copy != name:
                yield copy, name


def vocabulary_fields(base: BaseModel, rows: int) -> list[tuple[str, ...]]:
    """Return the paths of the config's fields that say that the vocabulary has `rows` tokens."""
    inner = {name: part for name, part in base.config.items() if isinstance(part, Mapping)}
    found: list[tuple[str, ...]] = [(field,) for field in _FIELDS if base.config.get(field) == rows]
    return found + [
        (name, field)
        for name, part in inner.items()
        for field in _FIELDS
        if part.get(field) == rows
    ]


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
    document, _ = read_json(source, limit=TOKENIZER_LIMIT, pythons_numbers=True)
    found: Iterable[object] = ()
    match name, document:
        case "added_tokens.json", dict():
            found = document.values()
        case "tokenizer_config.json", {"added_tokens_decoder": dict(decoder)}:
            found = [int(key[:_LONGEST_ID]) for key in decoder if key.isdecimal()]
        case "tokenizer.json", {"added_tokens": list(entries)}:
            found = [entry.get("id") for entry in entries if isinstance(entry, dict)]
    yield from (token for token in found if isinstance(token, int))
