"""Known layers that a base stores joined with others, in pieces, or in another order.

transformers cuts, joins and reorders the tensors when loading. A merge adds a delta to the rows of
a layer in a tensor of equal parts, and refuses the other layers by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

from vera_convert import rules
from vera_convert.base.model import BaseModel
from vera_convert.base.renames import model_types
from vera_convert.rules import Finding
from vera_convert.tables import table
from vera_convert.text import printable


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor in the files, cut into several layers or reordered by transformers.

    Attributes:
        types: the model types.
        files: the end of the tensor's path, or of the name of a parameter beside ``weight``.
        memory: the ends of the paths of the layers in memory.
        kind: ``reordered`` if transformers reorders rows; ``cut`` if it only cuts, into layers with
            equal numbers of rows (of q, k and v, only k and v must); ``uneven`` for other numbers.
        sizes: for each layer of an uneven tensor, the tensor beside with one row or value for each
            row of the layer; ``*`` for the layer with the rows that are left.
    """

    types: frozenset[str]
    files: str
    memory: tuple[str, ...]
    kind: str
    sizes: tuple[str, ...] = ()

    def first_row(
        self, layer: str, beside: Callable[[str], int | None], outputs: int, rows: int
    ) -> int | None:
        """Return the first row of a layer in the tensor; None if the place is not known.

        In a tensor of q, k and v, the layers k and v have as many rows each, and q has the rest.

        Args:
            layer: the end of the layer's path.
            beside: returns the rows of a tensor beside; None if absent.
            outputs: the layer's outputs.
            rows: the rows of the tensor.
        """
        part, parts = self.memory.index(layer), len(self.memory)
        if self.sizes:
            heights = self._heights(beside, rows)
            return sum(heights[:part]) if heights and heights[part] == outputs else None
        if self.kind != "cut":
            return None
        if parts * outputs == rows:
            return part * outputs
        if [name.rpartition(".")[2] for name in self.memory] != _QUERY_KEY_VALUE:
            return None
        if part == 0:
            return 0 if rows > outputs and (rows - outputs) % 2 == 0 else None
        return rows - (parts - part) * outputs if rows > 2 * outputs else None

    def _heights(self, beside: Callable[[str], int | None], rows: int) -> list[int]:
        """Return the rows of each layer; empty if a tensor beside is absent."""
        known = {size: beside(size) for size in self.sizes if size != "*"}
        found = [known.get(size) for size in self.sizes]
        if None in known.values():
            return []
        left = rows - sum(height for height in found if height is not None)
        return [left if height is None else height for height in found]


@dataclass(frozen=True, slots=True)
class Inside:
    """The place of a layer inside a tensor with other layers, or in several tensors.

    Attributes:
        tensors: the tensors with the rows of the layer.
        in_features: the inputs of the layer.
        first: the layer's first row in the only tensor; None if a merge refuses the layer.
        finding: why a merge refuses the layer.
        experts: how many layers of the same name the tensor stacks; 0 if the tensor is no stack.
    """

    tensors: tuple[str, ...]
    in_features: int
    first: int | None
    finding: Finding
    experts: int = 0


_FirstRow = Callable[[int, int], int | None]
"""The first row of a layer in a tensor, by the layer's outputs and the tensor's rows."""


def _spread(text: str) -> tuple[str, ...]:
    start, _, rest = text.partition("{")
    names, _, end = rest.partition("}")
    return tuple(start + name + end for name in names.split(","))


LAYOUTS = tuple(
    Layout(
        frozenset(types.split()),
        files.strip(),
        _spread(memory.strip()),
        kind,
        tuple(" ".join(sizes).split()),
    )
    for kind, lines in table(__file__, "unsupported_layouts.toml").items()
    for types, files, memory, *sizes in (line.split("|") for line in lines.split("\n") if line)
)
"""The tensors cut or reordered by transformers."""

PARTS_OF_LAYERS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
}
"""Layers in memory, stored in files as several tensors, by the last part of the path."""

