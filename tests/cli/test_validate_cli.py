"""The command `validate`: output, reports, and exit status."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from adapterdefects import fields
from adapters import OUTPUTS, good_adapter
from commandline import Ended, Run
from folders import DATA

import vera_convert
from vera_convert.formats.catalog import rules_text
from vera_convert.rules import CATALOG

SchemaErrors = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, without this project's settings and without a CI's variables."""
    monkeypatch.chdir(tmp_path)
    for name in ("GITHUB_STEP_SUMMARY", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def good() -> Path:
    return good_adapter(Path("good"), revision="a" * 40)


@pytest.fixture
def bad() -> Path:
    """Write an adapter with a warning, a note, and two errors."""
    column = np.ones((OUTPUTS["q_proj"], 1), np.float32)
    name = "base_model.model.model.layers.{}.self_attn.q_proj.vera_lambda_b"
    columns = {name.format(layer): column for layer in range(2)}
    return good_adapter(Path("bad"), tensors=columns, unheard_of=1)


BAD_CODES = ["V110", "V122", "V218", "V218"]


def codes(ended: Ended) -> list[str]:
    found = ended.document["adapters"]
    return [finding["code"] for adapter in found for finding in adapter["findings"]]


# --- what it prints ------------------------------------------------------------------------------


def test_a_good_adapter_passes(run: Run, good: Path) -> None:
    ended = run("validate", good)
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith(
        "good: good\n  A and B      embedded: the float32-fused draw of key"
    )


def test_an_adapter_with_errors_fails_with_the_remedy_of_each(run: Run, bad: Path) -> None:
    ended = run("validate", bad)
    assert (ended.status, ended.err) == (1, "")
    assert ended.out.startswith("bad: 2 errors, 1 warning, 1 note\n")
    assert "V218" in ended.out
    assert CATALOG["V218"].remedy in ended.out


def test_several_adapters_and_a_tree_are_counted(run: Run, good: Path, bad: Path) -> None:
    assert "2 adapters: 1 good, 1 with errors" in run("validate", good, bad).out
    ended = run("validate", "--recursive", ".")
    assert ended.status == 1
    assert "2 adapters: 1 good, 1 with errors" in ended.out


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_stands_for_its_folder(name: str, run: Run, bad: Path) -> None:
    assert run("validate", bad / name).out == run("validate", bad).out


def test_the_option_json_prints_a_document(
    run: Run, good: Path, bad: Path, schema_errors: SchemaErrors
) -> None:
    ended = run("validate", good, bad, "--json")
    assert (ended.status, ended.err) == (1, "")
    assert schema_errors("validation", ended.document) == []
    assert codes(ended) == BAD_CODES
    assert run("validate", good, bad, "--format", "json").out == ended.out


def test_formats_for_ci(run: Run, bad: Path) -> None:
    log = run("validate", bad, "--format=sarif")
    assert log.status == 1
    assert [each["ruleId"] for each in log.document["runs"][0]["results"]] == BAD_CODES
    suites = ET.fromstring(run("validate", bad, "--format=junit").out)  # noqa: S314 -- our own text
    assert suites.get("failures") == "2"
    annotated = run("validate", bad, "--format=github").out
    assert annotated.startswith("::warning file=bad/adapter_config.json,title=V110 ")
    assert annotated.count("::error file=bad/adapter_model.safetensors,title=V218 ") == 2


def test_quiet_prints_only_errors_and_warnings(run: Run, good: Path, bad: Path) -> None:
    ended = run("validate", bad, "--quiet")
    assert (ended.status, ended.out) == (1, "")
    lines = ended.err.splitlines()
    assert [line.split()[2] for line in lines] == [c for c in BAD_CODES if c != "V122"]
    assert all(line.startswith(("error: ", "warning: ")) for line in lines)
    assert run("validate", good, "--quiet") == Ended(0, "", "")
    assert codes(run("validate", bad, "--quiet", "--json")) == BAD_CODES


def test_a_missing_adapter_is_an_error(run: Run, good: Path, bad: Path) -> None:
    ended = run("validate", "./gone", good, "--json")
    assert ended.status == 3
    assert ended.err == "error: there is no folder ./gone.\n"
    assert ended.document["adapters"][0]["failure"] == {
        "error": "there is no folder ./gone.",
        "status": 3,
    }
    assert run("validate", "./gone", bad).status == 1


def test_color_is_used_only_on_terminals_that_allow_color(
    run: Run, bad: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "\x1b" not in run("validate", bad).out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[1;31merror" in run("validate", bad).out
    assert "\x1b" not in run("validate", bad, "--json").out
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in run("validate", bad).out
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run("validate", bad).out


@pytest.mark.parametrize(("columns", "width"), [("10", 40), ("80", 80), ("300", 100)])
def test_a_text_is_as_wide_as_its_terminal_within_limits(
    columns: str, width: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", columns)
    lines = run("validate", "--explain", "V").out.splitlines()
    assert width - 10 < max(len(line) for line in lines if not {*"`("} & {*line}) <= width


# --- which findings count ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected", "status"),
    [
        (["--select", "V1,V2"], BAD_CODES, 1),
        (["--select", "V110,v122"], ["V110", "V122"], 0),
        (["--select", "V110", "--select", "V122"], ["V110", "V122"], 0),
        (["--ignore", "V218"], ["V110", "V122"], 0),
        (["--ignore", "V218", "--fail-on", "warning"], ["V110", "V122"], 1),
        (["--ignore", "V218, V110", "--fail-on", "warning"], ["V122"], 0),
        (["--ignore", "V"], [], 0),
        (["--select", "V3"], [], 0),
    ],
)
def test_findings_are_chosen_by_code(
    options: list[str], expected: list[str], status: int, run: Run, bad: Path
) -> None:
    ended = run("validate", bad, "--json", *options)
    assert codes(ended) == expected
    assert ended.status == ended.document["status"] == status


@pytest.mark.parametrize(
    ("settings", "options", "expected", "status"),
    [
        ('ignore = ["V218"]', [], ["V110", "V122"], 0),
        ('ignore = ["V218"]\nfail-on = "warning"', [], ["V110", "V122"], 1),
        ('ignore = ["V218"]\nfail-on = "warning"', ["--fail-on=error"], ["V110", "V122"], 0),
        ('ignore = ["V218"]', ["--ignore=V110"], ["V122"], 0),
        ('select = ["V122"]', [], ["V122"], 0),
        ('select = ["V122"]', ["--select=V110"], ["V110"], 0),
    ],
)
def test_findings_are_chosen_by_the_project(
    settings: str, options: list[str], expected: list[str], run: Run, bad: Path, *, status: int
) -> None:
    text = f"[tool.vera-convert.validate]\n{settings}\n"
    Path("pyproject.toml").write_text(text, encoding="utf-8")
    ended = run("validate", bad, "--json", *options)
    assert codes(ended) == expected
    assert ended.status == status


# --- reports -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["text", "json", "sarif", "junit", "github"])
def test_a_report_is_written_with_and_without_errors(
    form: str, run: Run, good: Path, bad: Path
) -> None:
    printed = run("validate", good, bad, "--format", form).out
    before = {path.name for path in Path().iterdir()}
    for _ in range(2):  # the second run replaces the first report
        ended = run("validate", good, bad, "--format", form, "--output", "report")
        assert ended.status == 1
        assert Path("report").read_text(encoding="utf-8") == printed
    assert ended.out == run("validate", good, bad).out
    assert run("validate", bad, "--format", form, "--output", "report", "--quiet").out == ""
    assert {path.name for path in Path().iterdir()} == before | {"report"}


def test_json_on_stdout_and_a_report_in_another_format(run: Run, bad: Path) -> None:
    ended = run("validate", bad, "--json", "--format=sarif", "--output=report")
    assert codes(ended) == BAD_CODES
    assert json.loads(Path("report").read_text(encoding="utf-8"))["version"] == "2.1.0"
    ended = run("validate", bad, "--json", "--output=report")
    assert Path("report").read_text(encoding="utf-8") == ended.out


def test_a_report_may_lie_in_a_tree_that_is_searched(run: Run, bad: Path) -> None:
    assert run("validate", "--recursive", ".", "--output", "report").status == 1
    assert Path("report").is_file()
    assert bad.is_dir()


@pytest.mark.parametrize(
    ("out", "status", "said"),
    [
        ("bad/report", 2, "lies inside the input bad"),
        ("bad/adapter_config.json", 2, "lies inside the input bad"),
        ("good", 2, "give the name of a file"),
        ("link", 2, "give the name of a file"),
        ("good/adapter_config.json/report", 3, "is not a folder"),
    ],
)
def test_a_report_never_replaces_other_files(
    out: str, said: str, run: Run, good: Path, bad: Path, *, status: int
) -> None:
    Path("link").symlink_to("good/adapter_config.json")
    before = {path: path.stat().st_size for path in Path().rglob("*")}
    ended = run("validate", bad, "--output", out)
    assert ended.status == status
    assert said in ended.err
    assert ended.out == ""
    assert {path: path.stat().st_size for path in Path().rglob("*")} == before
    assert good.is_dir()


def test_a_summary_is_appended_to_the_file_that_github_names(
    run: Run, bad: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = Path("summary.md")
    summary.write_text("before\n", encoding="utf-8")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert run("validate", bad).status == 1
    assert summary.read_text(encoding="utf-8") == "before\n"
    assert run("validate", bad, "--format=github").err == ""
    text = summary.read_text(encoding="utf-8")
    assert text.startswith("before\n### vera-convert validate\n")
    assert text.count("| V218 |") == 2
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(bad))
    ended = run("validate", bad, "--format=github")
    assert ended.status == 1
    assert ended.err.startswith("warning: no summary was written: ")


# --- the catalog -------------------------------------------------------------------------------


def test_rules_and_explanations(run: Run, schema_errors: SchemaErrors) -> None:
    assert run("validate", "--rules") == Ended(0, rules_text() + "\n", "")
    assert run("validate", "--explain", "v218").out.startswith("V218      a lambda is stored as")
    listed = run("validate", "--rules", "--json").document
    assert schema_errors("rules", listed) == []
    assert [rule["code"] for rule in listed["rules"]] == [*CATALOG]
    (rule,) = run("validate", "--explain", "V218", "--format=json").document["rules"]
    assert rule["why"] == CATALOG["V218"].why


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name an ADAPTER"),
        (["--recursive"], "name an ADAPTER"),
        (["good", "--json", "--format=sarif"], "both write to stdout"),
        (["good", "--format=html"], "'html' is not one of"),
        (["good", "--fail-on=note"], "'note' is not one of"),
        (["good", "--select=V999"], "is not a code"),
        (["good", "--ignore=V2180"], "Did you mean V218?"),
        (["good", "--ignore="], "--ignore is empty"),
        (["--explain=V21x"], "Did you mean V"),
        (["--rules", "good"], "stand alone"),
        (["--explain=V218", "good"], "stand alone"),
        (["--rules", "--explain=V218"], "stand alone"),
        (["--rules", "--output=x"], "to stdout"),
        (["--rules", "--format=sarif"], "to stdout"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("good")
def test_a_wrong_call_is_refused_in_one_line(arguments: list[str], said: str, run: Run) -> None:
    ended = run("validate", *arguments)
    assert ended.status == 2
    assert ended.out == "" or "--json" in arguments
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert said in ended.err


def test_a_wrong_setting_of_the_project_is_named(run: Run, good: Path) -> None:
    text = '[tool.vera-convert.validate]\nignore = ["V2180"]\n'
    Path("pyproject.toml").write_text(text, encoding="utf-8")
    ended = run("validate", good)
    assert ended.status == 2
    assert "V2180" in ended.err


# --- hostile names -------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="such names are of POSIX")
@pytest.mark.parametrize("form", ["text", "json", "sarif", "junit", "github"])
def test_hostile_names_reach_no_terminal(form: str, run: Run) -> None:
    name = "::error::\x1b[31m\u202e\n]]><script>|`%0A"
    folder = good_adapter(Path(name))
    fields({name: 1})(folder)
    ended = run("validate", folder, "./gone\u202e\x1b", "--format", form)
    shown = ended.out + ended.err
    assert all(line.isprintable() for line in shown.split("\n"))
    commands = [line for line in shown.split("\n") if line.lstrip().startswith("::")]
    assert len(commands) == (3 if form == "github" else 0)
    assert not any(line.startswith("::error::") for line in commands)


# --- the library ---------------------------------------------------------------------------------


def test_the_function_gives_the_result_of_the_command(run: Run, bad: Path) -> None:
    result = vera_convert.validate([bad], ignore=["V122"])
    assert isinstance(result, vera_convert.Validation)
    assert isinstance(result.adapters[0], vera_convert.Checked)
    assert [finding.code for finding in result.findings] == [BAD_CODES[0], *BAD_CODES[2:]]
    assert result.status == run("validate", bad).status == 1


def test_an_adapter_that_peft_wrote_is_good(run: Run) -> None:
    folder = DATA / "minilm-vera" / "save_projection_true"
    ended = run("validate", folder)
    assert (ended.status, ended.err) == (0, "")
    assert "embedded: the float32-fused draw of key 20240607" in ended.out
