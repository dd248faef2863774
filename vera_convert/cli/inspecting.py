"""The commands that write no adapter and no model: info, validate, count."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vera_convert.arguments import path
from vera_convert.cli.command import adapter_argument, command
from vera_convert.cli.options import (
    CHECK,
    INPUT,
    OUTPUT,
    AdapterOptions,
    CommonOptions,
    ProjectionChoice,
    flag,
    option,
)
from vera_convert.cli.output import columns, in_color, print_document, say, show, tell
from vera_convert.cli.refusals import reason
from vera_convert.cli.values import CODES, NAMES, Choice
from vera_convert.errors import UsageError
from vera_convert.formats.reports import RENDERERS, report_text
from vera_convert.text import printable

if TYPE_CHECKING:
    from vera_convert.validation.result import Validation


class InfoOptions(AdapterOptions, ProjectionChoice):
    """Options of `info`."""


@command(InfoOptions, adapter_argument())
def info(adapter: str, options: InfoOptions) -> None:
    """Show an adapter's rank, targets, projections and sizes.

    Examples:
        vera-convert info ./adapter
        vera-convert info org/adapter@v1 --base ./model --json
    """
    from vera_convert.formats.results import info_text
    from vera_convert.summary import info as summarize

    show(options, options.call(summarize, adapter), info_text)


class ValidateOptions(AdapterOptions):
    """Options of `validate`.

    Attributes:
        base: Check the adapters against this model, a folder or a repo on the Hub.
        recursive: Check every adapter in the folders given and in their subfolders.
        deep: Download the weights of repos too, and regenerate A and B.
        select: Report these codes only; V2 stands for all codes that begin with V2.
        ignore: Leave out these codes, and the codes that pyproject.toml ignores.
        fail_on: The least severity that makes the exit status 1: error (default), warning.
        rules: List every rule, and check nothing.
        explain: Explain a rule, and check nothing.
        form: Format of the report: {first} (default), {others}.
        output: Write the report to FILE, and print the text for people.
    """

    base: str | None = option(INPUT, "MODEL")
    recursive: bool = flag(INPUT)
    deep: bool = flag(CHECK)
    select: tuple[tuple[str, ...], ...] = option(CHECK, "CODE[,CODE]", type=CODES)
    ignore: tuple[tuple[str, ...], ...] = option(CHECK, "CODE[,CODE]", type=CODES)
    fail_on: str | None = option(CHECK, "SEVERITY", type=Choice(("error", "warning")))
    rules: bool = flag(CHECK)
    explain: tuple[str, ...] | None = option(CHECK, "CODE", type=CODES)
    form: str | None = option(OUTPUT, "FORMAT", "--format", type=Choice((*RENDERERS,)))
    output: Path | None = option(OUTPUT, "FILE")


@command(ValidateOptions, adapter_argument("adapters", nargs=-1, metavar="ADAPTER..."))
def validate(adapters: tuple[str, ...], options: ValidateOptions) -> None:
    """Find every error in adapters, and tell how to repair each.

    For a repo on the Hub, only the config and the header of the weights are downloaded.

    [tool.vera-convert.validate] in pyproject.toml can hold select, ignore and fail-on too.

    Examples:
        vera-convert validate ./adapter --base ./model
        vera-convert validate org/adapter --deep
        vera-convert validate ./adapters --recursive --format sarif --output report.sarif
        vera-convert validate --explain V403
    """
    if options.rules or options.explain:
        _show_rules(adapters, options)
        return
    if not adapters:
        raise UsageError("name an ADAPTER to validate, or give --rules or --explain CODE.")
    if options.as_json and options.form not in (None, "json") and not options.output:
        raise UsageError("--json and another --format both write to stdout: give --output.")
    result = _validated(adapters, options)
    for checked in result.adapters:
        if checked.failure is not None:
            why = reason(checked.failure)
            tell("error", why if checked.label in why else f"{checked.label}: {why}")
    _report(result, options)  # the text omits the failures above
    if result.status:
        raise click.exceptions.Exit(result.status)


def _validated(adapters: tuple[str, ...], options: ValidateOptions) -> Validation:
    from vera_convert.rules import Severity
    from vera_convert.validation.selection import read_settings
    from vera_convert.validation.validate import validate as run

    settings = read_settings(Path.cwd())
    select = [code for codes in options.select for code in codes]
    ignore = [code for codes in options.ignore for code in codes]
    return options.call(
        run,
        adapters,
        select=select or settings.select,
        ignore=[*settings.ignore, *ignore],
        fail_on=options.fail_on or settings.fail_on or Severity.ERROR,
    )


def _report(result: Validation, options: ValidateOptions) -> None:
    """Print the report, or write the report and print the text for people."""
    import sys

    from vera_convert.formats.validation import validation_text

    form = options.form or ("json" if options.as_json else "text")
    if form == "github":
        _append_summary(result)
    if options.output is not None:
        _write_report(options.output, report_text(result, form), result)
        form = "json" if options.as_json else "text"
    if form != "text":
        say(report_text(result, form))
    elif options.quiet:
        for checked in result.adapters:
            for finding in checked.findings:
                if finding.severity != "note":
                    tell(finding.severity, f"{checked.label}: {finding}")
    else:
        say(
            validation_text(
                result,
                color=in_color(sys.stdout),
                width=columns(),
                failures_said=options.output is None,
            )
        )


def _write_report(out: Path, text: str, result: Validation) -> None:
    """Write a report completely or not at all; a file of the same name is replaced."""
    from vera_convert.publish.publishing import Output

    out = path("output", out)
    shown = printable(str(out))
    if shown == "-":
        raise UsageError("leave --output out: the report then goes to stdout.")
    if os.path.lexists(out) and (out.is_symlink() or not out.is_file()):
        raise UsageError(f"{shown} is a folder, a link or a device: give the name of a file.")
    inputs = [Path(checked.path) for checked in result.adapters if checked.path is not None]
    output = Output(out, lambda _: True, force=True, inputs=inputs, is_folder=False)
    with output.staged() as staging:
        staging.write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace", newline="\n")


def _append_summary(result: Validation) -> None:
    """Add to the summary of a job on GitHub, if there is one; a failure is a warning."""
    from vera_convert.formats.github import job_summary

    name = os.environ.get("GITHUB_STEP_SUMMARY")
    if not name:
        return
    try:
        with Path(name).open("a", encoding="ascii", newline="\n") as summary:
            summary.write(job_summary(result))
    except (OSError, ValueError) as error:
        tell("warning", f"no summary was written: {printable(str(error))}")


def _show_rules(adapters: tuple[str, ...], options: ValidateOptions) -> None:
    from vera_convert.formats.catalog import explanation, rules_document, rules_text
    from vera_convert.rules import CATALOG
    from vera_convert.validation.selection import check_codes

    if adapters or (options.rules and options.explain):
        raise UsageError("--rules and --explain each stand alone, without an ADAPTER.")
    if options.form not in (None, "text", "json") or options.output is not None:
        raise UsageError("--rules and --explain print text, or JSON with --json, to stdout.")
    selected = tuple(code for codes in options.select for code in codes)
    codes = options.explain or selected or ("",)
    if codes != ("",):
        check_codes(codes)
    rules = [rule for rule in CATALOG.values() if rule.code.startswith(codes)]
    if options.as_json or options.form == "json":
        print_document(rules_document(rules))
    else:
        say(explanation(rules, width=columns()) if options.explain else rules_text(rules))


class CountOptions(CommonOptions):
    """Options of `count`.

    Attributes:
        config: The config.json of a model.
        base: A model, a folder or a repo on the Hub.
        base_revision: Branch, tag or commit of the model's repo.
        rank: The rank of the adapter.
        targets: Layers to adapt, as in target_modules, or all-linear (default: PEFT's default
            targets for the model).
    """

    config: Path | None = option(INPUT, "FILE")
    base: str | None = option(INPUT, "MODEL")
    base_revision: str | None = option(INPUT, "REV")
    rank: int = option(INPUT, "R")
    targets: tuple[tuple[str, ...], ...] = option(INPUT, "NAME[,NAME]", "--target", type=NAMES)


@command(CountOptions)
def count(options: CountOptions) -> None:
    """Count the parameters and bytes of a planned adapter.

    The numbers of a LoRA of the same rank are shown for comparison. --base or --config gives the
    model; only the headers of the weights are read.

    Examples:
        vera-convert count --base org/model --rank 256
        vera-convert count --config ./config.json --rank 64 --target q_proj,v_proj
    """
    from vera_convert.counting import count as run
    from vera_convert.counting import layers_of_base, layers_of_config_file
    from vera_convert.formats.results import count_text

    if options.base is not None and options.config is None:
        model = layers_of_base(
            options.base, revision=options.base_revision, access=options.access()
        )
    elif options.config is not None and options.base is None:
        model = layers_of_config_file(options.config)
    else:
        raise UsageError("give either --base MODEL or --config FILE.")
    targets = [name for names in options.targets for name in names]
    result = run(model, rank=options.rank, targets=targets)
    show(options, result, count_text)
