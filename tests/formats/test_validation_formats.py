"""A validation and the catalog in every format: complete, and safe with hostile texts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import click
import pytest
from commandline import COMMANDS
from jsonschema import Draft202012Validator
from rulespage import rules_page
from sarif import SARIF

from vera_convert.draws.generator import Draw, Variant
from vera_convert.errors import SurroundingsError, UsageError
from vera_convert.formats.catalog import explanation, rules_document, rules_text
from vera_convert.formats.document import result_document
from vera_convert.formats.github import github_text, job_summary
from vera_convert.formats.junit import junit_text
from vera_convert.formats.reports import RENDERERS, report_text
from vera_convert.formats.sarif import sarif_document, sarif_text
from vera_convert.formats.validation import validation_text
from vera_convert.rules import (
    CATALOG,
    CONFIG_MISSING,
    DATA_CUT_OFF,
    HEAD_SHARED,
    LAMBDA_COLUMN,
    LFS_POINTER,
    NOT_VERA,
    PICKLE_ONLY,
    REVISION_MISSING,
    SHAPE_FORM,
    TRAINING_STATE,
    UNKNOWN_FIELD,
    Severity,
)
from vera_convert.text import printable, wrapped
from vera_convert.validation.result import Checked, Validation

SchemaErrors = Callable[..., list[str]]
ROOT = Path(__file__).parents[2]

DRAW = Draw(Variant.FLOAT32_FUSED, 7, 4, 16, 16)
COLUMN = "base_model.model.layers.{}.q_proj.vera_lambda_b"
GOOD = Checked("runs/good", "runs/good", draw=DRAW, embedded=True)
BAD = Checked(
    "runs/bad",
    "runs/bad",
    (
        REVISION_MISSING.at("adapter_config.json", "revision is null."),
        LAMBDA_COLUMN.at(COLUMN.format(0), "its shape is [16, 1]."),
        LAMBDA_COLUMN.at(COLUMN.format(1), "its shape is [16, 1]."),
        LAMBDA_COLUMN.at(COLUMN.format(2), "its shape is [8, 1]."),
    ),
    embedded=False,
    not_checked=("the base: mend the errors first.",),
)
WARNED = Checked(
    "runs/warned",
    "runs/warned",
    (UNKNOWN_FIELD.in_file("adapter_config.json", "there is a field x."),),
    base="org/base@main",
)
REMOTE = Checked(
    "org/name@0123456789abcdef",
    None,
    bytes_read=12345,
    not_checked=("values: --deep fetches them.", "the base: mend the errors first."),
)
GONE = Checked("gone", "gone", failure=SurroundingsError("there is no folder gone."))

CALLS = {
    "good": Validation((GOOD,)),
    "bad": Validation((BAD,)),
    "remote": Validation((REMOTE,)),
    "gone": Validation((GONE,)),
    "many": Validation((GOOD, BAD, WARNED, REMOTE, GONE)),
    "strict": Validation((GOOD, WARNED), Severity.WARNING),
}
every_call = pytest.mark.parametrize("result", CALLS.values(), ids=CALLS)


def as_printed(document: object) -> Any:
    return json.loads(json.dumps(document, allow_nan=False))


def sarif_run(result: Validation) -> Any:
    (run,) = json.loads(sarif_text(result))["runs"]
    return run


# --- every format --------------------------------------------------------------------------------

# To add a format, add a function that reads the codes of a report; otherwise a test below fails.
CODES_OF: dict[str, Callable[[str], set[str]]] = {
    "text": lambda report: {*re.findall(r"(?m)^  (?:error|warning|note) +(V\d{3})  ", report)},
    "json": lambda report: {
        found["code"] for checked in json.loads(report)["adapters"] for found in checked["findings"]
    },
    "sarif": lambda report: {
        result["ruleId"] for run in json.loads(report)["runs"] for result in run["results"]
    },
    "junit": lambda report: {
        code
        for element in ET.fromstring(report).iter()  # noqa: S314 -- our own text
        for text in (*element.attrib.values(), element.text or "")
        for code in re.findall(r"\bV\d{3}\b", text)
    },
    "github": lambda report: {
        *re.findall(r"^::(?:error|warning|notice) .*?(V\d{3}) ", report, re.MULTILINE)
    },
}
"""A function for each format that reads the codes of the findings from a report."""


@every_call
@pytest.mark.parametrize("form", RENDERERS)
def test_a_report_in_every_format_holds_the_codes_of_all_findings(
    form: str, result: Validation
) -> None:
    expected = {finding.code for finding in result.findings}
    assert CODES_OF[form](report_text(result, form)) == expected


def test_every_format_of_the_command_line_has_a_renderer_and_a_reader() -> None:
    (option,) = (each for each in COMMANDS["validate"].params if each.name == "form")
    assert isinstance(option.type, click.Choice)
    assert [*option.type.choices] == [*RENDERERS]
    assert {*CODES_OF} == {*RENDERERS}


# --- text ----------------------------------------------------------------------------------------


def test_the_text_of_a_good_adapter() -> None:
    assert validation_text(CALLS["good"]) == (
        "runs/good: good\n"
        "  A and B      embedded: the float32-fused draw of key 7 for r = 4, 16 inputs, 16 outputs"
    )


def test_the_text_of_many_adapters() -> None:
    assert validation_text(CALLS["many"], width=80) == (
        """\
