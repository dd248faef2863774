"""The command line: parse, call the function of the same name, render, exit.

Nothing heavy is imported before a command needs it; `--help` costs click and nothing more.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from vera_convert._version import __version__
from vera_convert.arguments import (
    adapter_and_weight,
    dtype_name,
    peft_version,
    size_in_bytes,
)
from vera_convert.dtypes import FLOAT_NAMES
from vera_convert.errors import (
    OF_MERGED,
    CheckpointError,
    SurroundingsError,
    UsageError,
    VeraConvertError,
)
from vera_convert.hub.secrets import redacted
from vera_convert.publish.signals import Interrupted, interruption, signals_raise
from vera_convert.text import and_more, printable, printable_whole

if TYPE_CHECKING:
    from vera_convert.base.facts import BaseOptions
    from vera_convert.conversion.migration import TreeMigration
    from vera_convert.conversion.regeneration import Regenerated
    from vera_convert.conversion.strip_embed import Conversion
    from vera_convert.hub.lookup import HubAccess
    from vera_convert.lora.options import LoraOptions
    from vera_convert.merging.options import MergeOptions
    from vera_convert.rules import Finding
    from vera_convert.validation.validation import Validation
    from vera_convert.verification.options import VerifyOptions

Command = TypeVar("Command", bound=Callable[..., Any])

GENERATORS = (
    "float32-fused",
    "float32-separate",
    "float64-fused",
    "float64-separate",
    "bfloat16-torch2.11",
    "bfloat16-torch2.12-fused",
    "bfloat16-torch2.12-separate",
    "float16-torch2.11",
    "float16-torch2.12-fused",
    "float16-torch2.12-separate",
)
"""As `generator.Variant`, repeated here so that `--help` need not load NumPy; a test compares."""

ENGINES = ("peft", "vllm", "sglang", "tgi")
"""As `lora.engines.EngineName`, repeated here for the same reason; a test compares."""

SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16"}
"""How `--round` calls the two dtypes that it takes."""


class KeyMap(click.ParamType):  # type: ignore[type-arg] # generic only from click 8.4
    """``OLD=NEW``: the leading path OLD of a module becomes NEW."""

    name = "OLD=NEW"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """Split at the equals sign; one side may be empty."""
        from vera_convert.base.facts import parse_key_map

        return parse_key_map(value)


class NamedBase(click.ParamType):  # type: ignore[type-arg] # generic only from click 8.4
    """``NAME=MODEL``: the base that configs call NAME lies at MODEL."""

    name = "NAME=MODEL"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """Split at the first equals sign; neither side is empty."""
        name, _, model = value.partition("=")
        if not name or not model:
            self.fail(f"{value!r} is not NAME=MODEL, such as org/model=./model.")
        return name, model


class Targets(click.ParamType):  # type: ignore[type-arg] # generic only from click 8.4
    """Names, separated by commas."""

    name = "NAME[,NAME]"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Split at commas."""
        return tuple(name.strip() for name in value.split(",") if name.strip())


class PeftVersion(click.ParamType):  # type: ignore[type-arg] # generic only from click 8.4
    """A version such as 0.13 or 0.13.2."""

    name = "VERSION"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Split at the dots; two or three whole numbers."""
        return peft_version("--peft-version", value)


class Codes(click.ParamType):  # type: ignore[type-arg] # generic only from click 8.4
    """Codes of rules, or their beginnings, separated by commas."""

    name = "CODE[,CODE]"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Split at commas; a small v is one too. What is no code is refused when it is used."""
        return tuple(code.strip().upper() for code in value.split(","))


class Size(click.ParamType):  # type: ignore[type-arg] # generic only from click 8.4
    """A number of bytes such as 5GB, 500MB or 5GiB, as transformers writes it."""

    name = "SIZE"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Multiply the number by its unit."""
        return size_in_bytes("--max-shard-size", value)


class Dtype(click.Choice):  # type: ignore[type-arg] # generic only from click 8.2
    """A dtype by any usual spelling, such as bf16; the help lists one for each."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the spelling of the choices."""
        with suppress(UsageError):
            name = dtype_name("dtype", value)
            value = SHORT_DTYPES.get(name, name) if "bf16" in self.choices else name
        chosen: str = super().convert(value, param, ctx)
        return chosen


class WeightedAdapter(click.ParamType):  # type: ignore[type-arg] # generic only from click 8.4
    """``ADAPTER`` or ``ADAPTER=W``."""

    name = "ADAPTER[=W]"

    def __init__(self, unsaid: float | None = 1.0) -> None:
        self.unsaid = unsaid

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float | None]:
        """Split at the last equals sign, if a number follows it."""
        adapter, weight = adapter_and_weight("--add", value)
        return adapter, self.unsaid if weight is None else weight


# --- options that recur --------------------------------------------------------------------------

_WHOSE = {"adapter": "", "revision": "--revision", "base": "--base"}
"""What says which adapter a command was about, and how `validate` is told the same."""


