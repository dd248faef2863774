"""Write the model card of a merged model: base, adapters and replaced tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vera_convert._version import __version__
from vera_convert.hub.lookup import Location
from vera_convert.hub.repo_name import is_repo_id
from vera_convert.merging.report import ReplacedTensor
from vera_convert.text import printable


def model_card(
    base: Location,
    adapters: Sequence[tuple[Location, float]],
    *,
    library: str,
    trained_on: str | None = None,
    replaced: Sequence[ReplacedTensor] = (),
) -> str:
    """Return the text of the card, without any path of this machine.

    Args:
        base: where the base lies.
        adapters: where each adapter lies, and the factor of the adapter's deltas.
        library: the Hub's name of the library that loads the result.
        trained_on: the base that the first adapter's config names; used if the given base is a
            folder.
        replaced: the tensors that come from an adapter.
    """
    is_known = trained_on is not None and is_repo_id(trained_on)
    base_model = base.repo_id or (trained_on if is_known else None)
    fields = [
        *([f"base_model: {_quoted(base_model)}"] if base_model else []),
        *(["base_model_relation: finetune"] if base_model else []),
        f"library_name: {library}",
        "tags:",
        "- vera",
        "- merged",
    ]
    rows = [_row("Base", base, "")]
    rows += [_row("Adapter", location, repr(weight)) for location, weight in adapters]
    several = "adapters" if len(adapters) > 1 else "adapter"
    return "\n".join(
        [
            "---",
            *fields,
            "---",
            "",
            "# Merged model",
            "",
            f"The weights of the base plus those of the VeRA {several}, each sum rounded once to",
            f"the type of its tensor. Made by vera-convert {__version__}; `merge-provenance.json`",
            "beside this card names every input, option and change.",
            "",
            "| | name | revision | weight |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            *(_replaced(replaced, several) if replaced else ()),
        ]
    )


def _replaced(tensors: Sequence[ReplacedTensor], several: str) -> list[str]:
    """Return the lines that name the replaced tensors."""
    return [
        f"These tensors are not sums; they are the {several}'s own:",
        "",
        "| tensor | change |",
        "| --- | --- |",
        *(f"| {_code(each.name)} | {each.change} |" for each in tensors),
        "",
    ]


def _row(kind: str, location: Location, weight: str) -> str:
    return f"| {kind} | {_code(location.name)} | {_code(location.commit or '')} | {weight} |"


def _quoted(text: str) -> str:
    """Return text as a value of YAML; a text of JSON is valid YAML."""
    return json.dumps(printable(text))


def _code(text: str) -> str:
    """Return text as Markdown code that cannot end early or split a table cell."""
    shown = printable(text).replace("`", "'").replace("|", "\\|")
    return f"`{shown}`" if shown else ""
