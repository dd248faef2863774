"""Options: how an option is declared, and the groups of options that several commands share.

A class attribute declares an option: its type, flags, default and help. `parameters` makes click's
parameters from the attributes; a command receives the class with the values that a user gave. The
options of a single command stand beside the command.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from vera_convert.cli.values import GENERATORS, KEY_MAP, Choice, Dtype
from vera_convert.dtypes import BASE_NAMES, FLOAT_NAMES

if TYPE_CHECKING:
    from vera_convert.base.facts import BaseOptions
    from vera_convert.hub.lookup import HubAccess

INPUT = "Input options"
PROJECTIONS = "Projection options"
METHOD = "Merge options"
LORA = "LoRA options"
CHECK = "Check options"
OUTPUT = "Output options"
HUB = "Hub options"
DISPLAY = "Display options"
TITLES = (INPUT, PROJECTIONS, METHOD, LORA, CHECK, OUTPUT, HUB, DISPLAY)
"""The groups of options, in the order in which a help lists the groups."""

PATH = click.Path(path_type=Path)
SOURCES = Choice(("auto", "file", "key"))


class Declared(NamedTuple):
    """An option as a class declares the option: see `option`."""

    group: str
    flags: tuple[str, ...]
    attributes: dict[str, Any]


class Option(click.Option):
    """An option that a help lists in a group."""

    group = ""


class Options:
    """The options of a command, or of a group of commands, with the values that a user gave."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def shared_with(self, record: type[Any]) -> dict[str, Any]:
        """Return the values that a user gave for the fields of a dataclass, by the field's name."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if name in record.__dataclass_fields__ and value is not None
        }


def listed_choices(choices: Iterable[str]) -> str:
    """Return the choices for a help text; the first is the default."""
    first, *others = choices
    return ", ".join((f"{first} (default)", *others))


def option(group: str, *flags: str, **attributes: Any) -> Any:
    """Declare an option as an attribute of a class.

    Args:
        group: the group in which a help lists the option.
        flags: the option's names, such as ``--json``.
        attributes: the arguments of `click.Option`, such as ``help``.
    """
    if not attributes.get("required") and not attributes.get("multiple"):
        attributes.setdefault("default", None)
    return Declared(group, flags, attributes)


def flag(group: str, *flags: str, **attributes: Any) -> Any:
    """Declare an option that takes no value, and is False when a user leaves the option out."""
    return option(group, *flags, default=False, is_flag=True, **attributes)


def parameters(options: type[Options]) -> list[click.Parameter]:
    """Return an option of click for each option that a class declares, sorted by group."""
    declared = {
        name: each
        for kind in reversed(options.__mro__)
        for name, each in vars(kind).items()
        if isinstance(each, Declared)
    }
    made: list[click.Parameter] = []
    for name, each in sorted(declared.items(), key=lambda item: TITLES.index(item[1].group)):
        made.append(parameter := Option([name, *each.flags], **each.attributes))
        parameter.group = each.group
    return made


# --- groups that several commands share ----------------------------------------------------------


class CommonOptions(Options):
    """How to reach the Hub, and what to show: options of every command."""

    revision: str | None = option(
        HUB, "--revision", metavar="REV", help="Branch, tag or commit of the adapter's repo."
    )
    token: str | None = option(
        HUB, "--token", metavar="TOKEN", help="Access token for the Hub (default: HF_TOKEN)."
    )
    cache_dir: str | None = option(
        HUB, "--cache-dir", metavar="DIR", help="Cache folder of the Hub (default: HF_HOME)."
    )
    offline: bool = flag(
        HUB,
        "--offline",
        help="Read repos from the cache alone; open no connection.",
    )
    as_json: bool = flag(
        DISPLAY,
        "--json",
        help="Print one JSON document, nothing else.",
    )
    quiet: bool = flag(
        DISPLAY,
        "-q",
        "--quiet",
        help="Print warnings and errors only.",
    )
    verbose: bool = flag(
        DISPLAY,
        "-v",
        "--verbose",
        help="Tell on stderr which requests are sent and which files are written.",
    )
    progress: bool | None = option(
        DISPLAY, "--progress/--no-progress", help="Show progress (default: only on a terminal)."
    )
    debug: bool = flag(
        DISPLAY,
        "--debug",
        help="Show a Python traceback when the command fails.",
    )

    def access(self) -> HubAccess:
        """Return how the library reaches the Hub."""
        from vera_convert.hub.lookup import HubAccess

        return HubAccess(
            token=self.token,
            cache_dir=Path(self.cache_dir) if self.cache_dir else None,
            offline=self.offline,
            progress=self.progress is not False and not self.quiet,
        )


class BaseChoice(Options):
    """The base model of an adapter."""

    base: str | None = option(
        INPUT,
        "--base",
        metavar="MODEL",
        help="The base model, a folder or a repo on the Hub (default: the one that the adapter's "
        "config names).",
    )
    base_revision: str | None = option(
        INPUT, "--base-revision", metavar="REV", help="Branch, tag or commit of the base's repo."
    )
    base_dtype: str | None = option(
        INPUT,
        "--base-dtype",
        type=Dtype(BASE_NAMES),
        metavar="DTYPE",
        help=f"Dtype that the base is loaded in, which decides how A and B are rounded: "
        f"{', '.join(BASE_NAMES)}.",
    )
    key_map: tuple[tuple[str, str], ...] = option(
        INPUT,
        "--key-map",
        type=KEY_MAP,
        metavar="OLD=NEW",
        multiple=True,
        help="Replace the path OLD at the start of the adapter's module names by NEW.",
    )

    def base_options(self) -> BaseOptions:
        """Return the library's record of the base."""
        from vera_convert.base.facts import BaseOptions

        return BaseOptions(
            model=self.base,
            revision=self.base_revision,
            dtype=self.base_dtype,
            key_map=self.key_map,
        )


