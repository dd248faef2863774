"""The caller's options for a base, and the facts of a base for A and B.

The module has the records alone and loads fast; `resolve` fills the facts in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vera_convert import rules
from vera_convert.arguments import base_dtype_name, optional, place, set_checked, text, whole_number
from vera_convert.draws.generator import Rounding, rounding_on_base
from vera_convert.errors import ParameterError
from vera_convert.rules import Finding
from vera_convert.text import printable

if TYPE_CHECKING:
    from vera_convert.base.match import Match
    from vera_convert.base.model import BaseModel
    from vera_convert.hub.lookup import Location
    from vera_convert.targets.linear import Linear

BASE_REMEDY = "Pass the base with --base."
"""The remedy of every message about a base that was not found or not named."""

_WITH_SIZES = "`vera-convert embed` with --in-features, --out-features and --base-dtype."
_PATH = re.compile(r"([^.=\s]+(\.[^.=\s]+)*)?")
"""A path of a module, or the empty text."""


@dataclass(frozen=True, slots=True)
class BaseOptions:
    """The caller's options for the base; each option is optional.

    Attributes:
        model: a folder or a repo on the Hub.
        revision: branch, tag or commit of the repo; None for the revision of the adapter's config.
        dtype: the dtype of the loaded base, for example ``bfloat16``.
        in_features: columns of A, in place of a base.
        out_features: rows of B, in place of a base.
        key_map: pairs (OLD, NEW) for renaming leading paths of the adapter's modules.
        places: pairs (NAME, MODEL), or a mapping: the base MODEL for configs with the name NAME.

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
            model=optional(place, "model", self.model),
            revision=optional(text, "revision", self.revision),
            dtype=optional(base_dtype_name, "dtype", self.dtype),
            in_features=optional(whole_number, "in_features", self.in_features),
            out_features=optional(whole_number, "out_features", self.out_features),
            key_map=key_maps(self.key_map),
            places=_places(self.places),
        )


def _places(value: object) -> tuple[tuple[str, str], ...]:
    """Return pairs of a base's name in configs and the base's folder or repo."""
    if isinstance(value, Mapping):
        value = tuple(value.items())
    if isinstance(value, Sequence) and all(isinstance(each, tuple | list) for each in value):
        pairs = [tuple(each) for each in value]
        if all(len(pair) == 2 for pair in pairs):
            return tuple((text("places", a), place("places", b)) for a, b in pairs)
    raise ParameterError("places", "is no mapping of names to models: give {NAME: MODEL}.")


def key_maps(value: object) -> tuple[tuple[str, str], ...]:
    """Return the renames of a key map: pairs (OLD, NEW), or texts ``OLD=NEW``.

    Raises:
        UsageError: an item has another type than pair or text.
    """
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, Mapping):
        value = tuple(value.items())
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise ParameterError("key_map", "is no list: give a list of OLD=NEW.")
    return tuple(parse_key_map("key_map", _written(each)) for each in value)


def _written(rename: object) -> str:
    """Return a rename as ``OLD=NEW``."""
    if isinstance(rename, tuple | list):
        if len(rename) != 2 or not all(isinstance(side, str) for side in rename):
            raise ParameterError("key_map", "has a pair without two texts: give (OLD, NEW).")
        return "=".join(rename)
    return text("key_map", rename)


def parse_key_map(name: str, written: str) -> tuple[str, str]:
    """Split ``OLD=NEW``; each side is a path of names and dots, and one side may be empty.

    Raises:
        UsageError: the text has another form.
    """
    old, equals, new = written.partition("=")
    if not equals or not (old or new) or not (_PATH.fullmatch(old) and _PATH.fullmatch(new)):
        raise ParameterError(
            name,
            f'is "{printable(written)}": give OLD=NEW, such as '
            "model.layers=model.language_model.layers.",
        )
    return old, new


def base_options_of(base: BaseOptions | str | Path | None) -> BaseOptions:
    """Return the caller's options as a record; a text or a path becomes the model."""
    return (
        base if isinstance(base, BaseOptions) else BaseOptions(model=optional(place, "base", base))
    )


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """The facts of a base for A and B; None means "unknown".

    Attributes:
        in_features: columns of A.
        out_features: rows of B.
        rounding: the rounding of drawn values to the base's dtype.
        roundings: the possible roundings if `rounding` is None; empty if all are possible.
        unclear: why the base leaves the rounding open; empty for a decided rounding or an unknown
            base.
        source: the source of the facts, or the reason why facts are missing, for people.
        remedy: how to pass a base that gives the missing facts.
        location: where the base lies.
        base: the base's headers, if read.
        match: the base's tensor for each adapted layer, if the headers were read.
        layers: the size of each adapted layer, by the adapter's module path; empty if the base's
            layers are unread.
        modules: every module with a weight, by the names of the adapter's model; empty likewise.
        findings: warnings about the base.
    """

    in_features: int | None = None
    out_features: int | None = None
    rounding: Rounding | None = None
    roundings: tuple[Rounding, ...] = ()
    unclear: str = ""
    source: str = ""
    remedy: str = BASE_REMEDY
    location: Location | None = None
    base: BaseModel | None = None
    match: Match | None = None
    layers: Mapping[str, Linear] = field(default_factory=dict)
    modules: frozenset[str] = frozenset()
    findings: tuple[Finding, ...] = ()

    def fits(self, in_features: int, out_features: int) -> bool:
        """Say whether dims agree with the known dims of the base."""
        return self.in_features in (None, in_features) and self.out_features in (None, out_features)

    @property
    def dims_text(self) -> str:
        """The dims in words."""
        if self.location is None:
            return f"{self.in_features} inputs and {self.out_features} outputs are needed"
        return f"{self.source} has {self.in_features} inputs and {self.out_features} outputs"

    @property
    def size_remedy(self) -> str:
        """How to get A and B, if the dims are missing."""
        return f"{self.remedy} Or run {_WITH_SIZES}"

    @property
    def idle_options(self) -> tuple[Finding, ...]:
        """The warnings about options that have no effect, also for an unused base."""
        return tuple(f for f in self.findings if f.rule is rules.OPTION_WITHOUT_EFFECT)

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders of the base; outputs must stay outside."""
        folder = self.location.folder if self.location else None
        return (folder,) if folder else ()


def loaded_in(facts: BaseFacts, dtype: str) -> BaseFacts:
    """Return the facts of a base loaded in `dtype` instead of the dtypes of the headers.

    Args:
        facts: the facts from the headers.
        dtype: the name of torch or of safetensors.
    """
    settled = tuple(f for f in facts.findings if f.rule is not rules.ROUNDING_UNCLEAR)
    rounding = rounding_on_base(dtype)
    return replace(facts, rounding=rounding, roundings=(), unclear="", findings=settled)