_QUERY_KEY_VALUE = ["q_proj", "k_proj", "v_proj"]
_DOWN = re.compile(r"(?:^|[._])(?:down|w2|fc2|output)(?:$|[._])")
_TWO_LAYERS = re.compile(r"gate_up|input_linear")
"""The name of a stack in which each expert has the rows of two layers, gate and up."""


def other_layout(modules: Iterable[str], base: BaseModel) -> Finding | None:
    """Return the known reason why the base lacks a layer's tensor; None for an unknown layout.

    Args:
        modules: paths, in the adapter, of layers without a tensor.
        base: the base.
    """
    layers = Layers(base)
    for module in {re.sub(r"\d+", "#", module): module for module in modules}.values():
        stacks = [*layers.stacks(module)]
        found = _stacked(module, stacks[0], base) if stacks else layers.finding(module)
        if found is not None:
            return found
    return None


class Layers:
    """Finds the layers stored by a base in tensors with other layers, or in several tensors."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        types = set(model_types(base.config))
        self._layouts = [layout for layout in LAYOUTS if types & layout.types]

    @cached_property
    def _names(self) -> dict[tuple[str, ...], list[str]]:
        """The names of the base's tensors, by the numbers in each name."""
        found: dict[tuple[str, ...], list[str]] = {}
        for name in self._base.tensors:
            found.setdefault(_numbers(name), []).append(name)
        return found

    def finding(self, module: str) -> Finding | None:
        """Return the reason why a merge would refuse a layer, by the end of the path alone."""
        return next((found for _, _, found in self._candidates(module)), None)

    def inside(self, module: str, outputs: int, undo: Callable[[str], str | None]) -> Inside | None:
        """Return the proven place of a layer in shared or several tensors; None without proof.

        The end of a path leaves open whether tensor and layer belong to the same part of the model.
        Another tensor of the same block must have the layer's block in the adapter's names.

        Args:
            module: the layer's path in the adapter.
            outputs: the layer's outputs.
            undo: from a path in the files to the path in the adapter.
        """
        block = _block(module)
        for names, first_row, finding in self._candidates(module):
            shapes = [self._base.tensors[name].info.shape for name in names]
            near = (
                name for name in self._names[_numbers(module)] if _block(name) == _block(names[0])
            )
            is_proven = any(_block(undo(name.rpartition(".")[0]) or "") == block for name in near)
            rows = sum(shape[0] for shape in shapes if len(shape) == 2)
            is_whole = rows == outputs if len(names) > 1 else rows >= outputs
            if block and is_proven and is_whole and len({shape[1:] for shape in shapes}) == 1:
                return Inside(names, shapes[0][1], first_row(outputs, rows), finding)
        return self._expert(module, outputs, undo)

    def joined(self, undo: Callable[[str], str | None]) -> Iterator[str]:
        """Yield the path, in the adapter's model, of each layer that transformers cuts out.

        Args:
            undo: from a path in the files to the path in the adapter.
        """
        cut = {
            name: layout
            for layout in self._layouts
            for name in self._base.tensors
            if f".{name}".removesuffix(".weight").endswith(f".{layout.files}")
        }
        if not cut:  # as in most classes; a base of experts has tens of thousands of paths
            return
        paths = (name.rpartition(".")[0] for name in self._base.tensors.keys() - cut.keys())
        blocks = {_block(f"{path}."): _block(f"{undo(path) or ''}.") for path in sorted(paths)}
        for name, layout in cut.items():
            block = blocks.get(_block(name))
            yield from (block + end for end in layout.memory if block)

    def _expert(
        self, module: str, outputs: int, undo: Callable[[str], str | None]
    ) -> Inside | None:
        """Return the proven place of an expert's layer in a stack of experts; None without proof.

        The first axis of a stack counts the experts. Models differ in the order of the other two,
        so the length of lambda_b tells which axis is the outputs. The arguments are those of
        `inside`.
        """
        for name in self.stacks(module):
            experts, *axes = self._base.tensors[name].info.shape
            rows = outputs * (2 if _TWO_LAYERS.search(name) else 1)
            is_same_block = _layer_of(undo(name.rpartition(".")[0]) or "") == _layer_of(module)
            is_same_kind = bool(_DOWN.search(name)) == bool(_DOWN.search(module))
            is_there = _number_of_expert(module) < experts
            if is_same_block and is_same_kind and rows in axes and is_there:
                inputs = axes[1 - axes.index(rows)]
                return Inside((name,), inputs, None, _stacked(module, name, self._base), experts)
        return None

    def stacks(self, module: str) -> Iterator[str]:
        """Yield the tensors that can stack all experts of a layer, if `module` is in an expert."""
        start, experts, rest = module.rpartition(".experts.")
        # experts.0.up_proj, or experts.up_projs.0 where each name has a separate list
        if not experts or not any(part.isdecimal() for part in rest.split(".")[:2]):
            return
        for name in self._names.get(_numbers(start), ()):
            shape = self._base.tensors[name].info.shape
            if len(shape) == 3 and re.search(r"experts|(in|out)put_linear", name):
                yield name

    def _candidates(self, module: str) -> Iterator[tuple[tuple[str, ...], _FirstRow, Finding]]:
        """Yield possible tensors of a layer: names, the layer's first row, finding."""
        for layout in self._layouts:
            ends = [end for end in layout.memory if f".{module}".endswith(f".{end}")]
            for name in self._ending(layout.files, like=module) if ends else ():
                rule = rules.LAYER_REORDERED if layout.kind == "reordered" else rules.LAYER_CUT_OUT
                reason = f'"{printable(module)}" is made from it.'
                first_row = partial(layout.first_row, ends[0], partial(self._rows_beside, name))
                yield (name,), first_row, rule.at(printable(name), reason)
        start, _, last = module.rpartition(".")
        parent = start.rpartition(".")[2]
        parts = [
            self._ending(f"{parent}.{part}", like=module) for part in PARTS_OF_LAYERS.get(last, ())
        ]
        for names in zip(*parts, strict=False):
            stored = " and ".join(f'"{printable(name)}"' for name in names)
            finding = rules.LAYER_OF_SEVERAL.at(printable(module), f"the base stores {stored}.")
            yield names, lambda _outputs, _rows: None, finding

    def _rows_beside(self, name: str, other: str) -> int | None:
        """Return the rows of a tensor in the module around that of `name`; None if absent."""
        around = name.removesuffix(".weight").rpartition(".")[0]
        found = self._base.tensors.get(f"{around}.{other}")
        return found.info.shape[0] if found is not None and found.info.shape else None

    def _ending(self, end: str, *, like: str) -> list[str]:
        """Return the tensors with the layer numbers of `like` and with the end `end`."""
        ends = (f".{end}", f".{end}.weight")
        return [name for name in self._names.get(_numbers(like), ()) if f".{name}".endswith(ends)]


