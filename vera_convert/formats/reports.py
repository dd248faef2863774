"""The formats of a validation's report: one table, which also gives the choices of `--format`.

Each renderer is loaded late, to keep `--help` fast.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vera_convert.validation.result import Validation

RENDERERS = {
    "text": "validation.validation_text",
    "json": "reports.json_text",
    "sarif": "sarif.sarif_text",
    "junit": "junit.junit_text",
    "github": "github.github_text",
}
"""The module and the function in `formats` that render each format."""


def report_text(result: Validation, form: str) -> str:
    """Return the report of a validation.

    Args:
        result: the validation.
        form: a key of `RENDERERS`.
    """
    module, _, name = RENDERERS[form].partition(".")
    render: Callable[[Validation], str] = getattr(
        import_module(f"vera_convert.formats.{module}"), name
    )
    return render(result)


def json_text(result: Validation) -> str:
    """Return the report as a JSON document (schema ``validation``)."""
    from vera_convert.formats.document import result_document

    return json.dumps(result_document(result), indent=2)
