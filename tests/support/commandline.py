"""Run the program in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import click

from vera_convert.cli.app import program

COMMANDS = {
    name: command
    for name in program.list_commands(click.Context(program))
    if (command := program.get_command(click.Context(program), name)) is not None
}
"""Every command of the program by name."""


class Ended(NamedTuple):
    """The exit status and the output of a run."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ended]
