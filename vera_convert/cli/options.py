"""Every option of every command: a dataclass for each group, and for each command.

A field declares an option: its type, flags, default, and help. `parameters` makes click's
parameters from the fields; a command receives the dataclass with the values that a user gave.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from vera_convert.cli.values import (
    CODES,
    ENGINES,
    GENERATORS,
    KEY_MAP,
    NAMED_BASE,
    NAMES,
    PEFT_VERSION,
    SHORT_DTYPES,
    SIZE,
    WEIGHTED_ADAPTER,
    Choice,
    Dtype,
)
from vera_convert.dtypes import BASE_NAMES, FLOAT_NAMES
from vera_convert.formats.reports import RENDERERS

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
TIED = Choice(("add", "untie"))
ADD_OR_UNTIE = (
    "How to merge into an output head tied to the embedding: add changes the embedding too, "
    "as PEFT does; untie gives the head a tensor of its own."
)
JOBS = "Number of threads (default: one for each core, at most four)."


def _listed(choices: Iterable[str]) -> str:
    """Return the choices for a help text; the first is the default."""
    first, *others = choices
    return ", ".join((f"{first} (default)", *others))


def option(group: str, *flags: str, default: Any = None, **attributes: Any) -> Any:
    """Declare an option as a field of a dataclass.

    Args:
        group: the group in which a help lists the option.
        flags: the option's names, such as ``--json``.
        default: the value when a user leaves the option out.
        attributes: what `click.Option` takes, such as ``help``.
    """
    if attributes.get("multiple"):
        default = ()
    return field(default=default, metadata={"group": group, "flags": flags, **attributes})


def flag(group: str, *flags: str, **attributes: Any) -> Any:
    """Declare an option that takes no value, and is False when a user leaves the option out."""
    return option(group, *flags, default=False, is_flag=True, **attributes)


def parameters(options: type[object]) -> list[click.Parameter]:
    """Return an option of click for each field of a dataclass, sorted by group."""
    groups = {title: cloup.OptionGroup(title) for title in TITLES}
    made: list[click.Parameter] = []
    declared = sorted(
        fields(options),  # type: ignore[arg-type] # a dataclass
        key=lambda each: TITLES.index(each.metadata["group"]),
    )
    for each in declared:
        attributes = dict(each.metadata)
        group, flags = attributes.pop("group"), attributes.pop("flags")
        if not attributes.get("required"):
            attributes["default"] = each.default
        made.append(cloup.Option([each.name, *flags], group=groups[group], **attributes))
    return made


# --- groups that several commands share ----------------------------------------------------------


@dataclass(frozen=True)
class CommonOptions:
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


@dataclass(frozen=True)
class BaseChoice:
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


@dataclass(frozen=True)
class DimsChoice:
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


@dataclass(frozen=True)
class ProjectionChoice:
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


@dataclass(frozen=True)
class GeneratorChoice:
    """The algorithm that drew A and B."""

    generator: str | None = option(
        PROJECTIONS,
        "--generator",
        type=Choice(GENERATORS),
        metavar="VARIANT",
        help="How PyTorch drew A and B, if nothing in the adapter tells. VARIANT is one of "
        f"{_listed(GENERATORS)}.",
    )


@dataclass(frozen=True)
class ForceChoice:
    """Whether an output may replace an earlier output."""

    force: bool = flag(
        OUTPUT,
        "--force",
        help="Replace OUT, if OUT is an output of the same kind.",
    )


@dataclass(frozen=True)
class AcceptChoice:
    """Whether to strip matrices that PEFT would regenerate differently."""

    accept_change: bool = flag(
        PROJECTIONS,
        "--accept-change",
        help="Strip even if PEFT would regenerate different matrices, provided that embed can "
        "restore the stored ones.",
    )


# --- commands ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InfoOptions(BaseChoice, ProjectionChoice, CommonOptions):
    """Options of `info`."""


@dataclass(frozen=True)
class CountOptions(CommonOptions):
    """Options of `count`."""

    config_file: Path | None = option(
        INPUT, "--config", type=PATH, metavar="FILE", help="The config.json of a model."
    )
    base: str | None = option(
        INPUT, "--base", metavar="MODEL", help="A model, a folder or a repo on the Hub."
    )
    base_revision: str | None = option(
        INPUT, "--base-revision", metavar="REV", help="Branch, tag or commit of the model's repo."
    )
    rank: int = option(
        INPUT, "--rank", type=int, metavar="R", required=True, help="The rank of the adapter."
    )
    targets: tuple[tuple[str, ...], ...] = option(
        INPUT,
        "--target",
        type=NAMES,
        metavar="NAME[,NAME]",
        multiple=True,
        help="Layers to adapt, as in target_modules, or all-linear (default: PEFT's default "
        "targets for the model).",
    )


@dataclass(frozen=True)
class ValidateOptions(BaseChoice, CommonOptions):
    """Options of `validate`."""

    recursive: bool = flag(
        INPUT,
        "--recursive",
        help="Check every adapter in the folders given and in their subfolders.",
    )
    deep: bool = flag(
        CHECK,
        "--deep",
        help="Download the weights of repos too, and regenerate A and B.",
    )
    select: tuple[tuple[str, ...], ...] = option(
        CHECK,
        "--select",
        type=CODES,
        metavar="CODE[,CODE]",
        multiple=True,
        help="Report these codes only; V2 stands for all codes that begin with V2.",
    )
    ignore: tuple[tuple[str, ...], ...] = option(
        CHECK,
        "--ignore",
        type=CODES,
        metavar="CODE[,CODE]",
        multiple=True,
        help="Do not report these codes, in addition to the codes that pyproject.toml ignores.",
    )
    fail_on: str | None = option(
        CHECK,
        "--fail-on",
        type=Choice(("error", "warning")),
        help="The least severity that makes the exit status 1 (default: error).",
    )
    rules: bool = flag(CHECK, "--rules", help="List every rule, and check nothing.")
    explain: tuple[str, ...] | None = option(
        CHECK,
        "--explain",
        type=CODES,
        metavar="CODE",
        help="Explain a rule, and check nothing.",
    )
    form: str | None = option(
        OUTPUT,
        "--format",
        type=Choice((*RENDERERS,)),
        metavar="FORMAT",
        help=f"Format of the report: {_listed(RENDERERS)}.",
    )
    output: Path | None = option(
        OUTPUT,
        "--output",
        type=PATH,
        metavar="FILE",
        help="Write the report to FILE, and print the text for people.",
    )


@dataclass(frozen=True)
class StripOptions(BaseChoice, ProjectionChoice, AcceptChoice, ForceChoice, CommonOptions):
    """Options of `strip`."""


@dataclass(frozen=True)
class EmbedOptions(
    BaseChoice, DimsChoice, GeneratorChoice, ProjectionChoice, ForceChoice, CommonOptions
):
    """Options of `embed`."""


@dataclass(frozen=True)
class RegenerateOptions(BaseChoice, DimsChoice, GeneratorChoice, ForceChoice, CommonOptions):
    """Options of `regenerate`."""

    adapter: str | None = option(
        INPUT, "--for", metavar="ADAPTER", help="Regenerate A and B of this adapter."
    )
    rank: int | None = option(
        PROJECTIONS, "--rank", type=int, metavar="R", help="Rows of A and columns of B."
    )
    key: int | None = option(
        PROJECTIONS,
        "--key",
        type=int,
        metavar="N",
        help="The seed, projection_prng_key (default: 0).",
    )
    rounding: str | None = option(
        PROJECTIONS,
        "--round",
        type=Dtype((*SHORT_DTYPES.values(),)),
        help="Round A and B as a base of this dtype does.",
    )


@dataclass(frozen=True)
class MigrateOptions(BaseChoice, ProjectionChoice, AcceptChoice, ForceChoice, CommonOptions):
    """Options of `migrate`."""

    to: str = option(
        OUTPUT,
        "--to",
        type=Choice(("embedded", "stripped", "asis")),
        metavar="FORM",
        required=True,
        help="The form of OUT: embedded, with A and B; stripped, without; asis, the form of "
        "ADAPTER.",
    )
    recursive: bool = flag(
        INPUT,
        "--recursive",
        help="Migrate every adapter in the folder ADAPTER into the same subfolder of OUT.",
    )
    base_for: tuple[tuple[str, str], ...] = option(
        INPUT,
        "--base-for",
        type=NAMED_BASE,
        metavar="NAME=MODEL",
        multiple=True,
        help="Use MODEL for the adapters whose config calls their base NAME.",
    )
    peft_version: tuple[int, ...] | None = option(
        OUTPUT,
        "--peft-version",
        type=PEFT_VERSION,
        metavar="VERSION",
        help="Write a config that this version of PEFT can read, such as 0.13.",
    )


@dataclass(frozen=True)
class MergeChoices(BaseChoice, GeneratorChoice, ProjectionChoice, ForceChoice, CommonOptions):
    """Options of `merge`."""

    weight: float = option(
        METHOD,
        "--weight",
        type=float,
        metavar="W",
        default=1.0,
        help="Scale the adapter's delta by this factor (default: 1).",
    )
    add: tuple[tuple[str, float | None], ...] = option(
        METHOD,
        "--add",
        type=WEIGHTED_ADAPTER,
        metavar="ADAPTER[=W]",
        multiple=True,
        help="Add the delta of another adapter, scaled by W (default: 1).",
    )
    tied: str | None = option(METHOD, "--tied", type=TIED, help=ADD_OR_UNTIE)
    dequantize: bool = flag(
        METHOD,
        "--dequantize",
        help="Turn a quantized base into a 16-bit model.",
    )
    labels: str | None = option(
        METHOD, "--labels", metavar="A,B,...", help="Names of the labels of a classifier."
    )
    architecture: str | None = option(
        METHOD,
        "--architecture",
        metavar="CLASS",
        help="Class of the merged model, if the adapter adds an output head.",
    )
    device: str = option(
        METHOD,
        "--device",
        default="cpu",
        metavar="DEVICE",
        help="Where to compute: cpu (default) or, with the extra torch, cuda or cuda:N.",
    )
    jobs: int | None = option(METHOD, "--jobs", type=int, metavar="N", help=JOBS)
    dtype: str | None = option(
        OUTPUT,
        "--dtype",
        type=Dtype(FLOAT_NAMES),
        metavar="DTYPE",
        help="Write float tensors in this dtype (default: keep the dtype of each tensor).",
    )
    max_shard_size: int | None = option(
        OUTPUT,
        "--max-shard-size",
        type=SIZE,
        metavar="SIZE",
        help="Write shards of at most this size, such as 5GB (default: the base's shards).",
    )
    check: bool = flag(
        CHECK,
        "--check",
        help="Check every value, and read the written files back.",
    )
    checksums: bool = flag(
        CHECK,
        "--checksums",
        help="Record the SHA-256 of every file.",
    )
    resume: bool = flag(
        OUTPUT,
        "--resume",
        help="Continue a run that failed; if this run fails, keep the finished shards.",
    )
    dry_run: bool = flag(
        OUTPUT,
        "--dry-run",
        help="Print the plan, and write nothing.",
    )


@dataclass(frozen=True)
class LoraChoices(BaseChoice, GeneratorChoice, ProjectionChoice, ForceChoice, CommonOptions):
    """Options of `to-lora`."""

    engine: str = option(
        LORA,
        "--for",
        default="peft",
        type=Choice(ENGINES),
        metavar="ENGINE",
        help=f"The engine that will load the LoRA: {_listed(ENGINES)}.",
    )
    rank: int | None = option(
        LORA,
        "--rank",
        type=int,
        metavar="R",
        help="Write the best LoRA of this rank (default: the rank of an exact LoRA).",
    )
    max_error: float | None = option(
        LORA,
        "--max-error",
        type=float,
        metavar="E",
        help="Write the smallest rank whose relative error is at most E in every layer.",
    )
    accept_error: bool = flag(
        LORA,
        "--accept-error",
        help="Write even if the relative error of a layer is above 0.5.",
    )
    fill_layers: bool = flag(
        LORA,
        "--fill-layers",
        help="Write zeros for the layers that the engine needs and ADAPTER does not adapt.",
    )
    drop_head: bool = flag(
        LORA,
        "--drop-head",
        help="Leave out the modules and biases that were trained in full.",
    )
    check: bool = flag(
        CHECK,
        "--check",
        help="Read every written byte back, and compare.",
    )
    dtype: str = option(
        OUTPUT,
        "--dtype",
        default="float32",
        type=Dtype(("float32", "bfloat16", "float16")),
        metavar="DTYPE",
        help="Store the LoRA in this dtype: float32 (default), bfloat16, float16.",
    )
    dry_run: bool = flag(
        OUTPUT,
        "--dry-run",
        help="Measure and print the result, and write nothing.",
    )


@dataclass(frozen=True)
class VerifyChoices(BaseChoice, GeneratorChoice, CommonOptions):
    """Options of `verify`; an option left out has the value that the merge recorded."""

    other: str | None = option(
        INPUT, "--adapter", metavar="OTHER", help="The stripped, embedded or migrated adapter."
    )
    merged: str | None = option(
        INPUT, "--merged", metavar="MODEL", help="The model that ADAPTER was merged into."
    )
    lora: str | None = option(
        INPUT, "--lora", metavar="LORA", help="The LoRA that to-lora made of ADAPTER."
    )
    projections: str | None = option(
        PROJECTIONS,
        "--projections",
        type=SOURCES,
        metavar="SOURCE",
        help="Which A and B were merged: auto, file or key (default: as the merge recorded, "
        "else auto).",
    )
    weight: float | None = option(
        METHOD,
        "--weight",
        type=float,
        metavar="W",
        help="The factor that scaled the adapter's delta.",
    )
    add: tuple[tuple[str, float | None], ...] = option(
        METHOD,
        "--add",
        type=WEIGHTED_ADAPTER,
        metavar="ADAPTER[=W]",
        multiple=True,
        help="Another adapter that was merged; give one for each.",
    )
    tied: str | None = option(
        METHOD,
        "--tied",
        type=TIED,
        help="How the merge treated an output head tied to the embedding.",
    )
    dequantize: bool | None = option(
        METHOD, "--dequantize", is_flag=True, help="The merge made a 16-bit model."
    )
    dtype: str | None = option(
        METHOD,
        "--dtype",
        type=Dtype(FLOAT_NAMES),
        metavar="DTYPE",
        help="The dtype that the merge wrote float tensors in.",
    )
    samples: int | None = option(
        CHECK,
        "--samples",
        type=int,
        metavar="N",
        help="Number of sequences to run both models on (default: 8).",
    )
    text: Path | None = option(
        CHECK,
        "--text",
        type=PATH,
        metavar="FILE",
        help="Take the sequences from this text (default: random token ids).",
    )
    layers_only: bool = flag(
        CHECK,
        "--layers-only",
        help="Compare the weights and run no model; torch is not needed.",
    )
    jobs: int | None = option(CHECK, "--jobs", type=int, metavar="N", help=JOBS)
