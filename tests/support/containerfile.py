"""`docs/Containerfile` as its instructions; a continued line is one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).parents[2] / "docs" / "Containerfile"


class Instruction(NamedTuple):
    """Such as ``COPY`` and its words, options left as they are."""

    name: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def stages() -> list[list[Instruction]]:
    """Return the instructions of each stage; the first of them is its ``FROM``."""
    text = PATH.read_text(encoding="utf-8").replace("\\\n", " ")
    found: list[list[Instruction]] = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            instruction = Instruction(*line.split(maxsplit=1))
            if instruction.name == "FROM":
                found.append([])
            found[-1].append(instruction)
    return found
