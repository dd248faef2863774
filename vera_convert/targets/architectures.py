"""The linear layers of well-known models, from their ``config.json`` alone.

``architectures.toml`` holds the layers of nine types: llama, mistral, qwen2, gemma, gpt2, bert,
roberta, t5 and vit. Module paths are those of the tensors on disk (transformers 5 renames the
modules of vit in memory). A missing field has the default of transformers' config class; an absurd
value is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

from vera_convert import rules
from vera_convert.dtypes import HEADER_NAMES, float_name
from vera_convert.errors import CheckpointError
from vera_convert.rules import Rule
from vera_convert.tables import table
from vera_convert.targets.linear import Linear, ModelLayers
from vera_convert.text import printable

MAX_LAYERS = 10_000
LARGEST_SIZE = 1 << 24
"""Far above any model; a larger size would only exhaust memory."""


class _UnfitConfigError(Exception):
    """A config from which no layers follow: the rule that is broken, and why."""

    def __init__(self, rule: Rule, reason: str) -> None:
        super().__init__(reason)
        self.rule = rule


def layers_from_config(
    document: Mapping[str, object], *, place: str = "config.json"
) -> ModelLayers:
    """Return the linear layers of the model that a ``config.json`` describes.

    The class is the first of ``architectures``; without that field it is the causal model (llama,
    mistral, qwen2, gemma, gpt2), the one for conditional generation (t5), or the bare encoder.

    Args:
        document: the config.
        place: the name of the file in errors.

    Raises:
        CheckpointError: the type or class is unknown, or a field has the wrong type or an absurd
            value.
    """
    try:
        return _layers(document)
    except _UnfitConfigError as error:
        raise CheckpointError(error.rule.at(place, str(error))) from None


def _layers(document: Mapping[str, object]) -> ModelLayers:
    model = _class_of(document)
    family = families()[model.model_type]
    sizes = _Sizes(document, family["sizes"])
    if family["tables"]:
        sizes["vocabulary"]  # an absurd size is refused, whether or not a head has the size
    body = {model.prefix + path: layer for path, layer in _body(family, model.words, sizes)}
    heads = {
        path: Linear(sizes[rows], sizes["hidden"])
        for path, rows in model.heads.items()
        if sizes[rows]  # a classifier without labels has no layer
    }
    return ModelLayers(
        source=model.name,
        model_type=model.model_type,
        linear={**body, **heads},
        output_heads=frozenset(p for p, rows in model.heads.items() if rows == "vocabulary"),
        embeddings=tuple(model.prefix + path for path in family["tables"]),
        dtype=_dtype(document),
    )


def _dtype(document: Mapping[str, object]) -> str:
    """Return the dtype of the weights; float32 if the config has none."""
    value = document.get("dtype", document.get("torch_dtype"))
    return HEADER_NAMES[float_name(str(value)) or "float32"]


def _invalid(reason: str) -> _UnfitConfigError:
    return _UnfitConfigError(rules.MODEL_FIELD_INVALID, reason)


# --- the table of classes ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelClass:
    """A class of transformers, as a line of ``architectures.toml`` describes it.

    Attributes:
        name: the class.
        model_type: the type whose layers the class has.
        prefix: the text before the paths of the body's modules.
        words: the words of layers that only some classes of the type have.
        heads: linear layers beside the body, each with the name of its number of rows.
    """

    name: str
    model_type: str
    prefix: str
    words: frozenset[str]
    heads: Mapping[str, str]


@cache
def families() -> Mapping[str, Mapping[str, Any]]:
    """Return the tables of ``architectures.toml`` by model type."""
    found: dict[str, dict[str, Any]] = {}
    for model_type, own in table(__file__, "architectures.toml").items():
        like = found.get(own.get("like", ""), {"sizes": {}})
        found[model_type] = {**like, **own, "sizes": {**like["sizes"], **own["sizes"]}}
    return found


@cache
def classes() -> Mapping[str, ModelClass]:
    """Return the known classes by name."""
    found = {}
    for model_type, family in families().items():
        for line in family["classes"].splitlines():
            name, prefix, *more = line.split()
            heads = dict(word.split("=") for word in more if "=" in word)
            words = frozenset(word for word in more if "=" not in word)
            prefix = "" if prefix == "-" else f"{prefix}."
            found[name] = ModelClass(name, model_type, prefix, words, heads)
    return found


def _class_of(document: Mapping[str, object]) -> ModelClass:
    listed, model_type = document.get("architectures"), document.get("model_type")
    name = None
    if isinstance(listed, list) and listed:
        name = listed[0]
    elif isinstance(model_type, str) and model_type in families():
        name = families()[model_type]["default"]
    found = classes().get(name) if isinstance(name, str) else None
    if found is None or model_type not in (None, found.model_type):
        raise _UnfitConfigError(rules.MODEL_TYPE_UNKNOWN, _why_unknown(document, name))
    return found


def _why_unknown(document: Mapping[str, object], name: object) -> str:
    """Return a sentence with the model type and the class `name` of a config."""
    if "peft_type" in document:
        return "this is the config of an adapter, not of a model."
    given = [("the model type", document.get("model_type")), ("the class", name)]
    known = [f"{what} is {printable(str(value))}" for what, value in given if value is not None]
    said = " and ".join(known) or "the config names no model type and no class"
    return f"{said}; known types are {', '.join(families())}."


# --- layers and sizes ----------------------------------------------------------------------------


def _body(
    family: Mapping[str, Any], words: frozenset[str], sizes: _Sizes
) -> Iterator[tuple[str, Linear]]:
    """Yield the layers of a model's body, numbered layer by numbered layer."""
    lines = [line.split() for line in family["layers"].splitlines()]
    used = {word for _, _, _, *needed in lines for word in needed}
    words |= frozenset(_words_of_config(sizes.document, used))
    conv1d = family.get("conv1d", False)
    for depth, group in groupby(lines, lambda line: line[0].partition("{")[2].partition("}")[0]):
        block = [line for line in group if words.issuperset(line[3:])]
        if not block:
            continue  # an encoder has no size of a decoder
        for number in range(sizes[depth] if depth else 1):
            for path, outputs, inputs, *_ in block:
                numbered = path.replace(f"{{{depth}}}", str(number))
                yield numbered, Linear(sizes[outputs], sizes[inputs], conv1d=conv1d)


