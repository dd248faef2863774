"""Find the tensors of a base that a tensor saved whole by an adapter replaces."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import chain
from typing import NamedTuple

from vera_convert.adapter.names import PREFIX
from vera_convert.base.match import Match
from vera_convert.base.model import BaseModel
from vera_convert.base.renames import release_names
from vera_convert.base.templates import BODY

ORIGINAL = ".original_module"
"""The end of the path of a module that PEFT wraps, which keeps the values before the training."""


class Part(NamedTuple):
    """The values of one tensor of the base inside an adapter's tensor.

    Attributes:
        target: the base's name.
        shape: the shape of the values.
        first: the position of the first value in the adapter's tensor.
    """

    target: str
    shape: tuple[int, ...]
    first: int = 0


class Places:
    """Finds the place of each saved tensor of an adapter in a base.

    The object is made once for all tensors, because the names of all releases take long to find.
    """

    def __init__(self, match: Match, base: BaseModel) -> None:
        """Collect the ways to rename saved modules.

        Args:
            match: the match of the adapter's layers, whose strategy also renames saved modules.
            base: the base.
        """
        self._base = base
        releases = [*release_names(base)]
        # Layers may fit as they are although a saved module has another name.
        own: list[Callable[[str], str | None]] = [match.strategy.rename, str]
        self._renames = [*own, *(each.rename for each in releases)]
        self._around = [each.around for each in releases if each.around is not None]

    def of(self, name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Return the base's tensors that a saved tensor replaces.

        Args:
            name: the tensor's name in the adapter's file.
            shape: the tensor's shape.

        Returns:
            The plain name with the complete shape, if the base lacks the tensor.
        """
        module, _, parameter = name.removeprefix(PREFIX).rpartition(".")
        module = re.sub(r"(^|\.)base_layer$", "", module).removesuffix(ORIGINAL)
        paths = [path for rename in self._renames if (path := rename(module)) is not None]
        plain = ".".join(filter(None, (module, parameter)))
        named = [".".join(filter(None, (path, parameter))) for path in paths]
        there = chain(
            named,
            (rename(plain) for rename in self._renames),  # some classes rename the parameter too
            # Loaders add and remove the prefix of the model for each tensor alone.
            (path.removeprefix(BODY) for path in named),
            (f"{BODY}{path}" for path in named),
        )
        tensors = self._base.tensors
        target = next((path for path in there if path in tensors), None) or plain
        paths += [around(module) for around in self._around]
        parts = () if target in tensors else _experts(paths, parameter, shape, self._base)
        return parts or (Part(target, shape),)


_LAYERS_OF_EXPERTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3"), ("fc1", "fc3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",), ("fc2",)),
}
"""The layers of an expert in files, for each tensor of all experts in transformers 5."""


def _experts(
    paths: Iterable[str], parameter: str, shape: tuple[int, ...], base: BaseModel
) -> tuple[Part, ...]:
    """Return the base's tensors in a tensor of all experts; empty if the base lacks one.

    Transformers 5 stacks the experts along the first axis, and the layers of one expert along the
    second axis.
    """
    if len(shape) != 3:
        return ()
    experts, rows, columns = shape
    for path in paths:
        for layers in _LAYERS_OF_EXPERTS.get(parameter, ()):
            height = rows // len(layers)
            if experts * len(layers) > len(base.tensors):
                continue  # a file can claim any number of experts
            names = [f"{path}.{n}.{layer}.weight" for n in range(experts) for layer in layers]
            is_more = f"{path}.{experts}.{layers[0]}.weight" in base.tensors
            if not is_more and all(name in base.tensors for name in names):
                return tuple(
                    Part(name, (height, columns), position * height * columns)
                    for position, name in enumerate(names)
                )
    return ()
