"""The codes with which a call refuses a file."""

from __future__ import annotations

from collections.abc import Callable

from vera_convert.errors import CheckpointError


def codes(call: Callable[[], object]) -> list[str]:
    """The codes that a call refuses with; empty if it does not."""
    try:
        call()
    except CheckpointError as error:
        return [finding.code for finding in error.findings]
    return []