def _remember(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Keep what a refusal names again when it points to `validate`."""
    context.meta[f"vera_convert.{parameter.name}"] = value
    return value


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Join option decorators into one, so that help lists them in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


output_options = _options(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document, nothing else."),
    click.option("--quiet", is_flag=True, help="Print no result text, only warnings and errors."),
    click.option(
        "--progress/--no-progress", default=None, help="Show progress (default: if on a terminal)."
    ),
    click.option("--debug", is_flag=True, help="Show a traceback when the command fails."),
)
hub_options = _options(
    click.option(
        "--revision",
        metavar="REV",
        callback=_remember,
        help="The adapter's branch, tag or commit on the Hub.",
    ),
    click.option("--token", metavar="TOKEN", help="Access token for the Hub (default: HF_TOKEN)."),
    click.option("--cache-dir", metavar="DIR", help="The Hub's cache (default: HF_HOME)."),
    click.option("--offline", is_flag=True, help="Use the Hub's cache only; open no connection."),
)
base_options = _options(
    click.option(
        "--base",
        metavar="MODEL",
        callback=_remember,
        help="The base model: a folder or a repo on the Hub.",
    ),
    click.option("--base-revision", metavar="REV", help="The base's branch, tag or commit."),
    click.option(
        "--base-dtype",
        type=Dtype(FLOAT_NAMES),
        help="The dtype that the base is loaded in; it decides the rounding of A and B.",
    ),
    click.option(
        "--key-map",
        "key_map",
        type=KeyMap(),
        multiple=True,
        help="Rename leading paths of the adapter's modules.",
    ),
)
dims_options = _options(
    click.option("--in-features", type=click.IntRange(min=1), help="Columns of A, without a base."),
    click.option("--out-features", type=click.IntRange(min=1), help="Rows of B, without a base."),
)
projections_option = click.option(
    "--projections",
    type=click.Choice(("auto", "file", "key")),
    default="auto",
    show_default=True,
    help="Which A and B are meant: auto, as PEFT 0.21; file, the stored; key, the key's.",
)
force_option = click.option("--force", is_flag=True, help="Replace an OUT of the same kind.")
accept_option = click.option(
    "--accept-change",
    is_flag=True,
    help="Strip also what PEFT would draw otherwise, if embed can restore it.",
)
generator_option = click.option(
    "--generator",
    type=click.Choice(GENERATORS),
    help="How PyTorch drew A and B (default: float32-fused).",
)
out_argument = click.argument("out", type=click.Path(path_type=Path))
adapter_argument = click.argument("adapter", callback=_remember)


def _access(options: Mapping[str, Any]) -> HubAccess:
    from vera_convert.hub.lookup import HubAccess

    cache_dir = options["cache_dir"]
    return HubAccess(
        token=options["token"],
        cache_dir=Path(cache_dir) if cache_dir else None,
        offline=options["offline"],
        progress=options["progress"] is not False and not options["quiet"],
    )


def _base_options(options: Mapping[str, Any]) -> BaseOptions:
    from vera_convert.base.facts import BaseOptions

    return BaseOptions(
        model=options.get("base"),
        revision=options.get("base_revision"),
        dtype=options.get("base_dtype"),
        in_features=options.get("in_features"),
        out_features=options.get("out_features"),
        key_map=tuple(options.get("key_map", ())),
        places=tuple(options.get("base_for", ())),
    )


# --- the program ---------------------------------------------------------------------------------


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vera-convert", message="%(prog)s %(version)s")
def program() -> None:
    """Validate, strip, embed, migrate, merge and verify VeRA adapters, bit for bit."""


@program.command()
@adapter_argument
@base_options
@projections_option
@hub_options
@output_options
def info(adapter: str, **options: Any) -> None:
    """Say what ADAPTER is: rank, targets, projections, sizes.

    ADAPTER is a folder or a repo on the Hub, org/name[@revision][/subfolder].
    """
    from vera_convert.formats.results import info_document, info_text
    from vera_convert.summary import info as summarize

    result = summarize(
        adapter,
        base=_base_options(options),
        projections=options["projections"],
        revision=options["revision"],
        access=_access(options),
    )
    _show(options, result.findings, info_text(result), lambda: info_document(result))


@program.command()
@click.argument("adapters", nargs=-1, metavar="ADAPTER...")
@click.option("--recursive", is_flag=True, help="Check every adapter below the folders given.")
@base_options
@click.option("--deep", is_flag=True, help="Fetch the weights of repos too; draw A and B again.")
@click.option(
    "--format",
    "form",
    type=click.Choice(("text", "json", "sarif", "junit", "github")),
    help="How to report (default: text).",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the report to FILE, whatever was found, and text for people to stdout.",
)
@click.option(
    "--select",
    type=Codes(),
    multiple=True,
    help="Report these codes only; V2 means all that begin so.",
)
@click.option(
    "--ignore",
    type=Codes(),
    multiple=True,
    help="Do not report these, nor those that pyproject.toml ignores.",
)
@click.option(
    "--fail-on",
    type=click.Choice(("error", "warning")),
    help="Exit with status 1 from this severity on (default: error).",
)
@click.option("--rules", is_flag=True, help="List every rule, and check nothing.")
@click.option("--explain", type=Codes(), metavar="CODE", help="Explain a rule, and check nothing.")
@hub_options
@output_options
def validate(adapters: tuple[str, ...], **options: Any) -> None:
    """Find everything that is wrong with each ADAPTER, and say what to do about it.

    ADAPTER is a folder, a file of it, or a repo on the Hub, org/name[@revision][/subfolder], of
    which config and header are read.

    [tool.vera-convert.validate] in pyproject.toml can hold select, ignore and fail-on too.
    """
    if options["rules"] or options["explain"]:
        _show_rules(adapters, options)
        return
    if not adapters:
        raise UsageError("name an ADAPTER to validate, or give --rules or --explain CODE.")
    if options["as_json"] and options["form"] not in (None, "json") and not options["output"]:
        raise UsageError("--json and another --format cannot both go to stdout: give --output.")
    result = _validated(adapters, options)
    for checked in result.adapters:
        if checked.failure is not None:
            _say(f"error: {checked.label}: {_reason(checked.failure)}", err=True)
    _report(result, options)  # its text says no failure again
    if result.status:
        raise click.exceptions.Exit(result.status)


def _validated(adapters: tuple[str, ...], options: Mapping[str, Any]) -> Validation:
    from vera_convert.rules import Severity
    from vera_convert.validation.selection import read_settings
    from vera_convert.validation.validate import validate as run

    settings = read_settings(Path.cwd())
    select = [code for codes in options["select"] for code in codes]
    ignore = [code for codes in options["ignore"] for code in codes]
    fail_on = options["fail_on"] or settings.fail_on
    return run(
        adapters,
        base=_base_options(options),
        recursive=options["recursive"],
        deep=options["deep"],
        select=select or settings.select,
        ignore=[*settings.ignore, *ignore],
        fail_on=fail_on or Severity.ERROR,
        revision=options["revision"],
        access=_access(options),
    )


def _report(result: Validation, options: Mapping[str, Any]) -> None:
    """Print the report, or write it and print the text for people."""
    from vera_convert.formats.validation import validation_document, validation_text

    form = options["form"] or ("json" if options["as_json"] else "text")
    if form == "github":
        _append_summary(result)
    if options["output"] is not None:
        _write_report(options["output"], _rendered(result, form), result)
        form = "text"
    if options["as_json"]:
        _print_document(validation_document(result))
    elif form != "text":
        _say(_rendered(result, form))
    elif options["quiet"]:
        for checked in result.adapters:
            for finding in checked.findings:
                if finding.severity != "note":
                    _say(f"{finding.severity}: {checked.label}: {finding}", err=True)
    else:
        text = validation_text(
            result, color=_in_color(), width=_columns(), failures_said=options["output"] is None
        )
        _say(text)


def _rendered(result: Validation, form: str) -> str:
    """Return a report in a format; each has a module of its own."""
    import json

    from vera_convert.formats.github import github_text
    from vera_convert.formats.junit import junit_text
    from vera_convert.formats.sarif import sarif_text
    from vera_convert.formats.validation import validation_document, validation_text

    renderers: dict[str, Callable[[Validation], str]] = {
        "text": validation_text,
        "json": lambda result: json.dumps(validation_document(result), indent=2),
        "sarif": sarif_text,
        "junit": junit_text,
        "github": github_text,
    }
    return renderers[form](result)


def _write_report(out: Path, text: str, result: Validation) -> None:
    """Write a report whole or not at all; a file of this name is an earlier one, and replaced."""
    from vera_convert.publish.publishing import staged_file

    shown = printable(str(out))
    if shown == "-":
        raise UsageError("leave --output out: without it the report goes to stdout.")
    if os.path.lexists(out) and (out.is_symlink() or not out.is_file()):
        raise UsageError(f"{shown} is no regular file, so no report is put in its place.")
    inputs = [Path(checked.path) for checked in result.adapters if checked.path is not None]
    with staged_file(out, force=True, inputs=inputs, is_own=lambda _: True) as path:
        path.write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace", newline="\n")


def _append_summary(result: Validation) -> None:
    """Add to the summary of a job on GitHub, if this is one; the report does not hang on it."""
    from vera_convert.formats.github import job_summary

    name = os.environ.get("GITHUB_STEP_SUMMARY")
    if not name:
        return
    try:
        with Path(name).open("a", encoding="ascii", newline="\n") as summary:
            summary.write(job_summary(result))
    except (OSError, ValueError) as error:
        _say(f"warning: no summary was written: {printable(str(error))}", err=True)


def _in_color() -> bool:
    """Whether a terminal shows the text that wants no other."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout is not None and sys.stdout.isatty() and not plain


def _columns() -> int:
    """Return how wide a text may be: as the terminal, within reason."""
    from vera_convert.formats.validation import WIDTH

    if sys.stdout is None or not sys.stdout.isatty():
        return WIDTH
    return min(max(shutil.get_terminal_size().columns, 60), WIDTH)


def _show_rules(adapters: tuple[str, ...], options: Mapping[str, Any]) -> None:
    from vera_convert.formats.catalog import explanation, rules_document, rules_text
    from vera_convert.rules import CATALOG
    from vera_convert.validation.selection import check_codes

    if adapters or (options["rules"] and options["explain"]):
        raise UsageError("--rules and --explain each stand alone, without an ADAPTER.")
    if options["form"] not in (None, "text", "json") or options["output"] is not None:
        raise UsageError("--rules and --explain print text, or JSON with --json, to stdout.")
    selected = tuple(code for codes in options["select"] for code in codes)
    codes = options["explain"] or selected or ("",)
    if codes != ("",):
        check_codes(codes)
    rules = [rule for rule in CATALOG.values() if rule.code.startswith(codes)]
    if options["as_json"] or options["form"] == "json":
        _print_document(rules_document(rules))
    else:
        _say(explanation(rules, width=_columns()) if options["explain"] else rules_text(rules))


@program.command()
@adapter_argument
@out_argument
@base_options
@projections_option
@accept_option
@force_option
@hub_options
@output_options
def strip(adapter: str, out: Path, **options: Any) -> None:
    """Drop A and B of ADAPTER if they are proven to be redrawable; write OUT."""
    from vera_convert.conversion.strip_embed import strip as run

    result = run(
        adapter,
        out,
        base=_base_options(options),
        projections=options["projections"],
        accept_change=options["accept_change"],
        force=options["force"],
        revision=options["revision"],
        access=_access(options),
    )
    _show_conversion("strip", options, result)


@program.command()
@adapter_argument
@out_argument
@base_options
@dims_options
@generator_option
@projections_option
@force_option
@hub_options
@output_options
def embed(adapter: str, out: Path, **options: Any) -> None:
    """Draw A and B of ADAPTER again and store them; write OUT."""
    from vera_convert.conversion.strip_embed import embed as run

    result = run(
        adapter,
        out,
        base=_base_options(options),
        generator=options["generator"],
        projections=options["projections"],
        force=options["force"],
        revision=options["revision"],
        access=_access(options),
    )
    _show_conversion("embed", options, result)


@program.command()
@out_argument
@click.option(
    "--for",
    "adapter",
    metavar="ADAPTER",
    callback=_remember,
    help="Draw as this adapter has them.",
)
@click.option("--rank", type=int, help="Rows of A, columns of B.")
@dims_options
@click.option("--key", type=int, default=None, help="The seed (default: 0).")
@generator_option
@click.option(
    "--round",
    "rounding",
    type=Dtype((*SHORT_DTYPES.values(),)),
    help="Round as a base of this type does.",
)
@base_options
@force_option
@hub_options
@output_options
def regenerate(out: Path, **options: Any) -> None:
    """Draw the two shared matrices alone and write them to OUT, a .safetensors file.

    Give --rank, --in-features and --out-features, or --for ADAPTER.
    """
    from vera_convert.formats.results import regenerated_document, regenerated_text

    result = _regenerated(out, options)
    _show(
        options,
        result.findings,
        regenerated_text(result),
        lambda: regenerated_document(result),
    )


def _regenerated(out: Path, options: Mapping[str, Any]) -> Regenerated:
    from vera_convert.conversion.regeneration import regenerate, regenerate_for

    generator = options["generator"]
    alone = ("rank", "in_features", "out_features", "key", "rounding")
    of_adapter = ("base", "base_revision", "base_dtype", "key_map", "revision")
    if options["adapter"] is not None:
        _refuse_together("--for", options, alone)
        return regenerate_for(
            options["adapter"],
            out,
            base=_base_options(options),
            generator=generator,
            force=options["force"],
            revision=options["revision"],
            access=_access(options),
        )
    missing = [name for name in alone[:3] if options[name] is None]
    if missing:
        names = ", ".join(map(_option_name, missing))
        raise UsageError(f"{names} must be given, or --for ADAPTER.")
    _refuse_together("--rank", options, of_adapter)
    return regenerate(
        out,
        rank=options["rank"],
        in_features=options["in_features"],
        out_features=options["out_features"],
        key=options["key"] or 0,
        generator=generator or GENERATORS[0],
        rounding=options["rounding"] or "none",
        force=options["force"],
    )


def _refuse_together(given: str, options: Mapping[str, Any], others: Sequence[str]) -> None:
    clashing = [name for name in others if options[name] not in (None, ())]
    if clashing:
        names = ", ".join(map(_option_name, clashing))
        raise UsageError(f"{names} cannot go with {given}: leave one of them out.")


def _option_name(name: str) -> str:
    return "--round" if name == "rounding" else f"--{name.replace('_', '-')}"


@program.command()
@adapter_argument
@out_argument
@click.option(
    "--to",
    type=click.Choice(("embedded", "stripped", "asis")),
    required=True,
    help="With A and B stored, without, or as it is.",
)
@click.option("--recursive", is_flag=True, help="ADAPTER is a tree of adapters; rebuild it in OUT.")
@click.option(
    "--base-for",
    type=NamedBase(),
    multiple=True,
    help="Where the base lies that adapters' configs call NAME.",
)
@click.option(
    "--peft-version",
    type=PeftVersion(),
    help="Make the config readable for this PEFT, such as 0.13.",
)
@base_options
@projections_option
@accept_option
@force_option
@hub_options
@output_options
def migrate(adapter: str, out: Path, **options: Any) -> None:
    """Bring ADAPTER to the current form and to a mode; say every change; write OUT."""
    from vera_convert.conversion.migration import migrate, migrate_tree

    wishes: dict[str, Any] = {
        "to": options["to"],
        "base": _base_options(options),
        "projections": options["projections"],
        "accept_change": options["accept_change"],
        "peft_version": options["peft_version"],
        "force": options["force"],
        "access": _access(options),
    }
    if options["recursive"]:
        if options["revision"] is not None:
            raise UsageError("--recursive takes a folder, which has no --revision.")
        _show_tree(adapter, options, migrate_tree(adapter, out, **wishes))
    else:
        result = migrate(adapter, out, revision=options["revision"], **wishes)
        _show_conversion("migrate", options, result)


def _show_tree(tree: str, options: Mapping[str, Any], result: TreeMigration) -> None:
    from vera_convert.formats.results import tree_document, tree_text

    for name, conversion in result.done.items():
        _warn(conversion.findings, f"{printable(name)}: ")
    for name, error in result.failed.items():
        where = {"adapter": f"{tree}/{name}"}
        _say(f"error: {printable(name)}: {_reason(error, where)}", err=True)
    _print(options, tree_text(result), lambda: tree_document(result))
    if result.failed:
        raise click.exceptions.Exit(min(error.status for error in result.failed.values()))


@program.command()
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A model's config.json.",
)
@click.option("--base", metavar="MODEL", help="A model: a folder or a repo on the Hub.")
@click.option("--base-revision", metavar="REV", help="The base's branch, tag or commit.")
@click.option("--rank", type=int, required=True, help="The rank of the adapter.")
@click.option(
    "--target",
    "targets",
    type=Targets(),
    multiple=True,
    help="Layers to adapt, as in target_modules, or all-linear (default: PEFT's for the model).",
)
@hub_options
@output_options
def count(**options: Any) -> None:
    """Count trainable parameters and bytes of an adapter, VeRA beside LoRA, before training."""
    from vera_convert.base.layers import layers_of_base, layers_of_config_file
    from vera_convert.counting import count as run
    from vera_convert.formats.results import count_document, count_text

    if options["revision"] is not None:
        raise UsageError(
            "count reads no adapter, so --revision says nothing: give --base-revision."
        )
    if (options["config_file"] is None) == (options["base"] is None):
        raise UsageError("give one of --base and --config.")
    if options["base"] is not None:
        access = _access(options)
        model = layers_of_base(options["base"], revision=options["base_revision"], access=access)
    else:
        model = layers_of_config_file(options["config_file"])
    targets = [name for names in options["targets"] for name in names]
    result = run(model, rank=options["rank"], targets=targets)
    _show(options, (), count_text(result), lambda: count_document(result))


