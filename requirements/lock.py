"""Write the pinned requirements of this folder anew: newest versions, with hashes (`make lock`).

- `test.txt` is all that `make test` installs but torch, whose version is the argument;
- `demo.txt` is the part of it that `make demo` needs;
- `ci.txt` is what `make test-ci` needs, in the same versions;
- `engines.txt` is what `make test-engines` needs but torch, in the same versions;
- `oldest.txt` holds the lowest versions that pyproject.toml promises, with the newest test tools;
- `floor.txt` holds these with the lowest ones of the extra `torch`, whose torch is the second
  argument, and the newest PEFT: it is what the tests compare with, and nothing needs it;
- `lock.txt` holds the resolver itself.

Each pin holds for every system and Python that the package promises.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent


def resolve(output: str, *arguments: str, stdin: str = "") -> None:
    """Resolve what `arguments` ask for into the file `output` of this folder."""
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
    """Write every file, each held to the versions of the ones before where they must agree."""
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
