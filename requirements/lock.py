"""Write the pinned requirements of this folder: the newest versions, with hashes (`make lock`).

- `test.txt`: all packages of `make test` except torch, whose version is the first argument;
- `demo.txt`: the packages of `make demo`, a part of these;
- `ci.txt` and `engines.txt`: the packages of `make test-ci` and `make test-engines`, in the same
  versions;
- `oldest.txt`: the lowest versions in pyproject.toml, and the newest test tools;
- `floor.txt`: the same with the lowest versions of the extra `torch`, whose torch is the second
  argument, and with the newest PEFT, which only the tests use;
- `lock.txt`: the resolver.

Each pin is valid for every supported system and Python.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent


def resolve(output: str, *arguments: str, stdin: str = "") -> None:
    """Resolve the requirements in `arguments`, and write the pins to `output` in this folder."""
    command = [
        *(sys.executable, "-m", "uv", "pip", "compile", *arguments),
        *("--config-file", str(HERE / "uv.toml"), "--output-file", str(HERE / output)),
        *("--universal", "--python-version", "3.11", "--upgrade", "--generate-hashes"),
        *("--no-emit-package", "torch", "--no-annotate", "--quiet"),
        *("--custom-compile-command", "make lock"),
    ]
    subprocess.run(command, cwd=ROOT, input=stdin, text=True, check=True, stdout=subprocess.DEVNULL)
    print(f"requirements/{output}: {(HERE / output).read_text().count('==')} pins")


def main(torch: str, lowest_torch: str) -> None:
    """Write all files; a file that must agree with an earlier file is constrained by its pins."""
    project = "pyproject.toml"
    same_as_test = ("--constraint", str(HERE / "test.txt"))
    lowest = ("--constraint", str(HERE / "oldest.txt"))
    floor = ("--extra", "torch", "--constraint", str(HERE / "floor.txt"))

    resolve("test.txt", project, "-", "--extra", "dev", "--group", "test", stdin=f"torch=={torch}")
    resolve("demo.txt", project, "--group", "demo", *same_as_test)
    resolve("ci.txt", project, "--group", "ci", *same_as_test)
    engines = ("--group", "engines", "--extra", "torch", *same_as_test)
    resolve("engines.txt", project, "-", *engines, stdin=f"torch=={torch}")
    resolve("oldest.txt", project, "--resolution", "lowest-direct")
    resolve("oldest.txt", project, "--group", "test", *lowest)
    with_torch = f"torch=={lowest_torch}"
    resolve(
        "floor.txt", project, "-", *floor[:2], "--resolution", "lowest-direct", stdin=with_torch
    )
    resolve("floor.txt", project, "-", *floor, "--group", "test", stdin=f"{with_torch}\npeft")
    resolve("lock.txt", "-", stdin="uv")


if __name__ == "__main__":
    main(*sys.argv[1:])