@program.command()
@adapter_argument
@out_argument
@base_options
@projections_option
@generator_option
@click.option("--weight", type=float, default=1.0, help="Factor of ADAPTER's delta (default: 1).")
@click.option(
    "--add", type=WeightedAdapter(), multiple=True, help="Add the delta of another adapter."
)
@click.option("--tied", type=click.Choice(("add", "untie")), help="What becomes of a tied head.")
@click.option("--dequantize", is_flag=True, help="Make an fp8 base a 16-bit model.")
@click.option("--labels", metavar="A,B,...", help="Name the labels of the adapter's classifier.")
@click.option("--architecture", metavar="CLASS", help="Name the class that has the head.")
@click.option("--dtype", type=Dtype(FLOAT_NAMES), help="Write float tensors in this type.")
@click.option("--max-shard-size", type=Size(), help="Write shards of at most this size, as 5GB.")
@click.option("--device", default="cpu", help="cpu (default), or cuda with the extra torch.")
@click.option("--jobs", type=int, help="Threads (default: one for each core, four at most).")
@click.option(
    "--check", is_flag=True, help="Look at all values; compare what comes back from disk."
)
@click.option("--checksums", is_flag=True, help="Record the SHA-256 of every file.")
@click.option(
    "--resume", is_flag=True, help="Continue a failed run; keep what is done if this fails."
)
@click.option("--dry-run", is_flag=True, help="Print what would be done, and write nothing.")
@force_option
@hub_options
@output_options
def merge(adapter: str, out: Path, **options: Any) -> None:
    """Add ADAPTER's delta to its base's weights; write OUT, a complete model.

    Shard by shard, in memory that does not grow with the model, and without PyTorch.
    """
    from vera_convert.formats.merge import merge_document, merge_text
    from vera_convert.merging.merge import merge as run

    with _telling_how_to_continue(), _progress(options, "merged") as progress:
        result = run(
            adapter,
            out,
            base=_base_options(options),
            options=_merge_options(options),
            revision=options["revision"],
            access=_access(options),
            progress=progress,
        )
    _show(options, result.findings, merge_text(result), lambda: merge_document(result))


