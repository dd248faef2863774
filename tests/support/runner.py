"""Run the steps of `action.yml` as a GitHub runner does.

The runner knows only the features that this action uses and refuses any other feature: inputs with
defaults, ``env`` of one expression each, ``shell: bash``, the files and folders that the runner
names, the outputs of steps.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
ACTION: Mapping[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS: list[Mapping[str, Any]] = ACTION["runs"]["steps"]

INPUT = re.compile(r"\$\{\{ inputs\.([a-z-]+) \}\}")
OUTPUT = re.compile(r"\$\{\{ steps\.([a-z]+)\.outputs\.([a-z]+) \}\}")
BASH = ("bash", "--noprofile", "--norc", "-e", "-o", "pipefail")
"""The command for ``shell: bash``."""


@dataclass(frozen=True, slots=True)
class Ran:
    """The end of the action: the status of the step that failed, and the output of all steps."""

    status: int
    log: str
    outputs: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Runner:
    """A runner with a checked-out workspace, and with the action in another folder.

    Attributes:
    home: the folder that the runner fills.
    action: the checkout of the action.
    variables: variables of the job, which replace those of this process.
    """

    home: Path
    action: Path
    variables: Mapping[str, str]

    @property
    def workspace(self) -> Path:
        """The folder in which every step starts."""
        return self.home / "workspace"

    @property
    def temp(self) -> Path:
        """The folder that RUNNER_TEMP names."""
        return self.home / "temp"

    def run(self, **inputs: str) -> Ran:
        """Run the steps until a step fails; ``fail_on`` is the value of the input ``fail-on``."""
        for folder in (self.workspace, self.temp, self.home / "files"):
            folder.mkdir(parents=True, exist_ok=True)
        values = {name: spec.get("default", "") for name, spec in ACTION["inputs"].items()}
        given = {name.replace("_", "-"): value for name, value in inputs.items()}
        assert given.keys() <= values.keys()
        values |= given
        log, status, steps = "", 0, {}
        for number, step in enumerate(STEPS):
            if status == 0:
                status, printed, steps[step.get("id")] = self._step(number, step, values)
                log += printed
        outputs = {}
        for name, spec in ACTION["outputs"].items():
            found = OUTPUT.fullmatch(spec["value"])
            assert found
            outputs[name] = steps.get(found[1], {}).get(found[2], "")
        return Ran(status, log, outputs)

    def _step(
        self, number: int, step: Mapping[str, Any], inputs: Mapping[str, str]
    ) -> tuple[int, str, dict[str, str]]:
        assert step.keys() <= {"name", "id", "shell", "env", "run"}
        assert step["shell"] == "bash"
        script = self.temp / f"step-{number}.sh"
        script.write_text(step["run"], encoding="utf-8", newline="\n")
        output = self.home / "files" / f"output-{number}"
        output.touch()
        done = subprocess.run(
            [*BASH, script],
            cwd=self.workspace,
            env={
                **os.environ,
                "RUNNER_TEMP": str(self.temp),
                "GITHUB_WORKSPACE": str(self.workspace),
                "GITHUB_ACTION_PATH": str(self.action),
                "GITHUB_OUTPUT": str(output),
                "GITHUB_ENV": str(self.home / "files" / "env"),
                "GITHUB_STEP_SUMMARY": str(self.home / "files" / "summary.md"),
                "GITHUB_ACTIONS": "true",
                "CI": "true",
                **self.variables,
                **{name: _value(text, inputs) for name, text in step["env"].items()},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            check=False,
        )
        lines = output.read_text(encoding="utf-8").splitlines()
        return done.returncode, done.stdout, dict(line.split("=", 1) for line in lines)


def _value(text: str, inputs: Mapping[str, str]) -> str:
    """Return the value of an expression of `env`."""
    found = INPUT.fullmatch(text)
    assert found
    return inputs[found[1]]
