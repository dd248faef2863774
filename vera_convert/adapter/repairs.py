"""Known old and damaged forms of an adapter, brought to the current one without losing anything.

Each repair takes tensors and returns tensors with one phrase for what it changed. Applied twice a
repair changes nothing more; what it does not know it leaves for the reader to refuse.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from vera_convert.adapter.config import ConfigFile
from vera_convert.adapter.tensors import A_NAME, B_NAME, PREFIX, same_tensor
from vera_convert.errors import CheckpointError
from vera_convert.files.reading import printable
from vera_convert.files.tensorfile import TensorData
from vera_convert.rules import NAME_TAKEN_TWICE, PROJECTIONS_DIFFER

_LEFTOVER = re.compile(r"(?P<kept>(?:^|.*\.)vera_(?:lambda_[bd]|A|B))\.(?P<adapter>[^.]+)")
_VERA = re.compile(r"(?:^|.*\.)vera_(?:lambda_[bd]|A|B)")

OLDEST_WITH_UNKNOWN_FIELDS = (0, 14)
"""PEFT before it raises TypeError on a field it does not know, `peft_version` among them."""


@dataclass(slots=True)
class Repairs:
    """The repairs of one adapter, as `open_adapter` applies them.

    Attributes:
        peft_version: the reader that the config must suit, such as (0, 13); None changes nothing.
        changes: after the call, what was changed, one phrase each.
    """

    peft_version: tuple[int, ...] | None = None
    changes: list[str] = field(default_factory=list)

    def __call__(
        self, tensors: Sequence[TensorData], config_file: ConfigFile
    ) -> tuple[Sequence[TensorData], ConfigFile]:
        """Return the repaired tensors and config; every change is named in `changes`."""
        steps: tuple[Callable[[Sequence[TensorData]], tuple[Sequence[TensorData], str]], ...] = (
            _without_orig_mod,
            _without_adapter_name,
            _with_prefix,
            _as_vectors,
            _projections_once,
        )
        for step in steps:
            tensors, change = step(tensors)
            self.changes += [change] if change else []
        config_file, change = _for_reader(config_file, self.peft_version)
        self.changes += [change] if change else []
        return tensors, config_file


def _renamed(
    tensors: Sequence[TensorData], new_name: Callable[[str], str], change: str
) -> tuple[Sequence[TensorData], str]:
    names = [new_name(tensor.name) for tensor in tensors]
    count = sum(name != tensor.name for name, tensor in zip(names, tensors, strict=True))
    if not count:
        return tensors, ""
    seen: set[str] = set()
    for name, tensor in zip(names, tensors, strict=True):
        if name in seen:
            reason = f"another tensor would become {printable(name)} as well."
            raise CheckpointError(NAME_TAKEN_TWICE.at(printable(tensor.name), reason))
        seen.add(name)
    renamed = [
        tensor if name == tensor.name else tensor._replace(name=name)
        for name, tensor in zip(names, tensors, strict=True)
    ]
    return renamed, f"{change} ({count} tensors)"


def _without_orig_mod(tensors: Sequence[TensorData]) -> tuple[Sequence[TensorData], str]:
    def new_name(name: str) -> str:
        return ".".join(element for element in name.split(".") if element != "_orig_mod")

    return _renamed(tensors, new_name, "removed _orig_mod from names")


def _without_adapter_name(tensors: Sequence[TensorData]) -> tuple[Sequence[TensorData], str]:
    found = {
        match["adapter"] for t in tensors if (match := _LEFTOVER.fullmatch(t.name)) is not None
    }
    if len(found) != 1:  # several adapters in one file: which one is meant cannot be known
        return tensors, ""
    (adapter,) = found

    def new_name(name: str) -> str:
        match = _LEFTOVER.fullmatch(name)
        return match["kept"] if match else name

    return _renamed(
        tensors, new_name, f"removed the adapter's name {printable(adapter)} from names"
    )


def _with_prefix(tensors: Sequence[TensorData]) -> tuple[Sequence[TensorData], str]:
    """Add the prefix: to A and B in any case, to layers where none has it.

    So no mixture of two layouts is joined.
    """
    bare = not any(tensor.name.startswith(PREFIX) for tensor in tensors)
    bare &= any(_VERA.fullmatch(tensor.name) for tensor in tensors)
    # Something before base_model is another wrapper's, and says nothing of what is missing.
    bare &= not any("base_model" in tensor.name.split(".")[1:] for tensor in tensors)

    def new_name(name: str) -> str:
        if name.removeprefix("base_model.") in ("vera_A", "vera_B"):
            return f"base_model.{name.removeprefix('base_model.')}"
        return PREFIX + name if bare else name

    return _renamed(tensors, new_name, "added the prefix base_model. to names")


def _as_vectors(tensors: Sequence[TensorData]) -> tuple[Sequence[TensorData], str]:
    def is_column(tensor: TensorData) -> bool:
        return (
            tensor.name.endswith((".vera_lambda_b", ".vera_lambda_d"))
            and len(tensor.shape) == 2
            and tensor.shape[1] == 1
        )

    count = sum(map(is_column, tensors))
    if not count:
        return tensors, ""
    flat = [t._replace(shape=t.shape[:1]) if is_column(t) else t for t in tensors]
    return flat, f"dropped the second dimension of 1 from {count} lambdas"


def _projections_once(tensors: Sequence[TensorData]) -> tuple[Sequence[TensorData], str]:
    """Keep one A and one B of many equal ones; unequal ones are refused."""
    kept = list(tensors)
    removed = 0
    for last, shared_name in (("vera_A", A_NAME), ("vera_B", B_NAME)):
        copies = [t for t in kept if t.name.endswith(f".{last}") and t.name != shared_name]
        if not copies:
            continue
        shared = next((t for t in kept if t.name == shared_name), None)
        first = shared or copies[0]._replace(name=shared_name)
        _demand_equal(first, copies)
        dropped = {copy.name for copy in copies}
        kept = [tensor for tensor in kept if tensor.name not in dropped]
        kept += [] if shared else [first]
        removed += len(copies)
    return (kept, f"stored A and B once instead of {removed} times") if removed else (tensors, "")


def _demand_equal(first: TensorData, copies: Iterable[TensorData]) -> None:
    for copy in copies:
        if not same_tensor(first, copy):
            reason = f"it differs from {printable(first.name)}."
            raise CheckpointError(PROJECTIONS_DIFFER.at(printable(copy.name), reason))


def _for_reader(
    config_file: ConfigFile, peft_version: tuple[int, ...] | None
) -> tuple[ConfigFile, str]:
    if peft_version is None or peft_version >= OLDEST_WITH_UNKNOWN_FIELDS:
        return config_file, ""
    removed = [*config_file.unknown_fields]
    removed += ["peft_version"] if config_file.config.peft_version is not None else []
    if not removed:
        return config_file, ""
    names = ", ".join(map(printable, sorted(removed)))
    edited = config_file.edited(remove=frozenset(removed))
    return edited, f"removed config fields that old PEFT refuses: {names}"