@program.command(name="to-lora")
@adapter_argument
@out_argument
@click.option(
    "--for",
    "engine",
    type=click.Choice(ENGINES),
    default="peft",
    show_default=True,
    help="Write the LoRA for this engine.",
)
@base_options
@projections_option
@generator_option
@click.option(
    "--dtype",
    type=Dtype(("float32", "bfloat16", "float16")),
    default="float32",
    show_default=True,
    help="Store the LoRA in this dtype.",
)
@click.option("--rank", type=int, help="Write the best LoRA of this rank (default: exact).")
@click.option(
    "--max-error",
    type=float,
    help="Write the smallest rank whose relative error is at most this in every layer.",
)
@click.option("--accept-error", is_flag=True, help="Write even if an error is above 0.5.")
@click.option(
    "--fill-layers", is_flag=True, help="Write zeros for layers that the engine needs too."
)
@click.option("--drop-head", is_flag=True, help="Leave out modules and biases trained whole.")
@click.option("--check", is_flag=True, help="Read every written byte back and compare.")
@click.option("--dry-run", is_flag=True, help="Measure and print the result, and write nothing.")
@force_option
@hub_options
@output_options
def to_lora(adapter: str, out: Path, **options: Any) -> None:
    """Write ADAPTER as a LoRA adapter with the same delta, for engines without VeRA."""
    from vera_convert.formats.lora import lora_document, lora_text
    from vera_convert.lora.conversion import to_lora as run

    with _progress(options, "written") as progress:
        result = run(
            adapter,
            out,
            base=_base_options(options),
            options=_lora_options(options),
            revision=options["revision"],
            access=_access(options),
            progress=progress,
        )
    _show(options, result.findings, lora_text(result), lambda: lora_document(result))


