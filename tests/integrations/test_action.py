"""The GitHub action: the steps run as on a runner, with good, wrong and hostile inputs.

Nothing is installed here. Either the step that installs is told to take the command on the PATH,
which is this environment's command. Or a recorder, which writes down its arguments, takes the place
of Python and of the command. `make test-ci` installs for real.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from adapterdefects import Q_B, without
from adapters import good_adapter
from runner import ACTION, INPUT, STEPS, Runner

pytestmark = pytest.mark.skipif(
    os.name == "nt",
    reason="the first bash on the PATH may be another; the workflow runs the action",
)

TOKEN = "hf_not-to-be-seen"  # noqa: S105 -- a word to look for

HOSTILE = [
    "; touch MARK",
    "$(touch MARK)",
    "`touch MARK`",
    '"; touch MARK; "',
    "'; touch MARK; '",
    "x\ntouch MARK\nx",
    "x' || touch MARK #",
    "${IFS}&& touch MARK",
    "<(touch MARK)",
    "a[$(touch MARK)]",
    "--output=MARK",
    "-",
    "* ? [a-z] ~ \\ {a,b} !!",
]

Recorded = Callable[[], list[list[str]]]


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    """A runner with this environment's command on its PATH; its paths contain spaces."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    home = tmp_path / "a runner"
    return Runner(home, home / "the action", {"PATH": path, "HF_TOKEN": TOKEN})


@pytest.fixture
def recorder(tmp_path: Path) -> tuple[Runner, Recorded]:
    """A runner on which `recorder` and `vera-convert` write their arguments into files.

    If `recorder` should make an environment, the new environment's Python and `vera-convert` are
    the recorder, too.
    """
    folder = tmp_path / "recorder"
    folder.mkdir()
    record = tmp_path / "calls"
    record.touch()
    program = folder / "recorder"
    program.write_text(
        f"""#!{sys.executable} -I
import json, pathlib, shutil, sys
with open({str(record)!r}, "a") as calls:
    print(json.dumps(sys.argv[1:]), file=calls)
if sys.argv[1:4] == ["-I", "-m", "venv"]:
    scripts = pathlib.Path(sys.argv[-1]) / "bin"
    scripts.mkdir(parents=True)
    for name in ("python", "vera-convert"):
        shutil.copy(__file__, scripts / name)
""",
        encoding="utf-8",
    )
    program.chmod(0o755)
    (folder / "vera-convert").symlink_to(program)
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    home = tmp_path / "a runner"
    return (
        Runner(home, home / "the action", {"PATH": path}),
        lambda: [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()],
    )


def marks(folder: Path) -> list[Path]:
    return [*folder.rglob("MARK*")]


# --- inputs, outputs and scripts -----------------------------------------------------------------


def test_no_script_holds_an_expression_and_no_step_uses_another_action() -> None:
    for step in STEPS:
        assert "${{" not in step["run"]
        assert "uses" not in step


def test_every_input_is_described_and_passed_on_unchanged() -> None:
    texts = [text for step in STEPS for text in step["env"].values()]
    found = [INPUT.fullmatch(text) for text in texts]
    assert all(found)
    assert {match[1] for match in found if match} == set(ACTION["inputs"])
    for spec in ACTION["inputs"].values():
        assert spec["description"].endswith(".")
        assert ("default" in spec) != spec.get("required", False)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step["name"])
def test_a_script_reads_only_the_variables_of_its_step(step: dict[str, str]) -> None:
    used = set(re.findall(r"INPUT_\w+", step["run"]))
    assert used == set(step["env"])


# --- with the command of this environment --------------------------------------------------------


def test_a_good_adapter_passes(runner: Runner) -> None:
    good_adapter(runner.workspace / "adapter")
    ran = runner.run(adapters="adapter", version="installed")
    assert (ran.status, ran.outputs) == (0, {"status": "0"}), ran.log
    assert "::error" not in ran.log


def test_a_bad_adapter_fails_and_is_annotated(runner: Runner) -> None:
    without(Q_B)(good_adapter(runner.workspace / "adapter"))
    ran = runner.run(adapters="adapter", version="installed")
    assert (ran.status, ran.outputs) == (1, {"status": "1"}), ran.log
    assert re.search(r"^::error .*V202", ran.log, re.MULTILINE), ran.log
    assert "V202" in (runner.home / "files" / "summary.md").read_text(encoding="utf-8")


def test_a_warning_fails_if_fail_on_says_so(runner: Runner) -> None:
    folder = good_adapter(runner.workspace / "adapter")
    (folder / "adapter_model.bin").write_bytes(b"pickled")
    assert runner.run(adapters="adapter", version="installed").status == 0
    ran = runner.run(adapters="adapter", version="installed", fail_on="warning")
    assert ran.status == 1
    assert "V013" in ran.log
    ran = runner.run(adapters="adapter", version="installed", fail_on="warning", ignore="V013")
    assert ran.status == 0, ran.log


