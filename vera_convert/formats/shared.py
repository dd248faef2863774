"""The parts that several texts share: aligned columns, and the origin of A and B."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(rows: Iterable[Sequence[str]]) -> str:
    """Align cells in columns, two spaces apart; the last cell of a row may be of any length."""
    rows = list(rows)
    widths: dict[int, int] = {}
    for row in rows:
        for column, cell in enumerate(row[:-1]):
            widths[column] = max(widths.get(column, 0), len(cell))
    lines = []
    for row in rows:
        padded = [cell.ljust(widths.get(column, 0)) for column, cell in enumerate(row)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


Row = tuple[str, str | Iterable[str] | None]
"""A label, and the value or the values that stand behind the label."""


def labelled(*rows: Row) -> str:
    """Align labels and values; values of one label stand below each other.

    A row whose value is None or empty is left out.
    """
    cells = []
    for label, values in rows:
        listed = [values] if isinstance(values, str) else values or ()
        cells += [("" if index else label, each) for index, each in enumerate(listed) if each]
    return table(cells)


def origin_text(origin: str) -> str:
    """Where the A and B in effect come from, in words."""
    return {
        "file": "stored",
        "fingerprint": "regenerated from the key, proven by the fingerprint",
        "key": "regenerated from the key",
    }[origin]
