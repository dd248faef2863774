"""Return the codes with which a call refuses a file."""

from __future__ import annotations

from collections.abc import Callable

from vera_convert.errors import CheckpointError


def codes(call: Callable[[], object]) -> list[str]:
    """Return the codes of a refusal; an empty list if the call succeeds."""
    try:
        call()
    except CheckpointError as error:
        return [finding.code for finding in error.findings]
    return []