def _lora_options(options: Mapping[str, Any]) -> LoraOptions:
    from vera_convert.lora.options import LoraOptions

    same = (
        *("engine", "dtype", "rank", "max_error", "accept_error", "fill_layers", "drop_head"),
        *("projections", "generator", "check", "dry_run", "force"),
    )
    return LoraOptions(**{name: options[name] for name in same})


@program.command()
@adapter_argument
@click.option("--adapter", "other", metavar="OTHER", help="ADAPTER stripped, embedded or migrated.")
@click.option("--merged", metavar="MODEL", help="The model that ADAPTER was merged into.")
@base_options
@click.option(
    "--projections",
    type=click.Choice(("auto", "file", "key")),
    help="Which A and B are meant (default: as the merge recorded, else auto).",
)
@generator_option
@click.option("--weight", type=float, help="Factor of ADAPTER's delta in the merge.")
@click.option(
    "--add",
    type=WeightedAdapter(unsaid=None),
    multiple=True,
    help="Another adapter that was merged, for each one.",
)
@click.option("--tied", type=click.Choice(("add", "untie")), help="What became of a tied head.")
@click.option(
    "--dequantize", is_flag=True, default=None, help="An fp8 base was made a 16-bit model."
)
@click.option("--dtype", type=Dtype(FLOAT_NAMES), help="What float tensors became.")
@click.option("--samples", type=int, help="How many sequences to run both models on (default: 8).")
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Take the sequences from this text (default: token ids that are drawn).",
)
@click.option("--layers-only", is_flag=True, help="Compare weights alone; torch is not needed.")
@click.option("--jobs", type=int, help="Threads (default: one for each core, four at most).")
@hub_options
@output_options
def verify(adapter: str, **options: Any) -> None:
    """Hold what was made of ADAPTER against it: another form, or a merged model.

    Every tensor of the merged model is computed again, in blocks; then the whole model is run
    beside the base with ADAPTER. The options of the merge are those that it recorded.
    """
    from vera_convert.formats.verification import verification_document, verification_text
    from vera_convert.verifying import verify as run

    with (
        _progress(options, "compared") as progress,
        _progress(options, "models run", unit="run") as runs,
    ):
        result = run(
            adapter,
            base=_base_options(options),
            other=options["other"],
            merged=options["merged"],
            options=_verify_options(options),
            revision=options["revision"],
            access=_access(options),
            progress=progress,
            runs=runs,
        )
    _show(
        options, result.findings, verification_text(result), lambda: verification_document(result)
    )
    if result.errors:
        more = f" ({and_more(result.wrong - 1).lstrip()})" if result.wrong > 1 else ""
        _say(f"error: {result.errors[0]}{more}", err=True)
        raise click.exceptions.Exit(CheckpointError.status)
    if result.not_run is not None:
        _say(f"error: {result.not_run}", err=True)
        raise click.exceptions.Exit(result.not_run.status)


