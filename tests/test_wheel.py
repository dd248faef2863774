"""Build the wheel, install only the wheel with its requirements, and run the command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vera_convert import __version__
from vera_convert.schemas import schema_names

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed, and return the output."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(tree: Path, target: str, out: Path) -> Path:
    """Build the wheel or the source archive of `tree` into `out`."""
    run(sys.executable, "-m", "hatchling", "build", "--target", target, "-d", out, cwd=tree)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


def needed_by(
    distribution: metadata.Distribution, seen: set[str]
) -> Iterator[metadata.Distribution]:
    """Yield every installed distribution that `distribution` needs at run time, except those in
    `seen`.
    """
    for line in distribution.requires or []:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        other = metadata.distribution(name)
        yield other
        yield from needed_by(other, seen)


def link(distribution: metadata.Distribution, site: Path) -> None:
    """Put the files of an installed distribution into another environment, without copying."""
    for file in distribution.files or []:
        if ".." in file.parts or "__pycache__" in file.parts:
            continue
        target = site / file
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(str(file.locate()), target)
        except OSError:  # another disk, or a system without links
            shutil.copyfile(str(file.locate()), target)


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the scripts of an environment with only the wheel and its declared requirements."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home)
    folder = home / ("Scripts" if os.name == "nt" else "bin")
    run(
        *(sys.executable, "-m", "pip", "--python", home, "install", "-qq"),
        *("--no-index", "--no-deps", wheel),
        cwd=home,
    )
    base = {"base": str(home), "platbase": str(home)}
    site = Path(sysconfig.get_path("purelib", "venv", base))
    (installed,) = metadata.distributions(name="vera-convert", path=[str(site)])
    for distribution in needed_by(installed, set()):
        link(distribution, site)
    return folder


def test_the_wheel_holds_only_the_package_and_the_schemas(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
    code = {name for name in names if ".dist-info/" not in name}
    expected = {
        *(path.relative_to(ROOT).as_posix() for path in (ROOT / "vera_convert").rglob("*.py")),
        *(f"vera_convert/schemas/{name}.json" for name in schema_names()),
        "vera_convert/__init__.pyi",
        "vera_convert/adapter/unknown_heads.toml",
        "vera_convert/base/conversions.txt",
        "vera_convert/base/quantized/bitsandbytes_4bit.toml",
        "vera_convert/base/quantized/refused.toml",
        "vera_convert/base/renames.toml",
        "vera_convert/base/task_classes.txt",
        "vera_convert/base/tied_copies.toml",
        "vera_convert/base/unsupported_layouts.toml",
        "vera_convert/embeddings.toml",
        "vera_convert/hub/refusals.toml",
        "vera_convert/lora/engines.toml",
        "vera_convert/lora/peft_targets.toml",
        "vera_convert/lora/pipeline_component.toml",
        "vera_convert/py.typed",
        "vera_convert/rules.toml",
        "vera_convert/targets/architectures.toml",
        "vera_convert/targets/default_targets.toml",
        "vera_convert/verification/model_files.toml",
        "vera_convert/with_torch/peft_names.toml",
    }
    assert code == expected
    assert f"vera_convert-{__version__}.dist-info/licenses/LICENSE" in names


def test_the_source_archive_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    archive = build(ROOT, "sdist", tmp_path / "sdist")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "tree", filter="data")
    (tree,) = (tmp_path / "tree").iterdir()
    rebuilt = build(tree, "wheel", tmp_path / "wheel")
    assert rebuilt.name == wheel.name
    assert rebuilt.read_bytes() == wheel.read_bytes()


def test_the_environment_holds_only_the_declared_requirements(
    scripts: Path, tmp_path: Path
) -> None:
    code = """
import importlib.util as u, vera_convert
assert "site-packages" in vera_convert.__file__, vera_convert.__file__
print([name for name in ("torch", "peft", "pytest", "jsonschema", "pip") if u.find_spec(name)])
"""
    assert run(scripts / "python", "-I", "-c", code, cwd=tmp_path) == "[]\n"


def test_the_installed_command_prints_the_version(scripts: Path, tmp_path: Path) -> None:
    assert __version__ in run(scripts / "vera-convert", "--version", cwd=tmp_path)


def test_the_installed_schemas_can_be_loaded(scripts: Path, tmp_path: Path) -> None:
    code = """
from vera_convert.schemas import load_schema, schema_names
print([load_schema(name)["$id"].rpartition(":")[2] for name in schema_names()])
"""
    printed = run(scripts / "python", "-I", "-c", code, cwd=tmp_path)
    assert printed == f"{list(schema_names())}\n"


def test_the_installed_command_describes_and_strips_an_adapter(
    scripts: Path, tmp_path: Path, fixtures: Path
) -> None:
    adapter = fixtures / "0.21.2" / "llama_fp32_proj"
    base = fixtures / "bases" / "llama-fp32"
    document = run(scripts / "vera-convert", "info", adapter, "--json", cwd=tmp_path)
    assert isinstance(json.loads(document), dict)
    run(scripts / "vera-convert", "strip", adapter, "out", "--base", base, cwd=tmp_path)
    stripped = tmp_path / "out" / "adapter_model.safetensors"
    assert stripped.stat().st_size < (adapter / "adapter_model.safetensors").stat().st_size
