"""Read the lines of text that both models are run on."""

from __future__ import annotations

import codecs
from itertools import islice
from pathlib import Path

from vera_convert.errors import SurroundingsError, UsageError
from vera_convert.files.reading import open_local
from vera_convert.text import printable

_MOST_BYTES = 1 << 20
_MOST_LETTERS = 4096
"""How many bytes of the file, and how many letters of each line, are read."""


def text_lines(path: Path, count: int) -> tuple[str, ...]:
    """Return the first lines of a UTF-8 text that are not empty.

    Args:
        path: the text. Long lines and long files are cut.
        count: how many lines to return at most.

    Raises:
        UsageError: the file is not UTF-8, or has no line with text.
        SurroundingsError: the file is missing or cannot be read.
    """
    place = printable(str(path))
    if not path.is_file():
        raise SurroundingsError(f"--text {place}: there is no such file.")
    with open_local(path) as file:
        raw = file.read_at(0, min(file.size, _MOST_BYTES))
        is_complete = file.size <= _MOST_BYTES
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(raw, final=is_complete)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--text {place} is not UTF-8: {error.reason} at byte {error.start}."
        ) from error
    stripped = (line.strip()[:_MOST_LETTERS] for line in text.splitlines())
    lines = tuple(islice((line for line in stripped if line), count))
    if not lines:
        raise UsageError(f"--text {place} has no line with text.")
    return lines