runs/bad: 3 errors, 1 note
  error    V218  a lambda is stored as a column of shape (n, 1)
           base_model.model.layers.0.q_proj.vera_lambda_b,
           base_model.model.layers.1.q_proj.vera_lambda_b: its shape is [16, 1].
           base_model.model.layers.2.q_proj.vera_lambda_b: its shape is [8, 1].
           Remedy: Correct the shape with `vera-convert migrate --to asis`.
  note     V122  the config names no revision of the base
           adapter_config.json: revision is null.
           Remedy: Set revision to the commit used in training.

runs/warned: 1 warning
  warning  V110  the config has an unknown field
           adapter_config.json: there is a field x.
           Remedy: For PEFT 0.13 and earlier,
             `vera-convert migrate --to asis --peft-version 0.13` removes the
             field.

gone: not read
  there is no folder gone.

runs/good
  good; embedded: float32-fused, key 7
runs/bad
  3 errors, 1 note; stripped
runs/warned
  1 warning
org/name@0123456789abcdef
  good; 12,345 bytes read
gone
  not read

Compared with the base org/base@main (1 of them)
Not checked: the base: mend the errors first (2 of them)
Not checked: values: --deep fetches them (1 of them)

5 adapters: 2 good, 2 with errors or warnings, 1 not read; 3 errors, 1 warning,
  1 note