def test_each_line_names_an_adapter_or_a_folder_to_search(runner: Runner) -> None:
    good_adapter(runner.workspace / "one adapter")
    without(Q_B)(good_adapter(runner.workspace / "more of them" / "deep" / "down"))
    ran = runner.run(
        adapters="\n  one adapter\n\n  more of them  \n",
        recursive="true",
        version="installed",
        format="json",
        output="a report.json",
    )
    assert ran.status == 1, ran.log
    report = (runner.workspace / "a report.json").read_text(encoding="utf-8")
    assert "V202" in report
    assert "one adapter" in report
    assert "more of them/deep/down" in report


def test_a_missing_adapter_is_an_error_and_no_finding(runner: Runner) -> None:
    ran = runner.run(adapters="./nowhere", version="installed")
    assert (ran.status, ran.outputs) == (3, {"status": "3"}), ran.log


@pytest.mark.parametrize("adapters", ["", " \n\n "])
def test_an_action_without_an_adapter_fails(runner: Runner, adapters: str) -> None:
    ran = runner.run(adapters=adapters, version="installed")
    assert ran.status == 2
    assert ran.log.startswith("::error::")


@pytest.mark.parametrize("name", ["recursive", "deep"])
@pytest.mark.parametrize("value", ["True", "yes", "1"])
def test_a_value_that_is_neither_true_nor_false_fails(
    runner: Runner, name: str, value: str
) -> None:
    ran = runner.run(adapters=".", version="installed", **{name: value})
    assert ran.status == 2
    assert ran.log == f'::error::The input "{name}" is neither true nor false.\n'


@pytest.mark.parametrize("value", HOSTILE)
def test_the_command_refuses_hostile_inputs(runner: Runner, value: str) -> None:
    """With all hostile inputs at once, the command refuses in one line, and runs and writes
    nothing.
    """
    runner.workspace.mkdir(parents=True)
    inputs = {name: value for name in ACTION["inputs"] if name not in ("version", "recursive")}
    inputs = {name.replace("-", "_"): text for name, text in inputs.items() if name != "deep"}
    ran = runner.run(version="installed", **inputs)
    assert ran.status in (2, 3), ran.log
    assert "Traceback" not in ran.log
    assert "::" not in ran.log
    assert TOKEN not in ran.log
    assert marks(runner.home) == []


# --- with a recorder -----------------------------------------------------------------------------


def test_the_command_gets_all_options(recorder: tuple[Runner, Recorded]) -> None:
    runner, recorded = recorder
    ran = runner.run(
        adapters="an adapter\norg/name@main",
        base="org/model",
        recursive="true",
        deep="true",
        select="V1,V202",
        ignore="V013",
        fail_on="warning",
        format="sarif",
        output="a report.sarif",
        version="installed",
    )
    assert ran.status == 0, ran.log
    assert recorded() == [
        [
            *("validate", "--recursive", "--deep", "--base=org/model", "--select=V1,V202"),
            *("--ignore=V013", "--fail-on=warning", "--format=sarif", "--output=a report.sarif"),
            *("--", "an adapter", "org/name@main"),
        ]
    ]


def test_without_options_the_command_gets_the_defaults(recorder: tuple[Runner, Recorded]) -> None:
    runner, recorded = recorder
    assert runner.run(adapters="a b", version="installed").status == 0
    assert recorded() == [["validate", "--format=github", "--", "a b"]]


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("name", ["base", "select", "ignore", "fail_on", "format", "output"])
def test_a_hostile_option_is_passed_on_unchanged(
    recorder: tuple[Runner, Recorded], name: str, value: str
) -> None:
    runner, recorded = recorder
    assert runner.run(adapters="x", version="installed", **{name: value}).status == 0
    ((*options, end, adapter),) = recorded()
    assert f"--{name.replace('_', '-')}={value}" in options
    assert (end, adapter) == ("--", "x")
    assert marks(runner.home) == []


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_adapters_are_passed_on_line_by_line(
    recorder: tuple[Runner, Recorded], value: str
) -> None:
    runner, recorded = recorder
    assert runner.run(adapters=value, version="installed").status == 0
    (arguments,) = recorded()
    assert arguments[arguments.index("--") + 1 :] == value.split("\n")
    assert marks(runner.home) == []


@pytest.mark.parametrize("value", [value for value in HOSTILE if value != "-"])
@pytest.mark.parametrize("name", ["version", "python", "recursive", "deep"])
def test_a_hostile_value_of_another_input_ends_the_run(
    recorder: tuple[Runner, Recorded], name: str, value: str
) -> None:
    runner, recorded = recorder
    inputs = {"adapters": "x", "python": "recorder", "version": "1.0", name: value}
    assert runner.run(**inputs).status != 0
    assert [arguments for arguments in recorded() if arguments[0] == "validate"] == []
    assert marks(runner.home) == []


@pytest.mark.parametrize(("version", "expected"), [("", None), ("0.1.0", "vera-convert==0.1.0")])
def test_the_action_installs_its_own_checkout_or_a_release(
    recorder: tuple[Runner, Recorded], version: str, expected: str | None
) -> None:
    runner, recorded = recorder
    ran = runner.run(adapters="x", python="recorder", version=version)
    assert ran.status == 0, ran.log
    made, installed, validated = recorded()
    assert made == ["-I", "-m", "venv", "--clear", str(runner.temp / "vera-convert")]
    assert installed[:4] == ["-I", "-m", "pip", "install"]
    assert installed[-1] == (expected or str(runner.action))
    assert validated[0] == "validate"