def _verify_options(options: Mapping[str, Any]) -> VerifyOptions:
    from vera_convert.merging.adapters import AdapterSpec
    from vera_convert.verification.options import VerifyOptions

    same = ("weight", "dtype", "dequantize", "layers_only", "samples", "text", "jobs")
    return VerifyOptions(
        add=tuple(AdapterSpec(adapter, weight) for adapter, weight in options["add"]),
        projections=options["projections"],
        generator=options["generator"],
        tied=options["tied"],
        **{name: options[name] for name in same},
    )


@contextmanager
def _telling_how_to_continue() -> Iterator[None]:
    """Name the command that continues a merge which failed or was stopped, if one can."""
    try:
        yield
    except BaseException as error:
        if _is_kept(error):
            command = _command_without_token(click.get_current_context().obj)
            _say(f"note: what is finished is kept; this continues: {command}", err=True)
        raise


def _is_kept(error: BaseException) -> bool:
    """Return whether a merge that failed has left its work for a later one."""
    from vera_convert.merging.job import KEPT

    return KEPT in getattr(error, "__notes__", ())


def _command_without_token(arguments: Sequence[str]) -> str:
    """Return the command line as a shell takes it; a token is never printed."""
    kept: list[str] = []
    skips = False
    for argument in arguments:
        if not skips and not argument.startswith("--token="):
            skips = argument == "--token"
            kept += [] if skips else [argument]
        else:
            skips = False
    return printable_whole(shlex.join(["vera-convert", *kept]))


