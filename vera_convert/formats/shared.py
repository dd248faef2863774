"""The parts of all texts and documents: findings, errors, draws, aligned columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vera_convert.errors import VeraConvertError
from vera_convert.formats.document import Document, document


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


def origin_text(origin: str) -> str:
    """Where the A and B in effect come from, in words."""
    return {
        "file": "stored",
        "fingerprint": "regenerated from the key, proven by the fingerprint",
        "key": "regenerated from the key",
    }[origin]


def error_document(error: VeraConvertError) -> Document:
    """Return the reason why a command failed, with every finding (schema ``error``)."""
    return document("error", error)
