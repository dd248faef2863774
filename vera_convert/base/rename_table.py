"""Read the tables of renamed layers: families by hand, and whole models generated from classes.

``renames.toml`` has the families, and says how a family is written. ``conversions.txt`` has the
tables of whole models. The two files hold plain renames only; `unsupported_layouts` has the cut,
joined or reordered tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from vera_convert.tables import table

CONVERSIONS_FILE = Path(__file__).with_name("conversions.txt")


class Family(NamedTuple):
    """Model types whose layers were renamed together.

    Attributes:
        name: how output and messages call the family.
        since: the first release of transformers with the names in memory.
        types: the ``model_type`` of the config, or of a part of the config.
        also: types with the same names in parts, if the config omits the part's type.
        renames: parts of a path in the files and in memory, applied in order.
        tolerated: further forms in files; a layer is never renamed to a further form.
        optional: whether some classes of `types` keep the names of the files.
    """

    name: str
    since: str
    types: frozenset[str]
    also: frozenset[str]
    renames: tuple[tuple[str, str], ...]
    tolerated: tuple[tuple[str, str], ...]
    optional: bool


@cache
def families() -> tuple[Family, ...]:
    """Return every family, families of whole models before families of parts."""
    return tuple(
        Family(
            name=entry["name"],
            since=entry["since"],
            types=frozenset(entry["types"].split()),
            also=frozenset(entry.get("also", "").split()),
            renames=_pairs(entry["renames"]),
            tolerated=_pairs(entry.get("tolerated", "")),
            optional=entry.get("optional", False),
        )
        for entry in table(__file__, "renames.toml")["family"]
    )


def _pairs(table: str) -> tuple[tuple[str, str], ...]:
    pairs = (line.split() for line in table.splitlines() if line)
    return tuple((files, memory) for files, memory in pairs)


@cache
def conversions() -> Mapping[str, Sequence[Mapping[str, str]]]:
    """Return for each model type a table for each class: path in memory by path in the files."""
    found: dict[str, list[dict[str, str]]] = {}
    kind = ""
    for line in CONVERSIONS_FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            files, memory = line.split()
            found[kind][-1][files] = memory
        elif not line.startswith("# "):
            kind = line
            found.setdefault(kind, []).append({})
    return found