`vera-convert validate --explain CODE` says why a finding matters."""
    )


def test_a_narrow_window_shows_the_values_below_each_adapter() -> None:
    table = "result            A and B                         bytes read  adapter\n"
    assert table in validation_text(CALLS["many"])
    assert table in validation_text(CALLS["many"], width=95)
    text = validation_text(CALLS["many"], width=60)
    assert table not in text
    assert "org/name@0123456789abcdef\n  good; 12,345 bytes read\n" in text


def test_the_text_of_a_single_adapter_has_further_lines() -> None:
    text = validation_text(CALLS["remote"])
    assert "read         12,345 bytes of the repo" in text
    assert text.splitlines()[-2:] == [
        "  not checked  values: --deep fetches them.",
        "               the base: mend the errors first.",
    ]
    assert "base         org/base@main" in validation_text(Validation((WARNED,)))


def test_the_text_says_that_a_warning_fails_the_call() -> None:
    assert "(each warning fails this call)" in validation_text(CALLS["strict"])
    assert "fails this call" not in validation_text(Validation((GOOD, WARNED)))


@every_call
def test_color_does_not_change_the_text(result: Validation) -> None:
    plain, colored = validation_text(result), validation_text(result, color=True)
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == plain
    assert colored.count("\x1b[0m") == len(re.findall(r"\x1b\[[1-9]", colored)) > 0


@pytest.mark.parametrize("width", [60, 80, 100])
@every_call
def test_lines_are_not_wider_than_the_given_width(result: Validation, width: int) -> None:
    text = validation_text(result, width=width)
    assert all(line == line.rstrip() for line in text.splitlines())
    blocks = re.sub(r"(?ms)^result .*?\n\n|^\d+ adapters?: .*", "", text)
    assert all(len(line) <= width for line in blocks.splitlines() if "`" not in line)


def test_a_command_is_not_wrapped() -> None:
    (line,) = [line for line in wrapped(PICKLE_ONLY.remedy, 60) if "python -c" in line]
    assert line.startswith('python -c "import torch;')
    assert line.endswith("metadata={'format': 'pt'})\"")


# --- JSON ----------------------------------------------------------------------------------------


@every_call
def test_the_document_satisfies_its_schema(result: Validation, schema_errors: SchemaErrors) -> None:
    document = as_printed(result_document(result))
    assert schema_errors("validation", document) == []
    assert document["status"] == result.status
    assert sum(document["counts"].values()) == len([*result.findings])
    told = [finding["code"] for each in document["adapters"] for finding in each["findings"]]
    assert told == [finding.code for finding in result.findings]
    assert [each["failure"] is None for each in document["adapters"]] == [
        checked.failure is None for checked in result.adapters
    ]


def test_the_schema_is_strict(schema_errors: SchemaErrors) -> None:
    document = as_printed(result_document(CALLS["many"]))
    for spoilt in ({}, {**document, "format": 2}, {**document, "status": 4}, {**document, "x": 1}):
        assert schema_errors("validation", spoilt)
    assert schema_errors("rules", {"format": 1})


# --- SARIF ---------------------------------------------------------------------------------------


@every_call
def test_the_log_is_sarif(result: Validation) -> None:
    text = sarif_text(result)
    assert text.isascii()
    document = json.loads(text)
    assert document == sarif_document(result)
    assert [*Draft202012Validator(SARIF).iter_errors(document)] == []
    run = sarif_run(result)
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == [*CATALOG]
    for told, finding in zip(run["results"], result.findings, strict=True):
        assert told["ruleId"] == finding.code
        assert run["tool"]["driver"]["rules"][told["ruleIndex"]]["id"] == finding.code
        assert told["level"] == finding.severity
        assert finding.rule.remedy in told["message"]["text"]
    hashes = [str(told["partialFingerprints"]) for told in run["results"]]
    assert len({*hashes}) == len(hashes)


def test_the_schema_of_the_log_is_strict() -> None:
    document = sarif_document(CALLS["bad"])
    assert [*Draft202012Validator(SARIF).iter_errors({**document, "version": "2.0.0"})]
    document["runs"][0]["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"] = {  # type: ignore[index]
        "uri": "a b"
    }
    assert [*Draft202012Validator(SARIF).iter_errors(document)]


def test_an_adapter_that_could_not_be_read_is_a_notification() -> None:
    (invocation,) = sarif_run(CALLS["many"])["invocations"]
    assert not invocation["executionSuccessful"]
    assert invocation["exitCode"] == 1
    levels = [each["level"] for each in invocation["toolExecutionNotifications"]]
    assert levels == ["error", "note", "note", "note"]
    assert sarif_run(CALLS["bad"])["invocations"][0]["executionSuccessful"]


@pytest.mark.parametrize(
    ("path", "finding", "uri"),
    [
        ("a", NOT_VERA.in_file("adapter_config.json", "x."), "a/adapter_config.json"),
        ("a/", NOT_VERA.at("peft_type", "x."), "a/adapter_config.json"),
        ("./a", LAMBDA_COLUMN.at("name", "x."), "a/adapter_model.safetensors"),
        ("../a", HEAD_SHARED.at("lm_head", "x."), "../a/adapter_config.json"),
        (".", LFS_POINTER.at("adapter_model.safetensors", "x."), "adapter_model.safetensors"),
        ("a", LFS_POINTER.in_file("README.md", "x."), "a/README.md"),
        ("a", TRAINING_STATE.in_file("deep/optimizer.pt", "x."), "a/deep/optimizer.pt"),
        ("b/a", CONFIG_MISSING.at("a", "x."), "b/a/adapter_config.json"),
        ("b/a", PICKLE_ONLY.at("a", "x."), "b/a/adapter_model.safetensors"),
        ("a", LFS_POINTER.in_file("../b", "x."), "a/adapter_model.safetensors"),
        ("a", LFS_POINTER.in_file("/etc/x", "x."), "a/adapter_model.safetensors"),
        ("a", SHAPE_FORM.in_tensor("a/b", "x.", file="x.safetensors"), "a/x.safetensors"),
        ("a", DATA_CUT_OFF.in_file("adapter_config.json", "x."), "a/adapter_config.json"),
        ("/t/a", NOT_VERA.in_file("adapter_config.json", "x."), "file:///t/a/adapter_config.json"),
        ("C:/a", NOT_VERA.at("x", "x."), "file:///C:/a/adapter_config.json"),
        ("x:y/a b%", NOT_VERA.at("x", "x."), "x%3Ay/a%20b%25/adapter_config.json"),
        ("\u00e9\udcff", NOT_VERA.at("x", "x."), "%C3%A9%FF/adapter_config.json"),
        (None, LAMBDA_COLUMN.at("x", "x."), "hf://org/n@c/adapter_model.safetensors"),
    ],
)
def test_a_finding_lies_in_a_file_of_the_adapter(path: str | None, finding: Any, uri: str) -> None:
    label = "org/n@c" if path is None else printable(path)
    result = Validation((Checked(label, path, (finding,)),))
    assert [*Draft202012Validator(SARIF).iter_errors(sarif_document(result))] == []
    (told,) = sarif_run(result)["results"]
    assert told["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == uri


def test_the_hash_depends_on_repo_and_place_but_not_on_commit_and_numbers() -> None:
    def hashed(label: str, place: str, reason: str) -> str:
        checked = Checked(label, None, (LAMBDA_COLUMN.at(place, reason),))
        (told,) = sarif_run(Validation((checked,)))["results"]
        return str(told["partialFingerprints"])

    first = hashed("org/name@1", "x", "off by 1.")
    assert hashed("org/name@2", "x", "off by 2.") == first
    assert hashed("org/name@1", "y", "off by 1.") != first
    assert hashed("org/other@1", "x", "off by 1.") != first


def test_two_findings_in_one_place_have_two_hashes() -> None:
    twice = (LAMBDA_COLUMN.at("x", "odd."), LAMBDA_COLUMN.at("x", "even."))
    told = sarif_run(Validation((Checked("a", "a", twice),)))["results"]
    hashes = [each["partialFingerprints"]["primaryLocationLineHash"] for each in told]
    assert [each[-2:] for each in hashes] == [":1", ":2"]
    assert hashes[0][:-2] == hashes[1][:-2]


# --- JUnit ---------------------------------------------------------------------------------------


def junit(result: Validation) -> ET.Element:
    text = junit_text(result)
    assert text.isascii()
    return ET.fromstring(text)  # noqa: S314 -- our own text


@every_call
def test_the_counts_of_the_suites_are_sums(result: Validation) -> None:
    root = junit(result)
    suites = root.findall("testsuite")
    assert [suite.get("name") for suite in suites] == [each.label for each in result.adapters]
    names = {"tests": "testcase", "failures": "testcase/failure", "errors": "testcase/error"}
    names["skipped"] = "testcase/skipped"
    for count, path in names.items():
        assert [int(suite.get(count, -1)) for suite in suites] == [
            len(suite.findall(path)) for suite in suites
        ]
        assert root.get(count) == str(sum(int(suite.get(count, -1)) for suite in suites))
    assert all(suite.findall("testcase") for suite in suites)
    failed = bool(root.findall("testsuite/testcase/failure"))
    assert failed is (result.status == 1)
    assert bool(root.findall("testsuite/testcase/error")) is any(
        checked.failure for checked in result.adapters
    )


def test_a_failing_case_says_what_why_and_what_to_do() -> None:
    case = junit(CALLS["strict"]).find("testsuite/testcase[failure]")
    assert case is not None
    failure = case.find("failure")
    assert failure is not None
    assert case.get("name", "").startswith("V110 the config has an unknown field")
    assert case.get("file") == "runs/warned/adapter_config.json"
    assert failure.get("type") == "V110"
    assert failure.text is not None
    assert all(text in failure.text for text in (UNKNOWN_FIELD.why, UNKNOWN_FIELD.remedy))
    passed = junit(Validation((WARNED,))).find("testsuite/testcase[system-out]")
    assert passed is not None
    assert passed.find("failure") is None


# --- GitHub --------------------------------------------------------------------------------------

COMMAND = re.compile(r"::(error|warning|notice) ((?:file=[^,:]+,)?title=[^,:]+)::(.+)")


@every_call
def test_every_finding_is_annotated(result: Validation) -> None:
    *lines, last = github_text(result).split("\n")
    assert re.match(r"\d+ adapters?: ", last)
    commands = [COMMAND.fullmatch(line) for line in lines]
    assert all(commands)
    kinds = [command[1] for command in commands if command]
    names = {"error": "error", "warning": "warning", "note": "notice"}
    expected = [
        kind
        for checked in result.adapters
        for kind in (
            *(["error"] if checked.failure else []),
            *(names[finding.severity] for finding in checked.findings),
        )
    ]
    assert kinds == expected


def test_an_annotation_names_file_code_reason_and_remedy() -> None:
    first, *_ = github_text(Validation((WARNED,))).split("\n")
    assert first == (
        "::warning file=runs/warned/adapter_config.json,"
        "title=V110 the config has an unknown field::"
        f"adapter_config.json: there is a field x. {UNKNOWN_FIELD.remedy}"
    )
    assert "title=V218 a lambda is stored as a column of shape (n%2C 1)::" in github_text(
        CALLS["bad"]
    )


def cells(line: str) -> list[str]:
    """Return the cells of a row of a table, split as GitHub does: at each pipe without a
    backslash.
    """
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@every_call
def test_the_summary_is_made_of_tables(result: Validation) -> None:
    text = job_summary(result)
    assert text.startswith("### vera-convert validate\n\n")
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(cells(line)) for line in table.splitlines()}) == 1
    assert all(f"| {finding.code} |" in text for finding in result.findings)


def test_a_long_summary_is_cut() -> None:
    findings = tuple(LAMBDA_COLUMN.at(f"x{number}", "odd.") for number in range(600))
    text = job_summary(Validation((Checked("a", "a", findings),)))
    assert text.count("V218") == 500
    assert "and 100 more findings" in text
    assert github_text(Validation((Checked("a", "a", findings),))).count("title=V218") == 600


# --- hostile texts -------------------------------------------------------------------------------

HOSTILE = [
    "\x00\x1b[31m\x07\x7f\x9b31m",
    "\u202e\u2066\u200b\ufeff\ufffe\uffff",
    "\r\n::error::x\n\u2028\u2029\x85",
    "::stop-commands::x",
    "x ::add-mask::y",
    "%0A::error::%25%",
    "]]><failure/>&amp;&#0;",
    "<script>alert(1)</script><!-- -->",
    "a|b\\|c`d``e*f_g_~~h~~",
    "[x](javascript:x) ![y](http://e.example) @user #1 www.e.example",
    "a,title=b:c",
    "\ud800\udc00 \udfff",
    "{0} {{1}} %s \\n",
    "\u6a21\u578b \U0001f600",
]


def hostile(text: str) -> Validation:
    """A validation with this text in each place that can hold another person's text.

    The texts are made printable, as the records require. The path is the name of a folder, which is
    not escaped.
    """
    shown, path = printable(text), re.sub("[/\0\ud800-\udfff]", "", text)
    checked = Checked(
        shown,
        path,
        (
            LFS_POINTER.in_file(shown, f"holds {shown}"),
            UNKNOWN_FIELD.at("adapter_config.json", f"there is a field {shown}."),
            LAMBDA_COLUMN.at(shown, f"{shown} is odd."),
        ),
        base=shown,
        not_checked=(f"{shown}.",),
    )
    failed = Checked(shown, path, failure=UsageError(f"{shown} is no folder."))
    return Validation((checked, failed))


class Markup(HTMLParser):
    """The tags, the comments and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        assert not attrs
        self.tags.add(tag)

    def handle_comment(self, data: str) -> None:
        pytest.fail(data)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
