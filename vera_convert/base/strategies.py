"""Strategies: how the path of a layer in an adapter becomes the path in a base's files.

The keys of an adapter follow the names in memory of the library that trained the adapter. The files
of a base can have other names. A strategy adds or removes a prefix, follows the renames between
releases of transformers, or does the two together; a key map is a strategy from the user.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from functools import partial
from itertools import takewhile

from vera_convert.base.model import BaseModel
from vera_convert.base.renames import Strategy, model_types, release_names
from vera_convert.text import printable

BASE_PREFIXES = frozenset(
    """
    model transformer backbone text_model vision_model
    albert bart beit bert bit blip clip convbert data2vec_audio data2vec_text data2vec_vision
    deberta deit dinov2 distilbert electra ernie esm gpt_neox hubert layoutlm layoutlmv3 led
    longformer mpnet nomic_bert rembert roberta roformer segformer siglip speecht5 swin swinv2
    vilt vit vit_mae wav2vec2 wavlm
    """.split()  # noqa: SIM905 - words read best as a text
)
"""Prefixes before the model in transformers' classes with a head, beside the model type."""


AS_THEY_ARE = Strategy("names as they are", str, str)


def known_strategies(layers: Iterable[str], base: BaseModel) -> Iterator[Strategy]:
    """Yield prefixes, renames between releases of transformers, and prefixes before renames."""
    names = {name.partition(".")[0] for name in base.tensors}
    yield from _prefixes(layers, names, base)
    paths = {name.rpartition(".")[0] for name in base.tensors}
    for renames in release_names(base):
        yield renames
        names = {(renames.undo(path) or "").partition(".")[0] for path in paths}
        for prefix in _prefixes(layers, names, base):
            yield _both(prefix, renames)


def _both(first: Strategy, second: Strategy) -> Strategy:
    """Return the strategy of applying the second to the result of the first."""

    def rename(module: str) -> str | None:
        between = first.rename(module)
        return None if between is None else second.rename(between)

    def undo(path: str) -> str | None:
        between = second.undo(path)
        return None if between is None else first.undo(between)

    return Strategy(f"{first.name}, {second.name}", rename, undo)


def _prefixes(
    layers: Iterable[str], in_base: AbstractSet[str], base: BaseModel
) -> Iterator[Strategy]:
    """Yield strategies to add or remove the prefix of the model below a head."""
    own = {(kind or "").replace("-", "_") for kind in model_types(base.config)}
    known = (BASE_PREFIXES | own) - {""}
    in_adapter = {module.partition(".")[0] for module in layers}
    for prefix in sorted(known & in_base):
        yield key_map_strategy("", prefix, name=f'prefix "{printable(prefix)}." added')
    for prefix in sorted(known & in_adapter):
        yield key_map_strategy(prefix, "", name=f'prefix "{printable(prefix)}." removed')


def key_map_strategy(old: str, new: str, *, name: str = "") -> Strategy:
    """Return the strategy of replacing the leading path `old` by `new`."""
    text = printable(f"{old}={new}")
    rename, undo = partial(moved, old, new), partial(_moved_back, old, new)
    return Strategy(name or f"--key-map {text}", rename, undo, text, is_given=not name)


def moved(old: str, new: str, module: str) -> str:
    """Replace the leading path `old` by `new`, element by element; other modules stay."""
    if old and module != old and not module.startswith(f"{old}."):
        return module
    rest = module[len(old) :].lstrip(".") if old else module
    return ".".join(filter(None, (new, rest)))


def _moved_back(old: str, new: str, path: str) -> str | None:
    """Undo `moved`."""
    module = moved(new, old, path)
    return module if moved(old, new, module) == path else None


# --- hints for a message -------------------------------------------------------------------------


def hints(module: str, base: BaseModel) -> Iterator[Strategy]:
    """Yield the key maps from `module` to the tensors with the longest end in common."""
    for path in nearest(module, base):
        shared = _common_end(path, module)
        ours, theirs = module.split("."), path.split(".")
        if shared:
            yield key_map_strategy(".".join(ours[:-shared]), ".".join(theirs[:-shared]))


def nearest(module: str, base: BaseModel) -> list[str]:
    """Return the base's matrices with the longest path end in common with `module`."""
    lengths = {
        name.removesuffix(".weight"): _common_end(name.removesuffix(".weight"), module)
        for name, tensor in base.tensors.items()
        if name.endswith(".weight") and len(tensor.info.shape) == 2
    }
    best = max(lengths.values(), default=0)
    return [path for path, length in lengths.items() if length == best]


def _common_end(first: str, other: str) -> int:
    """Count the equal path elements of two paths, from the end."""
    pairs = zip(reversed(first.split(".")), reversed(other.split(".")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
