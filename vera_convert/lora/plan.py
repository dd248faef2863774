"""A LoRA as data before a byte is written: layers, names, rank, size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from vera_convert.adapter.adapter import AdaptedLayer, Adapter
from vera_convert.base.facts import BaseFacts
from vera_convert.dtypes import BITS
from vera_convert.errors import UsageError
from vera_convert.lora.engines import Engine, experts_of
from vera_convert.lora.factors import Decomposition, Factors, Inputs, smallest_rank
from vera_convert.lora.options import LoraOptions
from vera_convert.merging.in_effect import InEffect
from vera_convert.targets.linear import Linear, kind_of
from vera_convert.text import printable


@dataclass(frozen=True, slots=True, eq=False)
class LoraLayer:
    """One layer of a LoRA.

    Attributes:
        module: the layer's path in the adapter's model.
        written: the layer's path in the LoRA.
        shape: outputs and inputs of the layer in the base, and whether the layer is a Conv1D.
        vectors: the layer's d and b; None for a layer of zeros.
        pair: the A and B in effect.
        tied: whether the layer is an output head with the embedding's tensor.
    """

    module: str
    written: str
    shape: Linear
    vectors: AdaptedLayer | None
    pair: InEffect
    tied: bool = False

    def factors(self) -> Factors:
        """Read d and b, and return the layer's operands."""
        out, width = self.shape.out_features, self.shape.in_features
        A, B = self.pair.A[:, :width], self.pair.B[:out]
        if self.vectors is None:
            return Factors(A, B, np.zeros(len(A), A.dtype), np.zeros(out, A.dtype))
        return Factors(A, B, self.vectors.lambda_d.array(), self.vectors.lambda_b.array())


@dataclass(frozen=True, slots=True, eq=False)
class LoraPlan:
    """A LoRA before it is written.

    Attributes:
        layers: every layer, in the adapter's order, and then the layers of zeros.
        rank: the rank of every layer, which is also lora_alpha.
        rows: the rows of A in the exact LoRA; every layer multiplies the others by 0.
        reduced: whether `rank` is below the number of `rows`, so layers are approximated.
        exact_rank: a rank at which every layer is exact up to rounding.
        dtype: the dtype of the factors, as safetensors names it.
        missing: unwritten modules that the engine wants beside the adapted modules.
        inputs: the input sides computed so far, by the number of inputs.
    """

    layers: tuple[LoraLayer, ...]
    rank: int
    rows: NDArray[np.intp]
    reduced: bool
    exact_rank: int
    dtype: str
    missing: tuple[str, ...] = ()
    inputs: dict[int, Inputs] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The bytes of all factors."""
        values = sum(
            self.rank * (layer.shape.in_features + layer.shape.out_features)
            for layer in self.layers
        )
        return values * BITS[self.dtype] // 8

    def shapes(self, layer: LoraLayer) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the shapes of lora_A and lora_B of a layer."""
        return (self.rank, layer.shape.in_features), (layer.shape.out_features, self.rank)

    @property
    def filled(self) -> int:
        """The number of layers of zeros."""
        return sum(layer.vectors is None for layer in self.layers)


def plan_lora(
    adapter: Adapter, base_facts: BaseFacts, pair: InEffect, options: LoraOptions
) -> LoraPlan:
    """Plan a LoRA.

    Args:
        adapter: the adapter.
        base_facts: the base facts; the shape of every adapted layer must be known.
        pair: the A and B in effect.
        options: the options of the conversion.

    Raises:
        UsageError: the base packs layers, and nothing else tells the sizes of the layers.
    """
    layers = [*_layers(adapter, base_facts, pair, options.target)]
    missing = _missing(layers, base_facts, options.target)
    if options.fill_layers:
        shapes = {module: _shape(module, layers, base_facts) for module in missing}
        layers += _filled(shapes, base_facts, pair, options.target)
        missing = [module for module, shape in shapes.items() if shape is None]
    rows, most = _used_rows(layers, len(pair.A))
    rank, inputs = len(rows), dict[int, Inputs]()
    if options.rank is not None:
        rank = min(options.rank, rank)
    elif options.max_error is not None:
        rank = min(_rank_for(layers, rows, options.max_error, inputs), rank)
    widest = max(min(layer.shape.in_features, layer.shape.out_features) for layer in layers)
    return LoraPlan(
        layers=tuple(layers),
        rank=rank,
        rows=rows,
        reduced=rank < len(rows),
        exact_rank=min(most, widest),
        dtype=options.stored,
        missing=tuple(missing),
        inputs=inputs,
    )


# --- layers --------------------------------------------------------------------------------------


