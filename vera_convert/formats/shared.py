"""The parts of all texts and documents: findings, errors, draws, aligned columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vera_convert.draws.generator import Draw
from vera_convert.errors import CheckpointError, VeraConvertError
from vera_convert.rules import Finding
from vera_convert.text import printable

Document = dict[str, object]


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


def finding_document(finding: Finding) -> Document:
    """Return a finding as data."""
    named = {"file": finding.file, "tensor": finding.tensor and printable(finding.tensor)}
    return {
        "code": finding.code,
        "severity": str(finding.severity),
        "place": finding.place,
        **{key: name for key, name in named.items() if name is not None},
        "reason": finding.reason,
        "remedy": finding.rule.remedy,
    }


def error_document(error: VeraConvertError) -> Document:
    """Why a command failed, with every finding (schema ``error``)."""
    findings = error.findings if isinstance(error, CheckpointError) else ()
    return {
        "format": 1,
        "error": str(error),
        "status": error.status,
        "findings": [finding_document(finding) for finding in findings],
    }


def draw_document(draw: Draw | None) -> Document | None:
    """Return a draw as data."""
    if draw is None:
        return None
    return {
        "variant": str(draw.variant),
        "key": draw.key,
        "rank": draw.rank,
        "in_features": draw.in_features,
        "out_features": draw.out_features,
        "rounding": str(draw.rounding),
    }
