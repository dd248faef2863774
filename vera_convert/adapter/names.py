"""The names of an adapter's tensors, and the foreign parts of such names.

PEFT finds a tensor by the whole name. If a name has a foreign or a missing part, PEFT silently
ignores the tensor, and the layer stays as in the base.

    thinker.base_model.model.model._fsdp_wrapped_module.layers.0.q_proj.vera_lambda_b.default
    └ front                        └ wrapper                                          └ adapter
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

from vera_convert import rules
from vera_convert.adapter.config import VeraConfig
from vera_convert.rules import Rule

PREFIX = "base_model.model."
A_NAME, B_NAME = "base_model.vera_A", "base_model.vera_B"
LAMBDAS = ("vera_lambda_b", "vera_lambda_d")
_COPY = re.compile(r"\.(?:original_module|modules_to_save(?:\.[^.]+(?=.*\.))?)(?=\.)")
"""PEFT writes each tensor of a module that is saved whole three times, and reads the tensor with
the plain name: with bias "all" each bias, and with a resized vocabulary embedding and head. Only a
tensor of a module inside the saved one keeps the adapter's name after modules_to_save."""

_WRAPPER = re.compile(r"_(?:\w*_)?(?:mod|module|wrapped|wrapper|callable)")
"""Attributes in which wrappers keep the wrapped module: torch.compile's _orig_mod and
_torchdynamo_orig_callable, FSDP's _fsdp_wrapped_module and _fpw_module, activation checkpointing's
_checkpoint_wrapped_module, TorchRec's _dmp_wrapped_module, Lightning's _forward_module, Opacus's
_module, ONNX Runtime's _original_module. No model class has a module of this name."""
_WRAPPERS_OF_NAMED_BASES = frozenset(
    ("module", "pretrained_model", "nncf_module", "wrapped_model", "wrapped_module")
)
"""Attributes of DistributedDataParallel and DeepSpeed, TRL, NNCF, and users' wrappers. A custom
class can have a module of this name, but a custom class has no name on the Hub. In transformers,
LeViT alone has `module`, in each numbered layer."""
_INNER_LAYER = "base_layer"
"""The attribute in which an outer layer of PEFT keeps the layer with the vectors."""
_WRAPPER_CLASSES = frozenset(
    ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
)
"""Wrappers that PEFT can have recorded as the class of the base."""

_VECTOR_OR_MATRIX = r"vera_(?:lambda_[bd]|A|B)"
_NAME_AT_END = re.compile(rf"(?P<kept>(?:^|.*\.){_VECTOR_OR_MATRIX})\.(?P<adapter>[^.]+)")
_NAME_OF_SAVED = re.compile(r"(?P<kept>.+)\.modules_to_save\.(?P<adapter>[^.]+)(?P<rest>\..+)")
_OF_VERA = re.compile(rf"(?:^|\.){_VECTOR_OR_MATRIX}(?:\.[^.]+)?$")
_OTHER_VERA = re.compile(r"\.(?:vera_lambda_(?![bd](?:\.|$))[^.]*|pvera_[^.]*|vera_[C-Z])(?:\.|$)")
# modules_to_save and original_module: so PEFT 0.12.0 wrote a classifier both adapted and saved.
_STRANGE = re.compile(r"modules_to_save|original_module|lora_.*|vera_lambda.*|vera_[A-Z]")
_DEFAULT_ADAPTER = "default"


class Parts(NamedTuple):
    """The parts of a tensor's name.

    Attributes:
        name: the name without foreign parts.
        front: the text before the last prefix of PEFT, without a dot.
        wrappers: the attributes in which wrappers keep the wrapped module.
    """

    name: str
    front: str
    wrappers: tuple[str, ...]


