"""Completion of commands, options and values in a shell."""

from __future__ import annotations

import os

import click
import cloup
from click.shell_completion import get_completion_class, shell_complete

from vera_convert.cli.command import Command
from vera_convert.cli.output import say
from vera_convert.cli.values import Choice

PROGRAM = "vera-convert"
VARIABLE = "_VERA_CONVERT_COMPLETE"
"""A shell sets this environment variable when it asks for completions."""

SHELLS = ("bash", "zsh", "fish")


def completed(program: click.Group) -> bool:
    """Answer a shell that asks for completions; return whether a shell asked."""
    asked = os.environ.get(VARIABLE)
    if not asked:
        return False
    shell_complete(program, {}, PROGRAM, VARIABLE, asked)
    return True


def _print_script(shell: str) -> None:
    kind = get_completion_class(shell)
    assert kind is not None
    say(kind(click.Command(PROGRAM), {}, PROGRAM, VARIABLE).source())


completion = Command(
    "completion",
    callback=_print_script,
    params=[
        cloup.Argument(
            ["shell"], type=Choice(SHELLS), metavar="SHELL", help=f"{', '.join(SHELLS)}."
        )
    ],
    short_help="Print a script that completes commands in a shell",
    help="""Print a script that completes commands in a shell.

    With the script, the Tab key completes commands, options, values and paths. Add the line for
    your shell to the file named behind the #.""",
)
completion.examples = (
    'eval "$(vera-convert completion bash)"    # ~/.bashrc',
    'eval "$(vera-convert completion zsh)"     # ~/.zshrc, below compinit',
    "vera-convert completion fish | source     # ~/.config/fish/config.fish",
)
