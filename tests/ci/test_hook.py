"""pre-commit installs this repository's hook and runs the hook on another repository."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from ci.samples import BAD, Git, adapters

PreCommit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def pre_commit(tmp_path_factory: pytest.TempPathFactory) -> PreCommit:
    """Return a function that runs pre-commit in a folder; tests share the installed
    environments.
    """
    home = tmp_path_factory.mktemp("pre-commit")

    def run(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pre_commit", *arguments],
            cwd=folder,
            env={**os.environ, "PRE_COMMIT_HOME": str(home), "PRE_COMMIT_COLOR": "never"},
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )

    return run


@pytest.fixture
def repository(git: Git, tmp_path: Path) -> Path:
    """Make a repository with a good adapter, a bad adapter, and other files."""
    folder = adapters(tmp_path / "repository")
    (folder / "README.md").write_text("Adapters.\n")
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    return folder


def test_the_hook_names_the_defect_of_the_bad_adapter(
    pre_commit: PreCommit, tree: Path, repository: Path
) -> None:
    done = pre_commit(repository, "try-repo", tree, "vera-convert-validate", "--all-files")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Failed" in done.stdout
    assert "- exit code: 1" in done.stdout
    assert BAD in done.stdout
    assert "bad/adapter two" in done.stdout


def test_the_hook_passes_without_the_bad_adapter(
    pre_commit: PreCommit, tree: Path, repository: Path, git: Git
) -> None:
    git(repository, "rm", "-r", "--quiet", "--cached", "bad")
    done = pre_commit(repository, "try-repo", tree, "vera-convert-validate", "--all-files")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Passed" in done.stdout


def test_the_installed_hook_stops_a_commit(
    pre_commit: PreCommit, tree: Path, repository: Path, git: Git
) -> None:
    """Follow the documentation: write a config, and commit any file of an adapter."""
    hook = {"id": "vera-convert-validate", "args": ["--offline"]}
    repo = {"repo": tree.as_uri(), "rev": git(tree, "rev-parse", "HEAD"), "hooks": [hook]}
    config = repository / ".pre-commit-config.yaml"
    config.write_text(yaml.safe_dump({"repos": [repo]}))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        done = pre_commit(repository, "run", "--files", f"bad/adapter two/{name}")
        assert done.returncode == 1, done.stdout + done.stderr
        assert BAD in done.stdout
        done = pre_commit(repository, "run", "--files", f"good/adapter one/{name}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Passed" in done.stdout
    done = pre_commit(repository, "run", "--files", "README.md")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Skipped" in done.stdout
