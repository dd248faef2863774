"""Compare a base with the model named in an adapter's config, and with the base's own config."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import takewhile

from vera_convert import rules
from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.config import VeraConfig
from vera_convert.base.model import BaseModel
from vera_convert.base.renames import model_types
from vera_convert.base.vocabulary import embeddings
from vera_convert.dtypes import FLOATS
from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.files.file_names import CARD_NAME
from vera_convert.files.reading import open_local
from vera_convert.hub.lookup import Location
from vera_convert.hub.repo_name import is_repo_id
from vera_convert.rules import Finding
from vera_convert.targets.architectures import LARGEST_SIZE
from vera_convert.targets.built import BuiltLayers, parts_of_config
from vera_convert.text import and_more, printable

_IN_CACHE = re.compile(r"models--([^/\\]+)")
_CLASS_MODULE = re.compile(r"transformers\.models\.(\w+)\..*")
_MOST_OF_CARD = 1 << 16
_TUNED = frozenset(("finetune", "merge"))
"""The relations of a model card to the ``base_model`` after a change of the weights."""
MORE_ROWS = frozenset(
    (
        "csm_depth_decoder_model",
        "kyutai_speech_to_text",
        "mllama_text_model",
        "moshi",
        "molmo2_text",
    )
)
"""The types of models, or of their parts, that build an embedding of more rows than vocab_size."""
_MOST_SIZES = 6
"""The most sizes in one message; a base has one or two embeddings."""
_WIDTHS = ("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim", "dim")


def disagreements(
    adapter: Adapter, base: BaseModel, built: BuiltLayers, modules: Iterable[str]
) -> Iterator[Finding]:
    """Warn if the adapter's config names another base, and if the base's config fits other weights.

    Args:
        adapter: the adapter.
        base: the base with the adapter's layers.
        built: the layers built by the class, according to the base's config.
        modules: module paths of the base's layers, by the names of the adapter's model.
    """
    other = [*_another_name(adapter.config, base), *_another_class(adapter.config, base)]
    if other:
        yield rules.OTHER_BASE.at(base.location.label, f"{'; '.join(other)}.")
    sizes = [*_other_sizes(base), *_too_few_layers(built, modules)]
    if sizes:
        more = and_more(len(sizes) - _MOST_SIZES, "size")
        yield rules.BASE_MISDESCRIBED.at(
            base.location.label, f"{'; '.join(sizes[:_MOST_SIZES])}{more}."
        )


def _another_name(config: VeraConfig, base: BaseModel) -> Iterator[str]:
    name = config.base_model_name_or_path
    if not name or not is_repo_id(name):
        return  # the path of a model differs between machines
    # The base's _name_or_path proves little: in a tuned model the field often names the parent.
    repo = base.location.repo_id or _cached_repo(base.location)
    if repo is not None and _last(name) != _last(repo):
        yield f"the adapter's config names {printable(name)}, and this is {printable(repo)}"
    elif repo is None and name.casefold() in _tuned_from(base.location):
        yield (
            f"the adapter's config names {printable(name)}, and the README.md of this folder says "
            "that its model is a finetune or merge of that model"
        )


def _tuned_from(location: Location) -> frozenset[str]:
    """Return the parents of a tuned model, in lower case, from the folder's model card."""
    folder = location.folder
    if folder is None:
        return frozenset()
    try:
        with open_local(folder / CARD_NAME, within=folder) as file:
            text = bytes(file.read_at(0, min(file.size, _MOST_OF_CARD)))
    except (CheckpointError, SurroundingsError):
        return frozenset()
    first, *lines = text.decode("utf-8", "replace").splitlines() or [""]
    fields: dict[str, set[str]] = {}
    key = ""
    for line in takewhile(lambda line: line.rstrip() != "---", lines if first == "---" else ()):
        value = line
        if line[:1] not in (" ", "-"):
            key, _, value = line.partition(":")
        fields.setdefault(key, set()).add(value.strip(" -'\"").casefold())
    # A card without a relation can belong to a mirror with the same weights.
    is_tuned = not _TUNED.isdisjoint(fields.get("base_model_relation", ()))
    return frozenset(fields.get("base_model", ())) if is_tuned else frozenset()


def _cached_repo(location: Location) -> str | None:
    """Return the repo of a folder in the Hub's cache."""
    for part in reversed(location.folder.absolute().parts if location.folder else ()):
        found = _IN_CACHE.fullmatch(part)
        if found is not None:
            return found[1].replace("--", "/", 1)
    return None


def _last(name: str) -> str:
    return name.rpartition("/")[2].casefold()


def _another_class(config: VeraConfig, base: BaseModel) -> Iterator[str]:
    mapping = config.auto_mapping or {}
    library, name = mapping.get("parent_library"), mapping.get("base_model_class")
    found = _CLASS_MODULE.fullmatch(library) if isinstance(library, str) else None
    types = [*model_types(base.config)]
    if found is None or not types or name in base.class_names:
        return
    module = _plain(found[1])
    if not any(
        _plain(kind).startswith(module) or module.startswith(_plain(kind)) for kind in types
    ):
        trained = printable(str(name))
        yield f"the adapter was trained in the class {trained}, and this is a {printable(types[0])}"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _other_sizes(base: BaseModel) -> Iterator[str]:
    """Yield the embedding sizes absent from every field of the base's config."""
    parts = parts_of_config(base.config)
    numbers = {value for part in parts for value in part.values() if type(value) is int}
    # Fields of the model replace fields of a part.
    fields = {name: value for part in reversed(parts) for name, value in part.items()}
    sizes = {
        name: value
        for name, value in fields.items()
        if type(value) is int and 0 < value < LARGEST_SIZE  # any other value is no size
    }
    width = next((name for name in _WIDTHS if name in sizes), None)
    states_rows = "vocab_size" in sizes and MORE_ROWS.isdisjoint(model_types(base.config))
    for name, (rows, columns) in embeddings(base).items():
        is_float = base.tensors[name].info.dtype in FLOATS
        if not name.endswith(".weight") or not is_float or "codec" in name:
            continue
        if width is not None and columns not in numbers:
            yield f"{width} is {sizes[width]}, and {printable(name)} has {columns:,} columns"
        if states_rows and rows not in numbers:
            said = f"vocab_size is {sizes['vocab_size']}"
            yield f"{said}, and {printable(name)} has {rows:,} rows"


def _too_few_layers(built: BuiltLayers, modules: Iterable[str]) -> Iterator[str]:
    beyond = built.beyond(modules)
    if beyond is not None:
        stack, last, count = beyond
        yield (
            f"its class builds {count:,} layers, and the adapter adapts {printable(stack)}.{last}"
        )
