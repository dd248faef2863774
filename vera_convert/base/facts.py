"""What is known of the base that an adapter is for: its dims, and the rounding to its dtype.

The records alone, which cost nothing to load; how they are come by lies in `learning`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vera_convert.arguments import dtype_name, optional, place, set_checked, text, whole_number
from vera_convert.draws.generator import Rounding, rounding_on_base
from vera_convert.errors import UsageError
from vera_convert.rules import ROUNDING_UNCLEAR, Finding
from vera_convert.text import printable

if TYPE_CHECKING:
    from vera_convert.base.match import Match
    from vera_convert.base.model import BaseModel
    from vera_convert.hub.lookup import Location
    from vera_convert.targets.linear import Linear

_PATH = re.compile(r"([^.=\s]+(\.[^.=\s]+)*)?")
"""A path of a module, or nothing."""


@dataclass(frozen=True, slots=True)
class BaseOptions:
    """What a caller says of the base; all of it can be left out.

    Attributes:
        model: a folder or a repo on the Hub.
        revision: its branch, tag or commit; None for the one of the adapter's config.
        dtype: the dtype it is loaded in, such as ``bfloat16``.
        in_features: columns of A, where no base is at hand.
        out_features: rows of B, likewise.
        key_map: pairs (OLD, NEW) that rename leading paths of the adapter's modules.
        places: pairs (NAME, MODEL): where the base lies that adapters' configs call NAME; a
            mapping will do.

    Example:
        >>> BaseOptions("org/model", dtype="bf16").dtype
        'bfloat16'
    """

    model: str | None = None
    revision: str | None = None
    dtype: str | None = None
    in_features: int | None = None
    out_features: int | None = None
    key_map: Sequence[tuple[str, str]] = ()
    places: Sequence[tuple[str, str]] = ()

    def __post_init__(self) -> None:
        set_checked(
            self,
            model=optional(place, "--base", self.model),
            revision=optional(text, "--base-revision", self.revision),
            dtype=optional(dtype_name, "--base-dtype", self.dtype),
            in_features=optional(whole_number, "--in-features", self.in_features),
            out_features=optional(whole_number, "--out-features", self.out_features),
            key_map=key_maps(self.key_map),
            places=_places(self.places),
        )


def _places(value: object) -> tuple[tuple[str, str], ...]:
    """Return the names that configs have for bases, each with the place of the base."""
    if isinstance(value, Mapping):
        value = tuple(value.items())
    if isinstance(value, Sequence) and all(isinstance(each, tuple | list) for each in value):
        pairs = [tuple(each) for each in value]
        if all(len(pair) == 2 for pair in pairs):
            return tuple((text("--base-for", a), place("--base-for", b)) for a, b in pairs)
    raise UsageError("--base-for: give NAME=MODEL, or a mapping of names to models.")


def key_maps(value: object) -> tuple[tuple[str, str], ...]:
    """Return the renames of a key map: pairs (OLD, NEW), or texts ``OLD=NEW``.

    Raises:
        UsageError: one is neither.
    """
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, Mapping):
        value = tuple(value.items())
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise UsageError("--key-map: give a list of OLD=NEW.")
    return tuple(parse_key_map(_written(each)) for each in value)


def _written(rename: object) -> str:
    """Return a rename as ``OLD=NEW``."""
    if isinstance(rename, tuple | list):
        old, new = map(partial(text, "--key-map"), rename) if len(rename) == 2 else ("", "")
        return f"{old}={new}"
    return text("--key-map", rename)


def parse_key_map(written: str) -> tuple[str, str]:
    """Split ``OLD=NEW``; either side may be empty, and is else a path of names and dots.

    Raises:
        UsageError: anything else.
    """
    old, equals, new = written.partition("=")
    if not equals or not (old or new) or not (_PATH.fullmatch(old) and _PATH.fullmatch(new)):
        raise UsageError(
            f"--key-map {printable(written)}: expected OLD=NEW, such as "
            "model.layers=model.language_model.layers."
        )
    return old, new


def base_options_of(base: BaseOptions | str | Path | None) -> BaseOptions:
    """Return what a caller says of the base as a record; a text or a path is the model."""
    return (
        base
        if isinstance(base, BaseOptions)
        else BaseOptions(model=optional(place, "--base", base))
    )


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """What is known of the base that decides A and B; None is "not known".

    Attributes:
        in_features: columns of A.
        out_features: rows of B.
        rounding: what the base's dtype does to drawn values.
        roundings: where `rounding` is not known, those that are possible; empty if all are.
        source: where that is known from, or why it is not, for people.
        location: where the base lies.
        base: the base's tensors, where its headers were read.
        match: the tensor of each adapted layer there.
        layers: the size of each adapted layer, by the adapter's module path; empty if the base's
            layers were not read.
        modules: every module with a weight, as the adapter's model names it; empty likewise.
        findings: warnings about the base.
    """

    in_features: int | None = None
    out_features: int | None = None
    rounding: Rounding | None = None
    roundings: tuple[Rounding, ...] = ()
    source: str = ""
    location: Location | None = None
    base: BaseModel | None = None
    match: Match | None = None
    layers: Mapping[str, Linear] = field(default_factory=dict)
    modules: frozenset[str] = frozenset()
    findings: tuple[Finding, ...] = ()

    def fits(self, in_features: int, out_features: int) -> bool:
        """Say whether dims agree with those of the base, as far as they are known."""
        return self.in_features in (None, in_features) and self.out_features in (
            None,
            out_features,
        )

    @property
    def dims_text(self) -> str:
        """The dims in words."""
        return f"{self.source} has {self.in_features} inputs and {self.out_features} outputs"

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that were read, which no output may touch."""
        folder = self.location.folder if self.location else None
        return (folder,) if folder else ()


def loaded_in(known: BaseFacts, dtype: str) -> BaseFacts:
    """Return what is known of a base that is loaded in this dtype, whatever its headers say.

    Args:
        known: what its headers say.
        dtype: as torch or as safetensors names it.
    """
    settled = tuple(f for f in known.findings if f.rule is not ROUNDING_UNCLEAR)
    return replace(known, rounding=rounding_on_base(dtype), roundings=(), findings=settled)