def _words_of_config(document: Mapping[str, object], used: set[str]) -> Iterator[str]:
    """Yield the words of a config on which a layer of its family depends."""
    if "add_cross_attention" in used:
        crossed = document.get("add_cross_attention", False)
        if not isinstance(crossed, bool):
            shown = printable(repr(crossed))
            raise _invalid(f"add_cross_attention is {shown}; true or false is expected.")
        yield from ["add_cross_attention"] if crossed else []
    if "gated" in used:
        kind = document.get("feed_forward_proj", "relu")
        parts = kind.split("-") if isinstance(kind, str) else []
        if len(parts) != 1 and parts[:-1] != ["gated"]:
            shown = printable(repr(kind))
            raise _invalid(
                f"feed_forward_proj is {shown}; a text like relu or gated-gelu is expected."
            )
        yield "plain" if len(parts) == 1 else "gated"


class _Sizes(dict[str, int]):
    """The sizes of a model by name or expression; all but the labels are read when first needed."""

    def __init__(self, document: Mapping[str, object], fields: Mapping[str, Any]) -> None:
        super().__init__(one=1, two=2)
        self.document = document
        self._fields = fields
        named = document.get("id2label")  # transformers counts the names of the labels
        labels = {"field": "num_labels", "default": 2}
        self["labels"] = len(named) if isinstance(named, dict) else self._read(labels)

    def __missing__(self, name: str) -> int:
        size = self._fields.get(name, name)
        self[name] = self._computed(size) if isinstance(size, str) else self._read(size)
        return self[name]

    def _computed(self, expression: str) -> int:
        """Return a product such as 3*heads*head, or a quotient such as hidden/heads."""
        total, slash, parts = expression.partition("/")
        if not slash:
            return math.prod(
                int(part) if part.isdecimal() else self[part] for part in expression.split("*")
            )
        if self[total] % self[parts]:
            raise _invalid(f"a width of {self[total]} does not divide into {self[parts]} heads.")
        return self[total] // self[parts]

    def _read(self, spec: Mapping[str, Any]) -> int:
        """Return the whole number from 1 up that a field of the config gives."""
        name, other = spec["field"], spec.get("other")
        if other in self.document and name not in self.document:
            name = other
        value = self.document.get(name, spec.get("default"))
        if value is None and "null" in spec:
            return self[spec["null"]]
        most = MAX_LAYERS if name.endswith(("layers", "layer")) else LARGEST_SIZE
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            shown = printable(repr(value))
            raise _invalid(f"{name} is {shown}; a whole number from 1 to {most} is expected.")
        return value
