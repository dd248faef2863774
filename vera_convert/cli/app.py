"""The program: the commands, the start, and the exit status."""

from __future__ import annotations

import gc
import io
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from vera_convert._version import __version__
from vera_convert.cli.command import NAMED_AGAIN
from vera_convert.cli.completion import completed
from vera_convert.cli.help import Context, Formatter
from vera_convert.cli.output import WRITES_NOTHING, in_color, say, tell
from vera_convert.cli.refusals import explained, refuse, show_traceback
from vera_convert.cli.values import did_you_mean
from vera_convert.errors import UsageError, is_resumable
from vera_convert.publish.signals import Interrupted, interruption, signals_raise
from vera_convert.text import printable

SECTIONS = {
    "Inspect": ("inspecting", ("info", "validate", "count")),
    "Convert": ("converting", ("strip", "embed", "migrate", "to-lora", "regenerate")),
    "Merge": ("merging", ("merge", "verify")),
    "Shell": ("completion", ("completion",)),
}
"""The sections of the help in order, each with its commands and their module."""

MODULES = {name: module for module, names in SECTIONS.values() for name in names}


class Program(click.Group):
    """The program, whose commands are loaded when they are asked for."""

    context_class = Context

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return [*MODULES]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command; None for an unknown name."""
        return _command(cmd_name) if cmd_name in MODULES else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that a user names; for an unknown name, offer the nearest."""
        if args[0] not in MODULES and not args[0].startswith("-") and not ctx.resilient_parsing:
            ctx.fail(f"No such command {args[0]!r}.{did_you_mean(args[0], MODULES)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, each section below its title."""
        assert isinstance(formatter, Formatter)
        sections = {
            title: [(name, _command(name).short_help or "") for name in names]
            for title, (_, names) in SECTIONS.items()
        }
        formatter.write_sections(sections)


def _command(name: str) -> click.Command:
    module = import_module(f"vera_convert.cli.{MODULES[name]}")
    made: click.Command = getattr(module, name.replace("-", "_"))()
    return made


program = click.version_option(
    __version__, "-V", "--version", prog_name="vera-convert", message="%(prog)s %(version)s"
)(
    Program(
        "vera-convert",
        help="""Validate, convert, merge and verify VeRA adapters of PEFT, bit for bit.

        `vera-convert COMMAND --help` shows the options, examples and exit statuses of a command.
        """,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
)


def main(arguments: list[str] | None = None) -> None:
    """Run the program and exit with the status of its outcome."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logger = logging.getLogger("vera_convert")
    logger.addHandler(_LOG_LINES)
    logger.setLevel(logging.WARNING)
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


class _LogLines(logging.Handler):
    """Prints warnings of the library like any other, and the lines of --verbose as they are."""

    def emit(self, record: logging.LogRecord) -> None:
        text = printable(record.getMessage())
        if record.levelno >= logging.WARNING:
            tell("warning", text)
        else:
            say(text, err=True)


_LOG_LINES = _LogLines()  # one alone, however often `main` is called


def _interrupted(stopped: BaseException, status: int, arguments: Sequence[str]) -> None:
    """Say that a command was stopped; a merge whose work is kept has said so."""
    kept = is_resumable(stopped)
    writes = not kept and not WRITES_NOTHING.intersection(arguments[:1])
    tell("error", f"interrupted{'; no output is left' if writes else ''}.")
    _leave(status)


def _run(arguments: list[str]) -> int:
    """Run the program and return its exit status; only an interruption is raised.

    Not by way of click's own `main`, which takes any signal for SIGINT.
    """
    if completed(program):
        return 0
    if not arguments:
        settings = program.context_settings
        bare = program.context_class(program, info_name="vera-convert", **settings)
        say(program.get_help(bare), err=True)
        return UsageError.status
    named: dict[str, str | None] = {}
    try:
        with program.make_context(
            "vera-convert", [*arguments], obj=arguments, color=in_color(sys.stdout)
        ) as context:
            try:
                program.invoke(context)
            finally:
                named = {name: context.meta.get(f"vera_convert.{name}") for name in NAMED_AGAIN}
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except Exception as error:  # noqa: BLE001 -- the last place to keep a traceback from users
        stopped = interruption() or error.__cause__
        if isinstance(stopped, Interrupted | KeyboardInterrupt):  # caught on its way by a library
            raise stopped from None
        show_traceback(arguments)
        return refuse(explained(error), arguments, named)
    return 0


def _leave(status: int) -> None:
    """Flush and exit; a closed pipe leaves the exit status as it is."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        # Python would flush again at exit, fail again, and end with another exit status.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(status)