def _layers(
    adapter: Adapter, base_facts: BaseFacts, pair: InEffect, engine: Engine
) -> Iterator[LoraLayer]:
    unknown = [module for module in adapter.layers if module not in base_facts.layers]
    if unknown:
        raise UsageError(
            f"{base_facts.source}, and a LoRA needs the size of each adapted layer, such as "
            f'"{printable(unknown[0])}". Pass the model before its quantization with --base.'
        )
    for module, vectors in adapter.layers.items():
        written = _written(module, base_facts, engine)
        tied = base_facts.match is not None and module in base_facts.match.tied
        yield LoraLayer(module, written, base_facts.layers[module], vectors, pair, tied)


def _written(module: str, base_facts: BaseFacts, engine: Engine) -> str:
    """Return the path by which the engine looks a module up."""
    match = base_facts.match
    if match is None or not has_base_names(engine, base_facts):
        return module
    tensor = match.tensors.get(module)
    if tensor is not None and module not in match.tied and module not in match.parts:
        return tensor.removesuffix(".weight")
    return match.strategy.rename(module) or module


def has_base_names(engine: Engine, base_facts: BaseFacts) -> bool:
    """Say whether a LoRA has the names of the base's files, and not the adapter's.

    With a key map, the adapter has another model's names, which no engine looks up.
    """
    match = base_facts.match
    return engine.base_names or (match is not None and match.strategy.is_given)


def _missing(layers: Sequence[LoraLayer], base_facts: BaseFacts, engine: Engine) -> list[str]:
    """Return the modules without a LoRA that the engine needs beside the adapted modules."""
    own = {layer.module for layer in layers}
    wanted = {
        f"{path}.{name}".lstrip(".")
        for path, _, last in (module.rpartition(".") for module in own)
        for name in engine.partners.get(last, ())
    }
    if engine.whole_experts:
        experts = {*map(experts_of, own)} - {""}
        wanted |= {module for module in base_facts.modules if experts_of(module) in experts}
    if engine.every_layer:
        kinds = {kind_of(module) for module in own if kind_of(module) != module}
        wanted |= {
            module
            for module in base_facts.modules
            if kind_of(module) in kinds and engine.knows(_written(module, base_facts, engine))
        }
    return sorted((wanted & {*base_facts.modules}) - own)


def _shape(module: str, layers: Sequence[LoraLayer], base_facts: BaseFacts) -> Linear | None:
    """Return the shape of a layer outside the adapter; None if nothing tells the shape."""
    conv1d = any(layer.shape.conv1d for layer in layers if kind_of(layer.module) == kind_of(module))
    base, match = base_facts.base, base_facts.match
    path = match.strategy.rename(module) if match is not None else None
    for name in (f"{path}.weight", f"{module}.weight"):
        tensor = base.tensors.get(name) if base is not None else None
        if tensor is not None and len(tensor.info.shape) == 2:
            rows, columns = tensor.info.shape
            return Linear(columns, rows, conv1d=True) if conv1d else Linear(rows, columns)
    same = (each.shape for each in layers if kind_of(each.module) == kind_of(module))
    return next(same, None)


def _filled(
    shapes: Mapping[str, Linear | None], base_facts: BaseFacts, pair: InEffect, engine: Engine
) -> Iterator[LoraLayer]:
    """Yield layers of zeros; a layer can be larger than A and B if no adapter has the layer."""
    rows, columns = len(pair.B), pair.A.shape[1]
    for module, shape in shapes.items():
        if shape is None:
            continue
        wider = max(shape.in_features - columns, 0), max(shape.out_features - rows, 0)
        large = pair
        if any(wider):
            A = np.pad(pair.A, ((0, 0), (0, wider[0])))
            large = replace(pair, A=A, B=np.pad(pair.B, ((0, wider[1]), (0, 0))))
        yield LoraLayer(module, _written(module, base_facts, engine), shape, None, large)


# --- ranks ---------------------------------------------------------------------------------------


def _used_rows(layers: Iterable[LoraLayer], rank: int) -> tuple[NDArray[np.intp], int]:
    """Return the rows of A in use by any layer, and the most rows in use by a single layer.

    A row is left out only if every layer leaves the row out, so lora_A is the same in all layers.
    If no layer uses any, the first row is kept, because a LoRA has a rank.
    """
    used, most = np.zeros(rank, bool), 1
    for layer in layers:
        if layer.vectors is not None:
            own = layer.vectors.lambda_d.array() != 0
            used |= own
            most = max(most, int(own.sum()))
    return (np.flatnonzero(used) if used.any() else np.zeros(1, np.intp)), most


def _rank_for(
    layers: Iterable[LoraLayer],
    rows: NDArray[np.intp],
    error: float,
    inputs: dict[int, Inputs],
) -> int:
    """Return the smallest rank at which every layer keeps to a relative error."""
    needed = 1
    for layer in layers:
        if layer.vectors is None:
            continue
        factors = layer.factors().select(rows)
        own = int(np.count_nonzero(factors.d))
        if own > needed:
            values = Decomposition.of(factors, inputs).values
            needed = max(needed, min(own, smallest_rank(values, error)))
    return needed
