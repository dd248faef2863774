"""Fixtures of tests that install packages; `make test` does not run these tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from ci.samples import Git
from runner import ROOT


@pytest.fixture(scope="session")
def git(tmp_path_factory: pytest.TempPathFactory) -> Git:
    """Return a function that runs git, independent of this machine's and this user's settings."""
    settings = tmp_path_factory.mktemp("git") / "config"
    settings.write_text("[user]\nname = A\nemail = a@example.com\n[init]\ndefaultBranch = main\n")
    kept = {name: text for name, text in os.environ.items() if not name.startswith("GIT_")}
    variables = {**kept, "GIT_CONFIG_GLOBAL": str(settings), "GIT_CONFIG_NOSYSTEM": "1"}

    def git(folder: Path, *arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=variables,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    return git


@pytest.fixture(scope="session")
def tree(git: Git, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Commit this working tree, with all uncommitted changes, to a new repository.

    The name of the new folder contains spaces, as a path of a runner may.
    """
    copy = tmp_path_factory.mktemp("checkout") / "vera convert"
    listed = git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # a removed file may still be tracked
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    git(copy, "init", "--quiet")
    git(copy, "add", "--all", "--force")
    git(copy, "commit", "--quiet", "--message", "All of it")
    return copy