def _merge_options(options: Mapping[str, Any]) -> MergeOptions:
    from vera_convert.merging.adapters import AdapterSpec
    from vera_convert.merging.options import MergeOptions

    same = (
        *("weight", "dtype", "dequantize", "architecture", "max_shard_size", "jobs"),
        *("check", "checksums", "resume", "dry_run"),
    )
    return MergeOptions(
        add=tuple(AdapterSpec(adapter, weight) for adapter, weight in options["add"]),
        projections=options["projections"],
        generator=options["generator"],
        tied=options["tied"],
        labels=options["labels"] or (),
        force=options["force"],
        device=options["device"],
        **{name: options[name] for name in same},
    )


@contextmanager
def _progress(
    options: Mapping[str, Any], what: str, *, unit: str = "B"
) -> Iterator[Callable[[int, int], None]]:
    """Draw a bar, of bytes or of another unit, on a terminal or if it is asked for.

    The bar comes with the first thing that it is told.
    """
    wanted = options["progress"]
    if wanted is None:
        wanted = sys.stderr is not None and sys.stderr.isatty() and not options["quiet"]
        wanted = wanted and not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    if not wanted:
        yield lambda _done, _of: None
        return
    from tqdm import tqdm

    with ExitStack() as stack:
        bars: list[tqdm[NoReturn]] = []

        def show(done: int, of: int) -> None:
            if not bars:
                scaled = {"unit_scale": True} if unit == "B" else {}
                bar = tqdm(desc=what, unit=unit, file=sys.stderr, leave=False, **scaled)
                bars.append(stack.enter_context(bar))
            bars[0].total = of
            bars[0].update(done - bars[0].n)

        yield show


def _show_conversion(command: str, options: Mapping[str, Any], result: Conversion) -> None:
    from vera_convert.formats.results import conversion_document, conversion_text

    _show(
        options,
        result.findings,
        conversion_text(result),
        lambda: conversion_document(command, result),
    )


# --- what is printed, and how it ends ------------------------------------------------------------


def _show(
    options: Mapping[str, Any],
    findings: Sequence[Finding],
    text: str,
    document: Callable[[], Mapping[str, object]],
) -> None:
    """Print warnings to stderr and the result to stdout."""
    _warn(findings)
    _print(options, text, document)


def _warn(findings: Sequence[Finding], before: str = "") -> None:
    for finding in findings:
        if finding.severity != "error":
            _say(f"{finding.severity}: {before}{finding}", err=True)


def _print(
    options: Mapping[str, Any], text: str, document: Callable[[], Mapping[str, object]]
) -> None:
    try:
        if options["as_json"]:
            _print_document(document())
        elif not options["quiet"]:
            _say(text)
    except _NotPrintedError as error:
        if click.get_current_context().info_name in _WRITES_NOTHING:
            raise
        raise _NotPrintedError(f"{error} OUT is written and complete.") from error


class _NotPrintedError(SurroundingsError):
    """Standard output does not take the result, as on a full disk."""


def _print_document(document: Mapping[str, object]) -> None:
    import json

    _say(json.dumps(document, indent=2))


def _say(text: str, *, err: bool = False) -> None:
    """Print a text; a reader that went away does not undo what was done."""
    if (sys.stderr if err else sys.stdout) is None:  # closed before the program began
        return
    with suppress(OSError if err else BrokenPipeError):
        try:
            click.echo(text, err=err)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _NotPrintedError(
                f"the result could not be printed: {error.strerror or error}."
            ) from error


