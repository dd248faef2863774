"""Read `docs/Containerfile` as instructions; continued lines make one instruction."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).parents[2] / "docs" / "Containerfile"


class Instruction(NamedTuple):
    """An instruction such as ``COPY``, with its words; options stay words."""

    name: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def stages() -> list[list[Instruction]]:
    """Return the instructions of each stage; each stage begins with ``FROM``."""
    text = PATH.read_text(encoding="utf-8").replace("\\\n", " ")
    found: list[list[Instruction]] = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            instruction = Instruction(*line.split(maxsplit=1))
            if instruction.name == "FROM":
                found.append([])
            found[-1].append(instruction)
    return found
