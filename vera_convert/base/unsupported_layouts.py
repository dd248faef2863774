"""Known layers that a base stores joined with others, in pieces, or in another order.

transformers cuts, joins and reorders such tensors when loading. A merge does not; this table lets a
merge refuse such a layer by name.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vera_convert.base.model import BaseModel
from vera_convert.base.renames import model_types
from vera_convert.rules import (
    EXPERTS_STACKED,
    LAYER_CUT_OUT,
    LAYER_OF_SEVERAL,
    LAYER_REORDERED,
    Finding,
)
from vera_convert.text import printable


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor in the files that transformers turns into several layers, or reorders.

    Attributes:
        types: the model types.
        files: the end of the tensor's path, or of the name if the parameter is no ``weight``.
        memory: the ends of the paths of the layers in memory.
        is_permuted: whether transformers reorders rows; False if transformers only cuts.
    """

    types: frozenset[str]
    files: str
    memory: tuple[str, ...]
    is_permuted: bool = False


def _layouts(table: str, *, is_permuted: bool = False) -> tuple[Layout, ...]:
    """Read lines of ``types | files | memory``; ``{q,k,v}_proj`` stands for several names."""
    rows = (line.split("|") for line in table.splitlines() if line.strip())
    return tuple(
        Layout(frozenset(types.split()), files.strip(), _spread(memory.strip()), is_permuted)
        for types, files, memory in rows
    )


def _spread(text: str) -> tuple[str, ...]:
    start, _, rest = text.partition("{")
    names, _, end = rest.partition("}")
    return tuple(start + name + end for name in names.split(","))


_TABLES = tomllib.loads(
    Path(__file__).with_name("unsupported_layouts.toml").read_text(encoding="utf-8")
)
LAYOUTS = (
    *_layouts(_TABLES["cut"]),
    *_layouts(_TABLES["reordered"], is_permuted=True),
)
"""The tensors that transformers cuts or reorders."""

PARTS_OF_LAYERS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
}
"""Layers in memory that files hold as several tensors, by the last part of the path."""


def other_layout(modules: Iterable[str], base: BaseModel) -> Finding | None:
    """Return the known reason why the base has no tensor for a layer; None if no layout is known.

    Args:
        modules: paths, in the adapter, of layers without a tensor.
        base: the base.
    """
    by_numbers = _ByNumbers(base)
    types = set(model_types(base.config))
    layouts = [layout for layout in LAYOUTS if types & layout.types]
    for module in {re.sub(r"\d+", "#", module): module for module in modules}.values():
        found = (
            _experts(module, base)
            or _cut_out(module, layouts, by_numbers)
            or _of_several(module, by_numbers)
        )
        if found is not None:
            return found
    return None


class _ByNumbers:
    """Finds tensors by the end of the name, among tensors with the same layer numbers."""

    def __init__(self, base: BaseModel) -> None:
        self._names: dict[tuple[str, ...], list[str]] = {}
        for name in base.tensors:
            self._names.setdefault(_numbers(name), []).append(name)

    def ending(self, end: str, *, like: str) -> str | None:
        """Return the tensor of the same layer whose name has this end, if there is one."""
        ends = (f".{end}", f".{end}.weight")
        names = self._names.get(_numbers(like), ())
        return next((name for name in names if f".{name}".endswith(ends)), None)


def _numbers(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split(".") if part.isdecimal())


def _experts(module: str, base: BaseModel) -> Finding | None:
    """Return a finding if one tensor holds all experts of a layer."""
    start, experts, rest = module.rpartition(".experts.")
    # experts.0.up_proj, or experts.up_projs.0 where each name has a list of its own
    if not experts or not any(part.isdecimal() for part in rest.split(".")[:2]):
        return None
    numbers = _numbers(start)
    for name, tensor in base.tensors.items():
        is_stack = len(tensor.info.shape) == 3 and re.search(r"experts|(in|out)put_linear", name)
        if is_stack and _numbers(name) == numbers:
            reason = f'"{printable(module)}" is one of the experts in "{printable(name)}".'
            return EXPERTS_STACKED.at(base.location.label, reason)
    return None


def _cut_out(module: str, layouts: Iterable[Layout], tensors: _ByNumbers) -> Finding | None:
    """Return a finding if the layer is cut from a tensor, or reordered."""
    for layout in layouts:
        if f".{module}".endswith(tuple(f".{end}" for end in layout.memory)):
            name = tensors.ending(layout.files, like=module)
            if name is not None:
                rule = LAYER_REORDERED if layout.is_permuted else LAYER_CUT_OUT
                return rule.at(printable(name), f'"{printable(module)}" is made from it.')
    return None


def _of_several(module: str, tensors: _ByNumbers) -> Finding | None:
    """Return a finding if several tensors are joined to the layer."""
    start, _, last = module.rpartition(".")
    parent = start.rpartition(".")[2]
    names = [
        tensors.ending(f"{parent}.{part}", like=module) for part in PARTS_OF_LAYERS.get(last, ())
    ]
    found = [name for name in names if name is not None]
    if not found or len(found) != len(names):
        return None
    parts = " and ".join(f'"{printable(name)}"' for name in found)
    return LAYER_OF_SEVERAL.at(printable(module), f"the base stores {parts}.")
