"""Compare hook, documentation and container file for CI with the command line."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from commandline import COMMANDS
from containerfile import Instruction, stages
from runner import ACTION, OUTPUT, STEPS

from vera_convert.rules import Severity
from vera_convert.validation.selection import read_settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "ci.md"
VALIDATE = COMMANDS["validate"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
(HOOK,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))


def snippets(language: str) -> list[str]:
    """Return every code block of `docs/ci.md` in a language."""
    text = DOCS.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def documented() -> list[Any]:
    return [yaml.safe_load(text) for text in snippets("yaml")]


def steps_of(workflow: Any) -> Iterator[dict[str, Any]]:
    for job in workflow.get("jobs", {}).values():
        yield from job["steps"]


def called(arguments: list[str]) -> dict[str, Any]:
    """Parse arguments of `validate` as click does; an unknown option or value raises.

    The keys of the result are the names of the options, such as ``--format``.
    """
    values = VALIDATE.make_context("validate", list(arguments), obj=arguments).params
    return {each.opts[0]: values[each.name] for each in VALIDATE.params if each.name in values}


# --- pre-commit ----------------------------------------------------------------------------------


def test_the_hook_runs_the_command_on_binary_files_in_one_process() -> None:
    program, command = HOOK["entry"].split()
    assert program in PROJECT["scripts"]
    assert command == VALIDATE.name
    assert HOOK["language"] == "python"
    assert HOOK["require_serial"]
    assert HOOK["types"] == ["file"]
    assert HOOK.get("pass_filenames", True)


@pytest.mark.parametrize(
    "path",
    [
        "adapter_config.json",
        "adapter_model.safetensors",
        "runs/checkpoint-500/adapter_config.json",
        "a folder/with spaces/adapter_model.safetensors",
    ],
)
def test_the_hook_takes_the_files_of_an_adapter(path: str) -> None:
    assert re.search(HOOK["files"], path)


@pytest.mark.parametrize(
    "path",
    [
        "config.json",
        "model.safetensors",
        "adapter_configXjson",
        "my_adapter_config.json",
        "adapter_config.json.md",
        "adapter_model.safetensors/readme",
        "adapter_model.bin",
        "adapter_model.safetensors.index.json",
    ],
)
def test_the_hook_leaves_other_files_alone(path: str) -> None:
    assert not re.search(HOOK["files"], path)


def test_the_documented_hook_is_the_hook_of_this_repository() -> None:
    (config,) = (document for document in documented() if "repos" in document)
    (repo,) = config["repos"]
    (hook,) = repo["hooks"]
    assert hook["id"] == HOOK["id"]
    assert called([*hook["args"], "adapter_config.json"])["--offline"]


def test_the_documented_settings_are_read(tmp_path: Path) -> None:
    (text,) = snippets("toml")
    (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
    settings = read_settings(tmp_path)
    assert settings.ignore
    assert settings.fail_on is Severity.WARNING


# --- GitHub --------------------------------------------------------------------------------------


def uses_of_the_action(workflows: list[Any], name: str) -> list[dict[str, Any]]:
    steps = (step for workflow in workflows for step in steps_of(workflow))
    return [step for step in steps if step.get("uses", "").partition("@")[0] == name]


def test_the_documented_workflows_name_inputs_and_outputs_of_the_action() -> None:
    found = uses_of_the_action(documented(), "OWNER/vera-convert")
    assert len(found) == 2
    for step in found:
        assert step["with"].keys() <= ACTION["inputs"].keys()
    outputs = re.findall(r"steps\.adapters\.outputs\.(\w+)", DOCS.read_text(encoding="utf-8"))
    assert outputs
    assert set(outputs) == set(ACTION["outputs"])


def test_the_uploaded_report_is_the_written_report() -> None:
    (upload,) = uses_of_the_action(documented(), "github/codeql-action/upload-sarif")
    written = [
        step["with"]["output"]
        for step in uses_of_the_action(documented(), "OWNER/vera-convert")
        if step["with"].get("format") == "sarif"
    ]
    assert written == [upload["with"]["sarif_file"]]


def test_every_input_is_in_the_table_with_its_default() -> None:
    rows = re.findall(
        r"^\| ((?:`[a-z-]+`,? ?)+) \| .* \| ?(.*) \|$", DOCS.read_text("utf-8"), re.MULTILINE
    )
    told = {name: default for names, default in rows for name in re.findall("[a-z-]+", names)}
    assert told.keys() == ACTION["inputs"].keys()
    for name, spec in ACTION["inputs"].items():
        if spec.get("default"):
            assert told[name] == f"`{spec['default']}`"


def test_the_action_has_the_options_and_values_of_the_command() -> None:
    options = {option for each in VALIDATE.params for option in each.opts}
    installing = {"adapters", "version", "python"}
    assert {f"--{name}" for name in ACTION["inputs"].keys() - installing} <= options
    for parameter in VALIDATE.params:
        name = parameter.opts[0].removeprefix("--")
        if isinstance(parameter.type, click.Choice) and name in ACTION["inputs"]:
            described = ACTION["inputs"][name]["description"]
            assert all(str(choice) in described for choice in parameter.type.choices)
            assert ACTION["inputs"][name]["default"] in ("", *parameter.type.choices)


def test_the_output_of_the_action_is_an_output_of_its_step() -> None:
    for spec in ACTION["outputs"].values():
        found = OUTPUT.fullmatch(spec["value"])
        assert found
        (step,) = (step for step in STEPS if step.get("id") == found[1])
        assert f'echo "{found[2]}=' in step["run"]


def test_the_workflow_of_this_repository_runs_hook_and_action() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    alone = [
        name
        for name, job in workflow["jobs"].items()
        if any(step.get("run") == "make test-ci" for step in job["steps"])
    ]
    assert len(alone) == 1
    found = uses_of_the_action([workflow], "./")
    assert found
    for step in found:
        assert step["with"].keys() <= ACTION["inputs"].keys()


# --- GitLab and containers -----------------------------------------------------------------------


def commands(lines: list[str]) -> Iterator[list[str]]:
    """Return the words after `validate` for every call in lines of a shell."""
    for line in lines:
        words = shlex.split(line)
        if "validate" in words:
            assert words[words.index("validate") - 1] == "vera-convert"
            yield words[words.index("validate") + 1 :]


def test_the_gitlab_job_uploads_the_report_that_the_command_writes() -> None:
    (config,) = (document for document in documented() if "validate-adapters" in document)
    job = config["validate-adapters"]
    (arguments,) = commands(job["script"])
    parsed = called(arguments)
    assert parsed["--format"] == "junit"
    assert job["artifacts"] == {"when": "always", "reports": {"junit": str(parsed["--output"])}}
    assert job["variables"]["VERA_CONVERT"].startswith(f"{PROJECT['name']}==")
    assert job["image"] == stages()[-1][0].text


def test_the_command_line_accepts_the_documented_shell_commands() -> None:
    lines = [line for text in snippets("sh") for line in text.splitlines()]
    found = list(commands(lines))
    assert found
    assert all(called(arguments) for arguments in found)
    head = (ROOT / "docs" / "Containerfile").read_text(encoding="utf-8")
    assert all(f"#     {line}\n" in head for line in lines)


def test_every_option_in_the_text_exists() -> None:
    options = {option for each in VALIDATE.params for option in each.opts}
    text = re.sub(r"```.*?```", "", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    named = {option for option in re.findall(r"`(--[a-z-]+)", text) if option != "--network"}
    assert named <= options


def test_the_image_is_slim_and_runs_the_command_without_root() -> None:
    *_, image = stages()
    found = {instruction.name: instruction for instruction in image}
    assert json.loads(found["ENTRYPOINT"].text) == [*PROJECT["scripts"]]
    (user,) = found["USER"].words
    assert int(user) > 0
    assert ["useradd", "--uid", user] == found["RUN"].words[:3]
    names = [instruction.name for instruction in image]
    assert names.index("RUN") < names.index("USER") < names.index("ENTRYPOINT")


def test_every_stage_starts_from_the_newest_python_that_is_tested() -> None:
    versions = [
        line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)
    ]
    newest = max(versions, key=lambda version: int(version.partition(".")[2]))
    assert {stage[0].words[0] for stage in stages()} == {f"python:{newest}-slim"}


def test_the_image_copies_exactly_the_files_that_make_a_wheel() -> None:
    build, image = stages()
    copied = [word for each in of_name("COPY", build) for word in each.words[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]} <= set(copied)
    (copy,) = of_name("COPY", image)
    (run,) = of_name("RUN", build)
    assert copy.words == ["--from=build", run.words[run.words.index("--prefix") + 1], "/usr/local"]


def of_name(name: str, stage: list[Instruction]) -> list[Instruction]:
    return [instruction for instruction in stage if instruction.name == name]


def test_the_readme_links_to_the_page_about_ci() -> None:
    assert "(docs/ci.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
