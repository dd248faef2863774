"""Time starts of vera-convert beside a lower bound: Python that imports only NumPy and click.

Python keeps compiled modules in a temporary folder, whatever PYTHONDONTWRITEBYTECODE says.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ADAPTER = Path(__file__).parents[1] / "tests" / "data" / "minilm-vera" / "save_projection_true"
COMMANDS = {
    "python -c 'import numpy, click'": ("-c", "import numpy, click"),
    "vera-convert --help": ("-m", "vera_convert", "--help"),
    "vera-convert validate ADAPTER": ("-m", "vera_convert", "validate", str(ADAPTER)),
    "python -c 'import vera_convert'": ("-c", "import vera_convert"),
}


def seconds(arguments: tuple[str, ...]) -> float:
    """Run Python once with `arguments` and return the seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Run the commands in turn, so that other load on the machine affects all commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as compiled:
        os.environ["PYTHONPYCACHEPREFIX"] = compiled
        compare(rounds)


def compare(rounds: int) -> None:
    """Run each command this number of times, and print the medians."""
    for arguments in COMMANDS.values():
        seconds(arguments)  # compiles modules that have no .pyc file yet
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))

    bare = times[next(iter(COMMANDS))]
    for name, taken in times.items():
        ratio = statistics.median(mine / least for mine, least in zip(taken, bare, strict=True))
        print(f"{name:34} {statistics.median(taken) * 1000:6.0f} ms   {ratio:4.2f} x")


if __name__ == "__main__":
    main()