def _reason(error: VeraConvertError, whose: Mapping[str, str | None] | None = None) -> str:
    """Return the one line that says why a command failed.

    Of several defects it names the first and how to see the others, if `whose` has the adapter and
    no note says that they are those of something else.
    """
    if not isinstance(error, CheckpointError) or len(error.findings) == 1:
        return str(error)
    more = and_more(len(error.findings) - 1).lstrip()
    if whose and whose.get("adapter") and OF_MERGED not in getattr(error, "__notes__", ()):
        more += f": {_validate_command(whose)}"
    return f"{error} ({more})"


def _validate_command(whose: Mapping[str, str | None]) -> str:
    words = ["vera-convert", "validate"]
    for name, option in _WHOSE.items():
        value = whose.get(name)
        words += [*filter(None, [option]), value] if value else []
    return printable_whole(shlex.join(words))


def main(arguments: list[str] | None = None) -> None:
    """Run the program and exit with the status that the contract gives to its outcome."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.getLogger("vera_convert").addHandler(_WARNING_LINES)
    gc.set_threshold(100_000)  # a header is many small records that live to the end
    if isinstance(sys.stdout, io.TextIOWrapper):  # as stderr has it: a name can be Chinese
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with signals_raise():
            _leave(_run(arguments))
    except Interrupted as stopped:
        _interrupted(stopped, stopped.status, arguments)
    except KeyboardInterrupt as stopped:
        _interrupted(stopped, 130, arguments)


class _WarningLines(logging.Handler):
    """Shows what the library logs as warnings like any other."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(f"warning: {printable(record.getMessage())}", err=True)


_WARNING_LINES = _WarningLines()  # one alone, however often `main` is called


_WRITES_NOTHING = frozenset(("info", "validate", "verify", "count"))
"""Commands without an OUT, of which no interruption can leave anything."""


def _interrupted(stopped: BaseException, status: int, arguments: Sequence[str]) -> None:
    """Say that a command was stopped; a merge whose work is kept has said so."""
    is_kept = "vera_convert.merging.job" in sys.modules and _is_kept(stopped)
    writes = not is_kept and not _WRITES_NOTHING.intersection(arguments[:1])
    _say(f"error: interrupted{'; no output is left' if writes else ''}.", err=True)
    _leave(status)


def _run(arguments: list[str]) -> int:
    """Run the program and return its exit status; nothing but an interruption gets out.

    Not by way of click's own `main`, which takes any signal for SIGINT.
    """
    if not arguments:
        _say(program.get_help(click.Context(program, info_name="vera-convert")), err=True)
        return UsageError.status
    whose: dict[str, str | None] = {}
    try:
        with program.make_context("vera-convert", [*arguments], obj=arguments) as context:
            try:
                program.invoke(context)
            finally:
                whose = {name: context.meta.get(f"vera_convert.{name}") for name in _WHOSE}
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except Exception as error:  # noqa: BLE001 -- the last one that can keep a traceback from users
        stopped = interruption() or error.__cause__
        if isinstance(stopped, Interrupted | KeyboardInterrupt):  # caught on its way by a library
            raise stopped from None
        _show_traceback(arguments)
        return _refuse(_explained(error), arguments, whose)
    return 0


def _explained(error: Exception) -> VeraConvertError:
    """Return a failure of whatever kind as one of ours."""
    if isinstance(error, VeraConvertError):
        return error
    if isinstance(error, click.ClickException):
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = f" See {context.command_path} --help." if context else ""
        # Letter by letter: nothing of it is to be cut.
        message = " ".join(error.format_message().split())
        end = "" if message.endswith((".", "?", "!")) else "."
        return UsageError("".join(map(printable, message)) + end + hint)
    if isinstance(error, MemoryError):
        return SurroundingsError("there is not enough memory for this.")
    if isinstance(error, OSError):
        return SurroundingsError(printable(redacted(str(error))))
    return SurroundingsError(
        f"this is a mistake of vera-convert itself, please report it with what --debug shows: "
        f"{type(error).__name__}: {printable(redacted(str(error)))}"
    )


def _refuse(error: VeraConvertError, arguments: list[str], whose: Mapping[str, str | None]) -> int:
    """Say why a command failed and return the status that stands for it."""
    if "--json" in arguments:
        from vera_convert.formats.shared import error_document

        with suppress(_NotPrintedError):
            _print_document(error_document(error))
    _say(f"error: {_reason(error, whose)}", err=True)
    return error.status


def _show_traceback(arguments: list[str]) -> None:
    if "--debug" in arguments:
        import traceback

        _say(redacted(traceback.format_exc().rstrip("\n"), _token_of(arguments)), err=True)


def _token_of(arguments: list[str]) -> str | None:
    """Return the value of --token, however it is written."""
    for argument, after in zip(arguments, [*arguments[1:], None], strict=True):
        if argument == "--token":
            return after
        if argument.startswith("--token="):
            return argument.removeprefix("--token=")
    return None


def _leave(status: int) -> None:
    """Flush and exit; a reader that went away does not undo what was written."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        # Python would flush again at exit and turn its failure into a status of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(status)