class TestHostileTexts:
    def test_as_text(self, text: str) -> None:
        for result in (hostile(text), Validation(hostile(text).adapters[:1])):
            lines = validation_text(result, width=60).split("\n")
            assert all(line.isprintable() for line in lines)
            assert not any(line.lstrip().startswith("::") for line in lines)

    def test_as_documents(self, text: str, schema_errors: SchemaErrors) -> None:
        result = hostile(text)
        assert schema_errors("validation", as_printed(result_document(result))) == []
        assert [*Draft202012Validator(SARIF).iter_errors(json.loads(sarif_text(result)))] == []
        messages = [told["message"]["text"] for told in sarif_run(result)["results"]]
        assert not any("](" in message for message in messages)

    def test_as_xml(self, text: str) -> None:
        root = junit(hostile(text))
        assert {element.tag for element in root.iter()} == {
            *("testsuites", "testsuite", "testcase", "failure", "error", "skipped", "system-out")
        }
        assert len(root.findall("testsuite/testcase/failure")) == 2
        failure = root.find("testsuite/testcase[2]/system-out")
        assert failure is not None
        assert printable(text) in (failure.text or "")

    def test_as_annotations(self, text: str) -> None:
        *lines, last = github_text(hostile(text)).split("\n")
        assert len(lines) == 4
        assert last.startswith("2 adapters: ")
        for line in lines:
            assert line.startswith("::")
            assert line.isprintable()
        # The runner ends the properties at the first two colons after the command's name.
        message = lines[2].split("::", 2)[2]
        assert message.replace("%0D", "\r").replace("%0A", "\n").replace("%25", "%") == (
            f"{printable(text)}: {printable(text)} is odd. {LAMBDA_COLUMN.remedy}"
        )
        properties = lines[0].split("::", 2)[1].split(" ", 1)[1].split(",")
        assert [each.split("=")[0] for each in properties] == ["file", "title"]

    def test_as_a_summary(self, text: str) -> None:
        summary = job_summary(hostile(text))
        assert summary.isascii()
        for table in re.findall(r"(?:^\|.*\n)+", summary, re.MULTILINE):
            assert len({len(cells(line)) for line in table.splitlines()}) == 1
        inside = "".join(re.findall("<code>(.*?)</code>", summary))
        assert not re.search(r"[\\`*_~\[\]<>|@.:!\"]|#(?!\d+;)", inside)
        page = Markup()
        page.feed(summary)
        assert page.tags == {"code"}
        assert " ".join(printable(text).split()) in page.text


