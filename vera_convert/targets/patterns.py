"""Evaluate a stranger's regular expressions under limits of time and memory.

Some expressions would take years, and Python cannot interrupt a match. A separate process evaluates
the expressions and ends itself, even if the parent has ended. The limit is CPU time if the system
counts CPU time, so that a busy machine refuses no good expression.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import NamedTuple

from vera_convert import rules
from vera_convert.errors import CheckpointError, SurroundingsError, refuse
from vera_convert.files.file_names import CONFIG_NAME
from vera_convert.text import printable

LIMIT_SECONDS = 2
"""CPU time of all expressions together; on Windows, time."""
MOST_MATCHES = 4_000_000
"""The limit of pairs of an expression and a name; each pair takes memory in the answer."""
_MOST_MEMORY = 1 << 30
_WALL_SECONDS = 120  # for a process that gets little of a busy machine


class Pattern(NamedTuple):
    """A regular expression from a config.

    Attributes:
        field: the field of the config, for messages.
        text: the expression, for Python's ``re``.
        full: whether the expression must match the whole name; else the start of the name.
        group: the group to return.
    """

    field: str
    text: str
    full: bool = False
    group: int | str = 0


# The system's timer ends the process inside a match too, as does the watchdog of faulthandler,
# which is a thread without Python.
_CHILD = f"""
import faulthandler, json, re, signal, sys
sys.stdout.write("started ")
sys.stdout.flush()
names, patterns = json.loads(sys.stdin.buffer.read())
if hasattr(signal, "setitimer"):
    import resource
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, {LIMIT_SECONDS})
    faulthandler.dump_traceback_later({_WALL_SECONDS}, exit=True)
    try:
        resource.setrlimit(resource.RLIMIT_AS, ({_MOST_MEMORY}, {_MOST_MEMORY}))
    except (OSError, ValueError):
        pass
else:
    faulthandler.dump_traceback_later({LIMIT_SECONDS}, exit=True)
found = []
for text, full, group in patterns:
    try:
        pattern = re.compile(text)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        found.append(str(error) or type(error).__name__)
        continue
    hits = map(pattern.fullmatch if full else pattern.match, names)
    found.append([None if hit is None else hit[group] or "" for hit in hits])
sys.stdout.write(json.dumps(found))
"""


def search(patterns: Sequence[Pattern], names: Sequence[str]) -> list[list[str | None]]:
    """Return the text of each pattern's group in each name; None if the pattern does not match.

    A group outside the match gives the empty text.

    Raises:
        CheckpointError: a text is no regular expression, or all patterns together took more than
            two seconds, or there are more than `MOST_MATCHES` pairs of an expression and a name.
        SurroundingsError: the process did not start.
    """
    if not patterns or not names:
        return [[None] * len(names) for _ in patterns]
    if len(patterns) * len(names) > MOST_MATCHES:
        reason = f"{len(patterns):,} expressions would be compared with {len(names):,} names."
        raise CheckpointError(rules.TARGET_REGEX_SLOW.at(CONFIG_NAME, reason))
    asked = [(pattern.text, pattern.full, pattern.group) for pattern in patterns]
    started, _, answer = _run_child(json.dumps([names, asked])).partition(" ")
    if not started:
        raise SurroundingsError(
            "Python could not be started to evaluate a regular expression; "
            f"check that {printable(sys.executable or 'sys.executable')} runs."
        )
    if not answer:
        raise CheckpointError.of(
            rules.TARGET_REGEX_SLOW.at(
                CONFIG_NAME,
                f'{pattern.field} holds "{printable(pattern.text)}", which took more than '
                f"{LIMIT_SECONDS} seconds on {len(names)} names.",
            )
            for pattern in patterns
        )
    found: list[list[str | None] | str] = json.loads(answer)
    invalid = [
        rules.TARGET_REGEX_INVALID.at(
            CONFIG_NAME, f'{pattern.field} holds "{printable(pattern.text)}": {printable(result)}.'
        )
        for pattern, result in zip(patterns, found, strict=True)
        if isinstance(result, str)
    ]
    refuse(invalid)
    return [result for result in found if not isinstance(result, str)]


def _run_child(request: str) -> str:
    """Return the output of the process: empty, "started ", or "started " and the answer."""
    import subprocess  # most adapters list names, and need no process

    try:
        done = subprocess.run(  # noqa: S603 - our own text, run by this very Python
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=request.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_WALL_SECONDS + LIMIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return (error.stdout or b"").decode()
    except OSError:
        return ""
    return done.stdout.decode()