def _numbers(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split(".") if part.isdecimal())


def _block(path: str) -> str:
    """Return a path up to the last number; empty for a path without a number."""
    found = re.match(r"(.*\.)?\d+(?=\.)", path)
    return found[0] if found else ""


def experts_beside(module: str, experts: int) -> Iterator[str]:
    """Yield the paths of the layers with the name of `module` in all experts of a stack.

    >>> [*experts_beside("layers.1.experts.1.up_proj", 2)]
    ['layers.1.experts.0.up_proj', 'layers.1.experts.1.up_proj']
    """
    start, middle, rest = module.rpartition(".experts.")
    number = _number_of_expert(module)
    for each in range(experts):
        yield start + middle + re.sub(rf"(?<![^.]){number}(?![^.])", str(each), rest, count=1)


def _layer_of(module: str) -> str:
    """Return the path of the layer with the experts of a module."""
    return _block(module.partition(".experts")[0] + ".")


def _number_of_expert(module: str) -> int:
    return int(_numbers(module.rpartition(".experts.")[2])[0])


def _stacked(module: str, stack: str, base: BaseModel) -> Finding:
    reason = f'"{printable(module)}" is one of the experts in "{printable(stack)}".'
    return rules.EXPERTS_STACKED.at(base.location.label, reason)