class DimsChoice(Options):
    """The sizes of A and B, if no base is at hand."""

    in_features: int | None = option(
        PROJECTIONS,
        "--in-features",
        type=click.IntRange(min=1),
        metavar="N",
        help="Columns of A, if no base is given.",
    )
    out_features: int | None = option(
        PROJECTIONS,
        "--out-features",
        type=click.IntRange(min=1),
        metavar="N",
        help="Rows of B, if no base is given.",
    )


class ProjectionChoice(Options):
    """The A and B that an adapter's user means."""

    projections: str = option(
        PROJECTIONS,
        "--projections",
        default="auto",
        type=SOURCES,
        metavar="SOURCE",
        help="Which A and B to use: auto, the choice of PEFT 0.21 (default); file, the stored "
        "matrices; key, the matrices regenerated from the key.",
    )


class GeneratorChoice(Options):
    """The algorithm that drew A and B."""

    generator: str | None = option(
        PROJECTIONS,
        "--generator",
        type=Choice(GENERATORS),
        metavar="VARIANT",
        help="How PyTorch drew A and B, if nothing in the adapter tells. VARIANT is one of "
        f"{listed_choices(GENERATORS)}.",
    )


class ForceChoice(Options):
    """Whether an output may replace an earlier output."""

    force: bool = flag(
        OUTPUT,
        "--force",
        help="Replace OUT, if OUT is an output of the same kind.",
    )


class AcceptChoice(Options):
    """Whether to strip matrices that PEFT would regenerate differently."""

    accept_change: bool = flag(
        PROJECTIONS,
        "--accept-change",
        help="Strip even if PEFT would regenerate different matrices, provided that embed can "
        "restore the stored ones.",
    )


class MergeChoice(Options):
    """How a merge is computed; `verify` takes an option left out from the merge's record."""

    weight: float | None = option(
        METHOD,
        "--weight",
        type=float,
        metavar="W",
        help="Scale the adapter's delta by this factor (default: 1).",
    )
    add: tuple[str, ...] = option(
        METHOD,
        "--add",
        metavar="ADAPTER[=W]",
        multiple=True,
        help="Add the delta of another adapter, scaled by W (default: 1).",
    )
    tied: str | None = option(
        METHOD,
        "--tied",
        type=Choice(("add", "untie")),
        help="How to merge into an output head tied to the embedding: add changes the embedding "
        "too, as PEFT's merge does; untie gives the head a tensor of its own.",
    )
    dequantize: bool | None = option(
        METHOD,
        "--dequantize",
        is_flag=True,
        help="Turn a quantized base into a 16-bit model.",
    )
    dtype: str | None = option(
        METHOD,
        "--dtype",
        type=Dtype(FLOAT_NAMES),
        metavar="DTYPE",
        help="Write float tensors in this dtype (default: keep the dtype of each tensor).",
    )
    jobs: int | None = option(
        METHOD,
        "--jobs",
        type=int,
        metavar="N",
        help="Number of threads (default: one for each core, at most four).",
    )
