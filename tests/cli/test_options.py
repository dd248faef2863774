"""The options of commands: each reaches the function of the library that a command calls."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
from commandline import COMMANDS

import vera_convert
from vera_convert import BaseOptions, LoraOptions, MergeOptions, VerifyOptions
from vera_convert.cli.options import CommonOptions, parameters

TAKERS: dict[str, tuple[Callable[..., Any], ...]] = {
    "info": (vera_convert.info,),
    "validate": (vera_convert.validate,),
    "strip": (vera_convert.strip,),
    "embed": (vera_convert.embed,),
    "migrate": (vera_convert.migrate, vera_convert.migrate_tree),
    "to-lora": (vera_convert.to_lora, LoraOptions),
    "regenerate": (vera_convert.regenerate, vera_convert.regenerate_for),
    "merge": (vera_convert.merge, MergeOptions),
    "verify": (vera_convert.verify, VerifyOptions),
}
"""The functions and the records that take the options of a command by the options' names."""

OF_THE_COMMAND_LINE = {
    "validate": {"rules", "explain", "form", "output"},
    "migrate": {"recursive"},
}
"""Options that a command reads itself."""

OTHER_NAMES = {"base_revision": "revision", "base_dtype": "dtype", "base_for": "places"}
"""The fields of `BaseOptions` with other names than the options."""


@pytest.mark.parametrize("command", TAKERS)
def test_every_option_is_a_parameter_of_the_library(command: str) -> None:
    takers = (*TAKERS[command], BaseOptions)
    known = {name for each in takers for name in inspect.signature(each).parameters}
    own = {*vars(CommonOptions), *OF_THE_COMMAND_LINE.get(command, ())}
    for parameter in COMMANDS[command].params:
        name = str(parameter.name)
        assert name in own or OTHER_NAMES.get(name, name) in known or name == "adapters", name


@pytest.mark.parametrize("indent", ["", "    "])
def test_every_option_has_a_help_whether_or_not_python_keeps_the_indents(
    indent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Since Python 3.13 the compiler removes the indents of docstrings."""
    for kind in CommonOptions.__mro__[:-1]:
        text = textwrap.indent(inspect.cleandoc(kind.__doc__ or ""), indent).strip()
        monkeypatch.setattr(kind, "__doc__", text)
    assert all(option.help for option in parameters(CommonOptions))
