"""Why a command failed: one line for people, a document for programs, and an exit status."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress

import click

from vera_convert.cli.command import NAMED_AGAIN
from vera_convert.cli.output import NotPrintedError, print_document, say, shown_command, tell
from vera_convert.cli.values import did_you_mean
from vera_convert.errors import (
    READING_REMEDY,
    CheckpointError,
    SurroundingsError,
    UsageError,
    VeraConvertError,
)
from vera_convert.hub.redaction import redacted
from vera_convert.text import and_more, printable, printable_whole


def reason(error: VeraConvertError, named: Mapping[str, str | None] | None = None) -> str:
    """Return the line that says why a command failed.

    If there are several errors, the line names the first, and the `validate` command or the option
    that shows the others.
    """
    if not isinstance(error, CheckpointError) or len(error.findings) == 1:
        return str(error)
    if not error.validate_shows_all:
        return with_number_of_others(error, len(error.findings))
    more = and_more(len(error.findings) - 1).lstrip()
    if named and error.adapter:
        named = {**named, "adapter": error.adapter, "revision": None}
    if named and named.get("adapter"):
        more += f": {_validate_command(named)}"
    return f"{error} ({more})"


def with_number_of_others(first: object, number: int) -> str:
    """Return the first of several errors; with the number of the others, --json is named."""
    more = and_more(number - 1).lstrip()
    return f"{first} ({more}: --json lists all)" if more else str(first)


def _validate_command(named: Mapping[str, str | None]) -> str:
    words = ["validate"]
    for name, flag in NAMED_AGAIN.items():
        value = named.get(name)
        words += [*filter(None, [flag]), value] if value else []
    return shown_command(words)


def explained(error: Exception) -> VeraConvertError:
    """Return any failure as one of the package's own errors."""
    if isinstance(error, VeraConvertError):
        return error
    if isinstance(error, click.ClickException):
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = f" See `{context.command_path} --help`." if context else ""
        if context and "unexpected extra argument" in str(error) and _takes_base(context.command):
            hint = f" A base is given with --base.{hint}"
        message = " ".join(_message(error).split())
        end = "" if message.endswith((".", "?", "!")) else "."
        return UsageError(printable_whole(message) + end + hint)
    if isinstance(error, MemoryError):
        return SurroundingsError("there is not enough memory for this.")
    if isinstance(error, ImportError):
        return SurroundingsError(
            f"a library could not be loaded: {printable(str(error))}. The memory may be too small "
            "(ulimit -v), or the installation is broken: then install vera-convert again."
        )
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return SurroundingsError(
            "no thread could be started: raise the limit on memory (ulimit -v) or processes "
            "(ulimit -u)."
        )
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        said = (error.strerror or str(error)).removesuffix(".")
        remedy = READING_REMEDY if isinstance(error, PermissionError) else ""
        return SurroundingsError(printable(redacted(f"{place}{said}.")), remedy)
    return SurroundingsError(
        f"this is a bug in vera-convert; please report it with the output of --debug: "
        f"{type(error).__name__}: {printable(redacted(str(error)))}"
    )


def _takes_base(command: click.Command) -> bool:
    return any("--base" in each.opts for each in command.params)


def _message(error: click.ClickException) -> str:
    """Return the message of an error of click, with the nearest name alone of several."""
    if not isinstance(error, click.NoSuchOption) or not error.possibilities:
        return error.format_message()
    near = did_you_mean(error.option_name, sorted(error.possibilities))
    return f"No such option {error.option_name!r}.{near}"


def refuse(error: VeraConvertError, arguments: list[str], named: Mapping[str, str | None]) -> int:
    """Print why a command failed, and return the exit status."""
    if "--json" in arguments:
        from vera_convert.formats.document import result_document

        with suppress(NotPrintedError):
            print_document(result_document(error))
    tell("error", reason(error, named))
    return error.status


def show_traceback(arguments: list[str]) -> None:
    """Print the traceback of the current exception, if --debug is given."""
    if "--debug" in arguments:
        import traceback

        _, token = without_token(arguments)
        say(redacted(traceback.format_exc().rstrip("\n"), token), err=True)


def without_token(arguments: Iterable[str]) -> tuple[list[str], str | None]:
    """Return the words of a command line except the secret token, and the token."""
    words = iter(arguments)
    kept, token = [], None
    for word in words:
        if word == "--token":
            token = next(words, None)
        elif word.startswith("--token="):
            token = word.removeprefix("--token=")
        else:
            kept.append(word)
    return kept, token
