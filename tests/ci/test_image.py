"""`docs/Containerfile`: built if a container engine answers; the steps also run without an engine.

Without an engine, a test copies the same files, runs the same pip line and calls the same entry
point in a fresh environment, which takes the place of the image's Python.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from ci.samples import BAD, adapters
from containerfile import PATH, stages

from vera_convert import __version__


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def engine() -> str | None:
    """Return the container engine that answers; None if there is none."""
    for name in ("docker", "podman"):
        if shutil.which(name) and run(name, "info", cwd=PATH.parent).returncode == 0:
            return name
    return None


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return adapters(tmp_path / "data")


@pytest.fixture(scope="module")
def by_hand(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of scripts of an environment that was filled like the image."""
    root = tmp_path_factory.mktemp("image")
    python = root / "usr" / "local"
    venv.create(python, with_pip=True)
    scripts = python / ("Scripts" if os.name == "nt" else "bin")
    build, _ = stages()
    for instruction in build:
        if instruction.name == "COPY":
            *sources, target = instruction.words
            for source in sources:
                place = root / target.strip("/")
                if (tree / source).is_dir():
                    shutil.copytree(tree / source, place)
                else:
                    assert target.endswith("/")
                    place.mkdir(exist_ok=True)
                    shutil.copy(tree / source, place)
        elif instruction.name == "RUN":
            program, *arguments = instruction.words
            inside = [str(root / word[1:]) if word.startswith("/") else word for word in arguments]
            done = run(scripts / program, *inside, cwd=root)
            assert done.returncode == 0, done.stdout + done.stderr
    # The same effect as `COPY --from=build /installed /usr/local`.
    shutil.copytree(root / "installed", python, dirs_exist_ok=True)
    return scripts


def test_the_steps_without_an_engine_give_a_working_command(by_hand: Path, data: Path) -> None:
    (entry,) = (json.loads(each.text) for each in stages()[-1] if each.name == "ENTRYPOINT")
    command = [by_hand / entry[0], *entry[1:]]
    assert __version__ in run(*command, "--version", cwd=data).stdout
    done = run(*command, "validate", "--recursive", ".", cwd=data)
    assert done.returncode == 1, done.stderr
    assert BAD in done.stdout
    assert run(*command, "validate", "good/adapter one", cwd=data).returncode == 0


def test_the_image_installs_only_the_package_s_requirements(by_hand: Path, tmp_path: Path) -> None:
    code = """
from importlib.util import find_spec
print([name for name in ("torch", "transformers", "pytest", "jsonschema") if find_spec(name)])
"""
    assert run(by_hand / "python", "-I", "-c", code, cwd=tmp_path).stdout == "[]\n"


@pytest.mark.skipif(engine() is None, reason="no container engine answers here")
@pytest.mark.skipif(sys.platform != "linux", reason="the image is one of Linux")
def test_the_image_is_built_and_runs_without_root_and_network(tree: Path, data: Path) -> None:
    name, image = str(engine()), "vera-convert-test"
    file = str(PATH.relative_to(PATH.parent.parent))
    built = run(name, "build", "--file", file, "--tag", image, ".", cwd=tree)
    assert built.returncode == 0, built.stdout + built.stderr
    try:
        start = ("run", "--rm", "--network", "none", "--volume", f"{data}:/data:ro")
        done = run(name, *start, image, "validate", "--recursive", ".", cwd=data)
        assert done.returncode == 1, done.stdout + done.stderr
        assert BAD in done.stdout
        done = run(name, *start, "--entrypoint", "id", image, "-u", cwd=data)
        assert done.stdout == "10001\n"
    finally:
        run(name, "image", "rm", image, cwd=data)
