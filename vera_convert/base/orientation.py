"""Tell which weights of a base are stored as (in, out)."""

from __future__ import annotations

from vera_convert.base.model import BaseModel
from vera_convert.base.renames import model_types
from vera_convert.targets.linear import CONV1D_LAYERS


class Orientation:
    """Tells which weights of a base are stored as (in, out), as ``Conv1D`` stores weights.

    The shape of a square weight leaves the orientation open. A bias has as many values as
    a layer has outputs. Layers of the same name are stored alike. The model type tells the rest.
    """

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._by_layer_name: dict[str, set[bool]] = {}
        for name in base.tensors:
            found = self._from_bias(name)
            if found is not None:
                self._by_layer_name.setdefault(_layer_name(name), set()).add(found)
        self._types = model_types(base.config)

    def is_conv1d(self, name: str) -> bool | None:
        """Say whether the weight `name` is stored as (in, out); None if unknown."""
        own = self._from_bias(name)
        if own is not None:
            return own
        layer = _layer_name(name)
        kinds = self._by_layer_name.get(layer, set())
        if len(kinds) == 1:
            return next(iter(kinds))
        if any(layer in CONV1D_LAYERS.get(kind, ()) for kind in self._types):
            return True
        # Code beside the weights may define other layers; the layers of all other models are known.
        config = self._base.config
        if (self._types or "_class_name" in config) and "auto_map" not in config:
            return False
        rows, columns = self._base.tensors[name].info.shape
        kinds = set[bool]().union(*self._by_layer_name.values())
        return kinds.pop() if rows == columns and len(kinds) == 1 else None

    def _from_bias(self, name: str) -> bool | None:
        bias = self._base.tensors.get(f"{name.removesuffix('.weight')}.bias")
        shape = self._base.tensors[name].info.shape
        if not name.endswith(".weight") or bias is None or len(shape) != 2 or shape[0] == shape[1]:
            return None
        length = bias.info.shape
        return length == shape[1:] if length in (shape[:1], shape[1:]) else None


def _layer_name(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
