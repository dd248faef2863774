"""A command of the program, made of a function and of the options that the function takes."""

from __future__ import annotations

import inspect
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import click

from vera_convert import rules
from vera_convert.cli.help import EXIT_STATUSES, Argument, Command
from vera_convert.cli.options import CommonOptions, parameters
from vera_convert.cli.output import progress_of_parts
from vera_convert.cli.values import name_of
from vera_convert.errors import CheckpointError, ConflictError, ParameterError, SurroundingsError
from vera_convert.files.file_names import CONFIG_NAME

NAMED_AGAIN = {"adapter": "", "revision": "--revision", "base": "--base"}
"""The values that an error repeats in a `validate` command, each with the flag of `validate`."""

ADAPTER_HELP = "A folder, a file of the folder, or a repo: org/name[@revision][/subfolder]."
OUT_FOLDER = "A new folder to write; with --force, an earlier output is replaced."


def adapter_argument(name: str = "adapter", **attributes: Any) -> click.Argument:
    """Return the argument ADAPTER."""
    return Argument(name, type=click.Path(readable=False), text=ADAPTER_HELP, **attributes)


def out_argument(text: str) -> click.Argument:
    """Return the argument OUT, with a help text."""
    return Argument("out", type=click.Path(path_type=Path), text=text)


def command(
    options: type[CommonOptions] | None, *arguments: click.Argument
) -> Callable[[Callable[..., None]], Callable[[], Command]]:
    """Return a decorator that makes a command of a function, when the command is first asked for.

    The help is the docstring of the function, which ends with examples.

    Args:
        options: the class of options that the function takes after the arguments, if any.
        arguments: the arguments, in order.
    """

    def decorate(function: Callable[..., None]) -> Callable[[], Command]:
        def call(**parsed: Any) -> None:
            given = {str(each.name): parsed.pop(str(each.name)) for each in arguments}
            if options is None:
                function(*given.values())
            else:
                _call(function, given, options(**parsed))

        @cache
        def made() -> Command:
            text, _, examples = (inspect.getdoc(function) or "").partition("\n\nExamples:\n")
            return Command(
                function.__name__.replace("_", "-"),
                callback=call,
                params=[*arguments, *(parameters(options) if options is not None else ())],
                help=text,
                short_help=text.partition("\n")[0].removesuffix("."),
                examples=textwrap.dedent(examples).splitlines(),
                statuses=EXIT_STATUSES if options is not None else (),
            )

        return made

    return decorate


def _call(function: Callable[..., None], given: Mapping[str, Any], options: CommonOptions) -> None:
    """Call the function of the running command with arguments and options."""
    context = click.get_current_context()
    named = {**vars(options), **given}
    context.meta.update({f"vera_convert.{name}": named.get(name) for name in NAMED_AGAIN})
    if options.verbose:
        import logging

        logging.getLogger("vera_convert").setLevel(logging.INFO)
    with _naming_flags(context.command), _naming_order(given, options), progress_of_parts(options):
        function(*given.values(), options)


@contextmanager
def _naming_flags(command: click.Command) -> Iterator[None]:
    """Let an error of the library name the flag, where the library names a parameter."""
    try:
        yield
    except ParameterError as error:
        name = _flags(command).get(error.parameter, error.parameter)
        error.args = (f"{name} {error.reason}",)
        raise
    except ConflictError as error:
        flags = _flags(command)
        error.args = (error.sentence.format(*(flags.get(n, n) for n in error.parameters)),)
        raise


@contextmanager
def _naming_order(given: Mapping[str, Any], options: CommonOptions) -> Iterator[None]:
    """Name the order of the arguments if an adapter lies at OUT or --base, and not at ADAPTER."""
    try:
        yield
    except CheckpointError as error:
        base = getattr(options, "base", None)
        if error.findings[0].rule is rules.MODEL_FOLDER and base and _holds_adapter(base):
            error.args = (f"{error} An adapter lies at --base: give ADAPTER, then --base MODEL.",)
        raise
    except SurroundingsError as error:
        adapter, out = given.get("adapter"), given.get("out")
        if adapter and out and not os.path.lexists(adapter) and _holds_adapter(out):
            error.args = (f"{error} An adapter lies at OUT: give ADAPTER first, then OUT.",)
        raise


def _holds_adapter(folder: str | Path) -> bool:
    return os.path.isfile(os.path.join(folder, CONFIG_NAME))  # noqa: PTH113, PTH118 -- Path's raise


def flags_of(names: Iterable[str]) -> str:
    """Return the flags of options of the running command, as a list for a message."""
    flags = _flags(click.get_current_context().command)
    return ", ".join(flags[name] for name in names)


def _flags(command: click.Command) -> dict[str, str]:
    return {str(each.name): name_of(each) for each in command.params}
