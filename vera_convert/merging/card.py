"""Write the model card of a merged model: base, adapters and replaced tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from vera_convert._version import __version__
from vera_convert.text import printable


@dataclass(frozen=True, slots=True)
class ModelSource:
    """One input as a model card names it, without any path of this machine.

    Attributes:
        name: the repo on the Hub, or the name of a folder.
        commit: the commit of the repo; empty for a folder.
        is_repo: whether the name is that of a repo.
        weight: the factor of an adapter's deltas; None for a base.
    """

    name: str
    commit: str = ""
    is_repo: bool = False
    weight: float | None = None


def model_card(
    base: ModelSource,
    adapters: Sequence[ModelSource],
    *,
    library: str,
    trained_on: str | None = None,
    replaced: Sequence[tuple[str, str]] = (),
) -> str:
    """Return the text of the card.

    Args:
        base: the base.
        adapters: the adapters in the order of the merge.
        library: the Hub's name of the library that loads the result.
        trained_on: the base that the first adapter's config names; used if the given base is a
            folder.
        replaced: each tensor that an adapter replaces, and the size of the change.
    """
    base_model = base.name if base.is_repo else trained_on
    fields = [
        *([f"base_model: {_quoted(base_model)}"] if base_model else []),
        *(["base_model_relation: finetune"] if base_model else []),
        f"library_name: {library}",
        "tags:",
        "- vera",
        "- merged",
    ]
    rows = [_row("Base", base), *(_row("Adapter", adapter) for adapter in adapters)]
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


def _replaced(tensors: Sequence[tuple[str, str]], several: str) -> list[str]:
    """Return the lines that name the replaced tensors."""
    return [
        f"These tensors are not sums; they are the {several}'s own:",
        "",
        "| tensor | change |",
        "| --- | --- |",
        *(f"| {_code(name)} | {change} |" for name, change in tensors),
        "",
    ]


def _row(kind: str, origin: ModelSource) -> str:
    weight = "" if origin.weight is None else repr(origin.weight)
    return f"| {kind} | {_code(origin.name)} | {_code(origin.commit)} | {weight} |"


def _quoted(text: str) -> str:
    """Return text as a value of YAML; a text of JSON is valid YAML."""
    return json.dumps(printable(text))


def _code(text: str) -> str:
    """Return text as Markdown code that cannot end early or split a table cell."""
    shown = printable(text).replace("`", "'").replace("|", "\\|")
    return f"`{shown}`" if shown else ""
