"""Tell from a model's ``config.json`` which layers the model's class builds.

The files of a model can hold layers that the class leaves out. Examples are layers that predict
several tokens, the tower of another modality, and experts that the class fuses into one parameter.

A numbered path has three parts. The path ``model.layers.3.mlp.up_proj`` has the stack
``model.layers``, the number 3 and the target ``mlp.up_proj``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property

from vera_convert.errors import CheckpointError
from vera_convert.targets.architectures import layers_from_config

_COUNT = re.compile(
    r"(?:num_hidden_layers|num_layers|n_layers?|depth)"
    r"|(?:num_|n_)?(?P<stem>encoder|decoder|single)_layers"
    r"|(?:num_|num_local_|n_routed_)(?P<experts>experts)"
)
"""Fields of a config that give the number of layers or experts."""
_OTHER_NUMBER = re.compile(r"(?:.*_)?(?:attention|key_value)_heads|n_heads?|.*_id")
"""Fields of a config with numbers that are never a number of layers."""
_MOST_DEPTH = 4
_MOST_PARTS = 200
_NOT_LOADED = re.compile(r"mtp(_.*)?")
"""Path elements of layers that predict several tokens; no class of transformers loads these."""

_SHARED_KEYS = ("self_attn.k_proj", "self_attn.v_proj")


class BuiltLayers:
    """The layers that a model's class builds, seen from the layers that an adapter's file adapts.

    A class builds every layer that a file saved by PEFT adapts, because PEFT finds layers in the
    model and not in files.
    """

    def __init__(
        self, config: Mapping[str, object], adapted: Iterable[str], *, all_built: bool = False
    ) -> None:
        """Take the model's config and the adapted layers.

        Args:
            config: the content of ``config.json``; empty without a config.
            adapted: module paths of the layers that the adapter's file adapts.
            all_built: whether every queried layer is known to be in the model.
        """
        self._config = config
        self._all_built = all_built
        modules = [*adapted]
        found = [each for module in modules for each in _numbered(module)]
        self._elements = {element for module in modules for element in module.split(".")}
        self._targets = {(stack, target) for stack, _, target in found}
        self._numbers = {(stack, number) for stack, number, _ in found}
        self._last: dict[str, int] = {}
        for stack, number in sorted(self._numbers):
            self._last[stack] = number
        self._count = cache(self._read_count)

    def has(self, module: str) -> bool | None:
        """Say whether the class builds a layer; None if the config does not tell."""
        if self._all_built:
            return True
        elements = module.split(".")
        if any(each.startswith("mtp") and self._is_not_loaded(each) for each in elements):
            return False
        for stack, number, target in _numbered(module):
            count = self._count(stack)
            if target.endswith(_SHARED_KEYS) and count is not None:
                count -= self._layers_without_keys
            if count is not None and number >= count:
                return False
        return True if module in self._known else None

    def _is_not_loaded(self, element: str) -> bool:
        return element not in self._elements and _NOT_LOADED.fullmatch(element) is not None

    def beyond(self, modules: Iterable[str]) -> tuple[str, int, int] | None:
        """Return an adapted layer beyond the number of layers: stack, number, number built.

        The number of a stack's layers can stand in a field that only the stack's class knows, such
        as ``num_mel_attn_blocks``. A stack as long as a number in the config is complete.

        Args:
            modules: module paths of all layers in the base's files.
        """
        counts = [(stem, count) for stem, count in self._counts if stem != "experts"]
        most = max((count for _, count in counts), default=0)
        candidates = {
            stack: last
            for stack, last in self._last.items()
            if last >= most
            and not any(element.isdecimal() for element in stack.split("."))
            and any(stem in stack for stem, _ in counts)  # Funnel counts its decoder alone
        }
        if not candidates:
            return None
        lengths = _lengths(self._config)
        stored = [each for module in modules for each in _numbered(module)]
        for stack, last in candidates.items():
            length = 1 + max(number for path, number, _ in stored if path == stack)
            if length not in lengths:
                return stack, last, most
        return None

    def is_missing(self, module: str) -> bool:
        """Say whether a layer without vectors is a hole in the adapter's file.

        The class leaves no hole out. A hole lies in one of two places: among layers of the same
        target with other numbers, which the file adapts; or in a numbered layer whose other targets
        the file adapts, if the class is known to build the layer.
        """
        built = self.has(module)
        if built is False:
            return False
        for stack, number, target in _numbered(module):
            is_counted = self._all_built or self._count(stack) is not None
            if (stack, target) in self._targets and (number <= self._last[stack] or is_counted):
                return True
            if built and (stack, number) in self._numbers:
                return True
        return False

    def _read_count(self, stack: str) -> int | None:
        """Return how many layers of a stack the class builds; None if the config does not tell."""
        last = self._last.get(stack)
        if last is None:
            return None
        possible = [(stem, count) for stem, count in self._counts if count > last]
        of_stack = [count for stem, count in possible if stem and stem in stack]
        return min(of_stack or [count for stem, count in possible if not stem], default=None)

    @cached_property
    def _layers_without_keys(self) -> int:
        """How many of the last layers take keys and values from an earlier layer (Gemma 3n)."""
        parts = (self._config, self._config.get("text_config"))
        found = (part.get("num_kv_shared_layers") for part in parts if isinstance(part, Mapping))
        return max((number for number in found if type(number) is int), default=0)

    @cached_property
    def _counts(self) -> list[tuple[str, int]]:
        """Every number of layers in the config, with the part of a path that has these layers."""
        return [
            (hit["stem"] or hit["experts"] or scope, value)
            for scope, part in _parts(self._config)
            for name, value in part.items()
            if type(value) is int and value > 0 and (hit := _COUNT.fullmatch(name)) is not None
        ]

    @cached_property
    def _known(self) -> frozenset[str]:
        """The layers of a known class, with and without the prefix of the class's body."""
        try:
            linear = layers_from_config(self._config).linear
        except CheckpointError:
            return frozenset()
        paths = {*linear}
        shorter = {path.partition(".")[2] for path in paths if len([*_numbered(path)]) == 1}
        return frozenset(paths | shorter)


