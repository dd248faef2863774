"""The repository: one version, one set of promises, no path of a single machine."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from commandline import COMMANDS
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from vera_convert import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

PUBLIC_HOSTS = {
    "arxiv.org",
    "git-lfs.github.com",
    "hf.co",
    "huggingface.co",
    "json-schema.org",
    "json.schemastore.org",
    "keepachangelog.com",
    "mlco2.github.io",
    "semver.org",
    "www.apache.org",
}
"""The hosts that an address in this repository may name, apart from reserved names."""

NO_HOST = re.compile(
    r"[^.]*|127\.0\.0\.1(:.*)?|(.*\.)?example\.(com|net|org)|.*\.(example|invalid|test|[a-z])"
    r"|.*[^\w.:-].*"
)
"""Reserved names, parts of names, and placeholders in the place of a host."""

OF_ONE_MACHINE = re.compile(r"/(?<![\w.]/)(?:[w]ork|[o]pt|[r]oot|[h]ome/\w+)/|\.\./[s]hared")


def tracked() -> list[Path]:
    """Return every text file of the repository that git tracks or would track."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listing.stdout.split("\0") if name)
    binary = {".safetensors", ".npz"}
    return [path for path in paths if path.is_file() and path.suffix not in binary]


def pins(name: str) -> dict[str, Version]:
    """Return the pinned version of each package in a file of requirements/, the first of
    several.
    """
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    found = re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)
    return {name: Version(version) for name, version in reversed(found)}


def test_the_version_is_the_same_everywhere() -> None:
    assert metadata.version("vera-convert") == __version__
    assert str(Version(__version__)) == __version__


def test_the_changelog_follows_keep_a_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert text.startswith("# Changelog\n")
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    dated = [
        re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}", line) for line in versions[1:]
    ]
    released = [Version(match[1]) for match in dated if match]
    assert len(released) == len(dated)
    assert released == sorted(released, reverse=True)
    assert released[0] == Version(__version__)
    kinds = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_promised_lowest_versions_are_tested() -> None:
    oldest = pins("oldest.txt")
    for line in PROJECT["dependencies"]:
        requirement = Requirement(line)
        (bound,) = requirement.specifier
        assert bound.operator == ">="
        assert oldest[canonicalize_name(requirement.name)] == Version(bound.version)


def test_the_lowest_versions_of_the_extra_torch_are_tested() -> None:
    floor = pins("floor.txt") | {"torch": Version(made("TORCH_FLOOR"))}
    for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["torch"]]:
        requirement = Requirement(line)
        (bound,) = requirement.specifier
        assert bound.operator == ">="
        assert floor[canonicalize_name(requirement.name)] == Version(bound.version)


def test_the_pins_agree_with_each_other_and_with_the_promised_versions() -> None:
    everything = pins("test.txt")
    for name, version in pins("demo.txt").items():
        assert everything[name] == version
    for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]:
        requirement = Requirement(line)
        if requirement.name != "vera-convert":
            pinned = everything[canonicalize_name(requirement.name)]
            assert pinned in requirement.specifier


def made(variable: str) -> str:
    """Return the value of a variable of the Makefile."""
    found = re.search(
        rf"^{variable} := (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE
    )
    assert found
    return found[1]


def test_the_makefile_and_the_resolver_name_the_same_versions_of_torch() -> None:
    resolver = tomllib.loads((ROOT / "requirements" / "uv.toml").read_text("utf-8"))
    said = [
        entry["version"] for entry in resolver["dependency-metadata"] if entry["name"] == "torch"
    ]
    assert said == [made("TORCH"), made("TORCH_FLOOR")]


def test_the_readme_names_the_lowest_versions_of_the_extra_torch() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in PROJECT["optional-dependencies"]["torch"]:
        requirement = Requirement(line)
        (bound,) = requirement.specifier
        name = {"torch": "PyTorch"}.get(requirement.name, requirement.name)
        assert f"{name} {bound.version}" in readme


def test_the_readme_names_every_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| \[?`([\w-]+)`", readme, re.MULTILINE))
    assert rows == {*COMMANDS}


def test_every_linked_page_exists() -> None:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_address_leads_to_a_public_page() -> None:
    for path in tracked():
        for host in re.findall(r"https?://([^/\s\"'`)>\\]+)", path.read_text(encoding="utf-8")):
            assert host in PUBLIC_HOSTS or NO_HOST.fullmatch(host), f"{path}: {host}"


def test_no_file_names_a_path_of_one_machine() -> None:
    for path in tracked():
        found = OF_ONE_MACHINE.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path}: {found}"