# --- the catalog -------------------------------------------------------------------------------


def test_every_rule_is_listed_and_explained(schema_errors: SchemaErrors) -> None:
    lines = rules_text().splitlines()[1:]
    assert [line[:4] for line in lines] == [*CATALOG]
    for rule, line in zip(CATALOG.values(), lines, strict=True):
        assert line.endswith(rule.title)
        assert rule.severity in line
    text = explanation(CATALOG.values(), width=10_000)
    for rule in CATALOG.values():
        assert f"{rule.code}      {rule.title}\n" in text
        assert all(f"  {part}\n" in text for part in (rule.why, rule.remedy))
    document = as_printed(rules_document(CATALOG.values()))
    assert schema_errors("rules", document) == []
    assert document["rules"][0]["remedy"] == CATALOG["V001"].remedy


def test_a_rule_explained() -> None:
    assert explanation([CATALOG["V218"]], width=60) == (
        """\
V218      a lambda is stored as a column of shape (n, 1)
severity  error: the checkpoint cannot be loaded, loads
          wrongly, or would lose data
why       PEFT 0.15 and earlier write this shape after a
          merge on a 16-bit model; PEFT cannot load the
          file.
remedy    Correct the shape with
          `vera-convert migrate --to asis`.
since     0.1.0"""
    )


def test_the_page_of_the_rules_agrees_with_the_catalog() -> None:
    """If this test fails, run `make docs`, which writes the page."""
    page = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    assert page == rules_page()
    assert [*re.findall(r"^### (V\d{3})$", page, re.MULTILINE)] == [*CATALOG]