def _numbered(module: str) -> Iterator[tuple[str, int, str]]:
    """Yield stack, number and target for each number in a path."""
    parts = module.split(".")
    for at in range(1, len(parts) - 1):
        if parts[at].isdecimal() and len(parts[at]) < 10:
            yield ".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :])


def _lengths(config: Mapping[str, object]) -> set[int]:
    """Return every number in a config that can be the length of a stack, and each list's length."""
    values = [
        value
        for _, part in _parts(config)
        for name, value in part.items()
        if _OTHER_NUMBER.fullmatch(name) is None
    ]
    lists = {len(value) for value in values if isinstance(value, list)}
    return lists | {value for value in values if type(value) is int}


def parts_of_config(config: Mapping[str, object]) -> list[Mapping[str, object]]:
    """Return a config and the nested configs of a model's parts, up to four levels deep."""
    return [part for _, part in _parts(config)]


def _parts(config: Mapping[str, object]) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Yield a config and the nested configs, each with a text in the paths of the part's layers."""
    parts = [("", config)]
    for _ in range(_MOST_DEPTH):
        yield from parts
        below = [
            (_scope(name), value)
            for _, part in parts
            for name, value in part.items()
            if isinstance(value, Mapping) and name.endswith("_config")
        ]
        parts = below[:_MOST_PARTS]


def _scope(name: str) -> str:
    """Return the text in the paths of a part's layers; empty for the text model.

    >>> _scope("vision_config"), _scope("text_config")
    ('vision', '')
    """
    stem = name.removesuffix("_config")
    return "" if stem in ("text", "language", "llm", "thinker", "decoder", "generator") else stem
