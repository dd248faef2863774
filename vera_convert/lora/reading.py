"""A LoRA that lies on disk, whoever wrote the LoRA: the factors of each layer, read when asked for.

Nothing but the files' own words is trusted: shapes and dtypes are checked before values are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert.adapter.config import CONFIG_NAME
from vera_convert.adapter.names import PREFIX
from vera_convert.adapter.tensors import WEIGHTS_NAME
from vera_convert.dtypes import FLOATS
from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.files.reading import open_local
from vera_convert.files.strict_json import read_json
from vera_convert.files.tensorfile import TensorData, TensorFile, from_file
from vera_convert.lora.record import METADATA_KEY, parse_record
from vera_convert.rules import LORA_UNREADABLE
from vera_convert.text import printable

_CONFIG_LIMIT = 10_000_000
_PARTS = {".lora_A.weight": 0, ".lora_B.weight": 1}


@dataclass(frozen=True, slots=True)
class ReadLayer:
    """One layer of a LoRA on disk.

    Attributes:
        lora_A: (rank, in).
        lora_B: (out, rank).
        scaling: the factor of their product.
    """

    lora_A: TensorData  # noqa: N815 -- the matrix is called A
    lora_B: TensorData  # noqa: N815
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """The layer's outputs and inputs."""
        return self.lora_B.shape[0], self.lora_A.shape[1]

    def factors(self) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """Read lora_A, and lora_B times the scaling."""
        return self.lora_A.array(), self.lora_B.array().astype(np.float64) * self.scaling


@dataclass(frozen=True, slots=True)
class ReadLora:
    """A LoRA on disk.

    Attributes:
        layers: the layers, by the path of the module.
        others: tensors of no layer, by name: heads and biases.
        record: what this package recorded when it wrote the LoRA; None for another's LoRA.
    """

    layers: Mapping[str, ReadLayer]
    others: Mapping[str, TensorData] = field(default_factory=dict)
    record: Mapping[str, object] | None = None


@contextmanager
def open_lora(folder: Path) -> Iterator[ReadLora]:
    """Open the LoRA in a folder; its tensors can be read until the context ends.

    Raises:
        CheckpointError: the files are malformed, or are of no LoRA.
        SurroundingsError: there is no such folder, or a file cannot be read.
    """
    if not folder.is_dir():
        raise SurroundingsError(f"there is no folder {printable(str(folder))}.")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).exists():
            raise _unreadable(folder.name, f"there is no {name}")
    with open_local(folder / CONFIG_NAME, within=folder) as source:
        config, _ = read_json(source, limit=_CONFIG_LIMIT, pythons_numbers=True)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise _unreadable(CONFIG_NAME, "its peft_type is not LORA")
    with open_local(folder / WEIGHTS_NAME, within=folder) as source:
        file = TensorFile(source)
        pairs, others = _sorted(file)
        scaling = _Scaling.of(config)
        layers = {
            module: ReadLayer(*pair, scaling.of_module(module, pair[0].shape[0]))
            for module, pair in pairs.items()
        }
        yield ReadLora(layers, others, parse_record(file.header.metadata.get(METADATA_KEY)))


def _sorted(
    file: TensorFile,
) -> tuple[dict[str, tuple[TensorData, TensorData]], dict[str, TensorData]]:
    """Return the pair of each layer, and the other tensors by name."""
    found: dict[str, list[TensorData | None]] = {}
    others: dict[str, TensorData] = {}
    for name in file.header.tensors:
        ending = next((end for end in _PARTS if name.endswith(end)), None)
        tensor = from_file(file, name)
        if ending is None:
            others[name] = tensor
        else:
            module = name.removesuffix(ending).removeprefix(PREFIX)
            found.setdefault(module, [None, None])[_PARTS[ending]] = tensor
    pairs = {}
    for module, (lora_A, lora_B) in found.items():
        place = printable(module)
        if lora_A is None or lora_B is None:
            raise _unreadable(place, "one of lora_A and lora_B is missing")
        if len(lora_A.shape) != 2 or len(lora_B.shape) != 2:
            raise _unreadable(place, "lora_A or lora_B is no matrix")
        if lora_A.shape[0] != lora_B.shape[1] or not math.prod((*lora_A.shape, *lora_B.shape)):
            reason = f"lora_A is {list(lora_A.shape)}, lora_B {list(lora_B.shape)}"
            raise _unreadable(place, reason)
        if not {lora_A.dtype, lora_B.dtype} <= FLOATS:
            raise _unreadable(place, f"its factors are {lora_A.dtype} and {lora_B.dtype}")
        pairs[module] = lora_A, lora_B
    return pairs, others


def _unreadable(place: str, reason: str) -> CheckpointError:
    return CheckpointError(LORA_UNREADABLE.at(printable(place), f"{reason}."))


@dataclass(frozen=True, slots=True)
class _Scaling:
    """How a config scales the product of the two factors."""

    alpha: float
    patterns: Mapping[str, float]
    rank_stabilized: bool

    @classmethod
    def of(cls, config: Mapping[str, object]) -> _Scaling:
        alpha, patterns = config.get("lora_alpha", 8), config.get("alpha_pattern") or {}
        is_fine = isinstance(patterns, dict) and all(_is_number(v) for v in patterns.values())
        if not _is_number(alpha) or not is_fine:
            raise _unreadable(CONFIG_NAME, "lora_alpha or alpha_pattern is malformed")
        if config.get("use_dora"):
            raise _unreadable(CONFIG_NAME, "use_dora is true, so the layers are no plain LoRA")
        assert isinstance(alpha, int | float)  # noqa: S101 -- for the type checker
        return cls(float(alpha), dict(patterns), bool(config.get("use_rslora")))  # type: ignore[call-overload]

    def of_module(self, module: str, rank: int) -> float:
        own = (
            value
            for name, value in self.patterns.items()
            if module == name or module.endswith(f".{name}")
        )
        alpha = next(own, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