class Names(NamedTuple):
    """The facts about foreign parts shown by all names of a file together.

    Attributes:
        is_named_base: whether the base is a published model, and not a class of the user.
        beginnings: the names of vectors by the text before the path of the layer, PEFT's prefix
            included.
        inner: the adapter's name, if the path of every adapted layer ends with this name; else
            empty.
        copies: the copies of tensors that PEFT writes and ignores.
    """

    is_named_base: bool
    beginnings: Mapping[str, Sequence[str]] = MappingProxyType({})
    inner: str = ""
    copies: frozenset[str] = frozenset()

    @classmethod
    def of(cls, names: Iterable[str], config: VeraConfig) -> Names:
        """Read the names of a file."""
        ordered = tuple(names)
        stored = frozenset(ordered)
        vectors = [name for name in ordered if ".vera_lambda_" in name]
        copies = frozenset(name for name in stored if _is_copy(name, stored))
        is_wrapped = (config.auto_mapping or {}).get("base_model_class") in _WRAPPER_CLASSES
        is_named_base = bool(config.base_model_name_or_path) or is_wrapped
        alone = cls(is_named_base)
        beginnings: dict[str, list[str]] = {}
        for name in vectors:
            beginnings.setdefault(alone.beginning(name), []).append(name)
        return cls(is_named_base, beginnings, _inner_adapter(vectors, config), copies)

    @property
    def begin_alike(self) -> bool:
        """Whether all names have the same text before the path, which makes a repair possible."""
        return len(self.beginnings) <= 1

    def beginning(self, name: str) -> str:
        """Return the text before the path of a layer: PEFT's prefix in a sound name."""
        if name.startswith(PREFIX) and "base_model." not in name[len(PREFIX) :]:
            return PREFIX
        parts = self.parts(name)
        front = f"{parts.front}." if parts.front else ""
        own = PREFIX if parts.name.startswith(PREFIX) else ""
        return front + (own or "base_model." * ("base_model" in parts.name.split(".")))

    def parts(self, name: str) -> Parts:
        """Split the foreign parts off a name."""
        kept: list[str] = []
        wrappers = []
        elements = name.split(".")
        for element, following in zip(elements, (*elements[1:], ""), strict=True):
            is_inner = element == _INNER_LAYER and following.startswith("vera_")
            if is_inner or self._is_wrapper(element, kept):
                wrappers.append(element)
            else:
                kept.append(element)
        start = max(_starts(kept), default=0)
        if start and kept[0] == "base_model" and not self.is_named_base:
            start = 0  # a class of the user can have a module called base_model
        return Parts(".".join(kept[start:]), ".".join(kept[:start]), tuple(wrappers))

    def _is_wrapper(self, element: str, before: Sequence[str]) -> bool:
        if element in _WRAPPERS_OF_NAMED_BASES:
            return self.is_named_base and not (before and before[-1].isdecimal())
        return _WRAPPER.fullmatch(element) is not None

    def without_adapter(self, name: str) -> tuple[str, frozenset[str]]:
        """Return a tensor's name without the adapter's names, and the removed names."""
        if name in self.copies:
            return name, frozenset()
        found = set()
        match = _NAME_AT_END.fullmatch(name)
        if match is not None:
            found.add(match["adapter"])
            name = match["kept"]
        saved = _NAME_OF_SAVED.fullmatch(name)
        if saved is not None and saved["adapter"] == _DEFAULT_ADAPTER:
            found.add(saved["adapter"])
            name = saved["kept"] + saved["rest"]
        if self.inner and _layer_end(name) == self.inner:
            found.add(self.inner)
            path, _, last = name.rpartition(".")
            name = f"{path.removesuffix(f'.{self.inner}')}.{last}"
        return name, frozenset(found)

    def broken_rule(self, name: str) -> Rule | None:
        """Return the rule broken by a tensor's name, or None if the name has a known meaning."""
        parts = self.parts(name)
        if parts.front or parts.wrappers:
            return rules.WRAPPER_IN_NAMES
        has_prefix = name.startswith(PREFIX) or name in (A_NAME, B_NAME)
        if _OTHER_VERA.search(name if has_prefix else f".{name}"):
            return rules.OTHER_VERA
        if name.startswith((PREFIX, "base_model.vera_")) and self.without_adapter(name)[1]:
            return rules.ADAPTER_NAME_LEFT
        if not has_prefix:
            is_bare = "base_model" not in name.split(".") and _OF_VERA.search(name)
            return rules.PREFIX_MISSING if is_bare else rules.UNKNOWN_TENSOR
        return None if name in self.copies else _strange(name)


def _is_copy(name: str, stored: Collection[str]) -> bool:
    """Say whether PEFT wrote a tensor as a copy; the plain name must be stored too."""
    plain = _COPY.sub("", name)
    return plain != name and plain in stored and not _OF_VERA.search(name)


def _strange(name: str) -> Rule | None:
    elements = name.removeprefix(PREFIX).split(".")
    alone = len(elements) == 1 and elements[0] in LAMBDAS
    inside = elements[:-1] if elements[-1] in (*LAMBDAS, "vera_A", "vera_B") else elements
    return rules.UNKNOWN_TENSOR if alone or any(map(_STRANGE.fullmatch, inside)) else None


def _starts(elements: Sequence[str]) -> Iterator[int]:
    """Yield where PEFT's prefix can start in a name."""
    for at, (element, following) in enumerate(pairwise(elements)):
        if element == "base_model" and following in ("model", "vera_A", "vera_B"):
            yield at


def _layer_end(name: str) -> str:
    """Return the last element of the path of a vector's layer."""
    path, _, last = name.rpartition(".")
    return path.rpartition(".")[2] if last in LAMBDAS else ""


def _inner_adapter(vectors: Sequence[str], config: VeraConfig) -> str:
    """Return the adapter's name if the path of each adapted layer ends with this name.

    The config's targets distinguish this name from the name of a layer; without targets, only the
    default name of PEFT counts.
    """
    vectors = [match["kept"] if (match := _NAME_AT_END.fullmatch(n)) else n for n in vectors]
    ends = {_layer_end(name) for name in vectors}
    if len(ends) != 1:
        return ""
    (end,) = ends
    if not isinstance(config.target_modules, tuple):
        return end if end == _DEFAULT_ADAPTER else ""
    targets = {target.rpartition(".")[2] for target in config.target_modules}
    layers = {name.rpartition(".")[0].rpartition(".")[0].rpartition(".")[2] for name in vectors}
    return end if end not in targets and layers <= targets else ""
