"""The catalog of rules is complete and in order, and a test provokes every rule."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import adapterdefects
import pytest
from adapterdefects import AdapterDefect, bare, codes, embedding, opening, running_info, stripping
from adapters import good_adapter
from defects import DEFECTS, Defect

from vera_convert import rules
from vera_convert.rules import CATALOG, Rule

HERE = Path(__file__).parent
PROVOKED = {case.code for case in DEFECTS}


PACKAGE = Path(rules.__file__).parent
WRITTEN = tomllib.loads(Path(rules.__file__).with_suffix(".toml").read_text(encoding="utf-8"))
"""The rules as a TOML reader returns the catalog's file."""


def test_codes_stand_in_order_and_only_once() -> None:
    codes = [rule["code"] for rule in WRITTEN.values()]
    assert codes == sorted(set(codes))
    assert codes == [*CATALOG]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_rule_reads_as_it_is_written(name: str) -> None:
    rule = getattr(rules, name)
    assert rule is CATALOG[rule.code]
    assert {field: str(getattr(rule, field)) for field in WRITTEN[name]} == WRITTEN[name]
    assert [*WRITTEN[name]] == ["code", "severity", "title", "why", "remedy", "since"]


def test_the_package_uses_every_rule() -> None:
    used = {
        node.attr
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "rules"
    }
    assert WRITTEN.keys() <= used


@pytest.mark.parametrize("rule", CATALOG.values(), ids=lambda rule: rule.code)
def test_a_rule_says_what_why_and_what_to_do(rule: Rule) -> None:
    assert re.fullmatch(r"V[0-7]\d\d", rule.code)
    assert rule.title[0].islower() or rule.title.startswith(("JSON", "PEFT", "__"))
    assert not rule.title.endswith(".")
    assert rule.why.endswith(".")
    assert rule.remedy.endswith((".", '"'))
    assert all(text.isprintable() for text in (rule.title, rule.why, rule.remedy))


def test_a_finding_has_its_file_and_tensor_as_fields() -> None:
    in_file = rules.FILE_EMPTY.in_file("a.json", "x.")
    assert (in_file.place, in_file.file, in_file.tensor) == ("a.json", "a.json", None)
    tensor = rules.EMPTY_TENSOR.in_tensor("a\n", "x.")
    assert (tensor.place, tensor.file, tensor.tensor) == ("a\\n", None, "a\n")
    both = rules.EMPTY_TENSOR.in_tensor("a", "x.", file="m.safetensors")
    assert (both.place, both.file) == ('m.safetensors tensor "a"', "m.safetensors")
    layer = rules.LAMBDA_UNPAIRED.at("model.layers.0", "x.")
    assert (layer.file, layer.tensor) == (None, None)


@pytest.mark.parametrize("code", CATALOG)
def test_every_rule_is_provoked(code: str) -> None:
    """A defect breaks the rule, or the text of a test names the rule's code."""
    named = (code in path.read_text(encoding="utf-8") for path in HERE.rglob("test_*.py"))
    assert code in PROVOKED or (code.startswith(("V006", "V3", "V5", "V6", "V7")) and any(named))


def test_every_defect_breaks_a_rule() -> None:
    assert CATALOG.keys() >= PROVOKED


OF_ADAPTERS = [case for case in DEFECTS if case.on == "adapter" and case.possible]


@pytest.mark.parametrize("case", OF_ADAPTERS, ids=lambda case: case.name)
def test_a_spoiled_adapter_breaks_only_the_rule_of_its_defect(tmp_path: Path, case: Defect) -> None:
    folder = good_adapter(tmp_path / "adapter")
    case.spoil(folder)
    find = case.find if isinstance(case, AdapterDefect) else opening
    assert set(codes(find, folder)) == {case.code}


@pytest.mark.parametrize(
    "find",
    [opening, running_info(), stripping(), embedding()],
    ids=["open", "info", "strip", "embed"],
)
def test_the_good_adapter_breaks_no_rule(tmp_path: Path, find: adapterdefects.Finder) -> None:
    assert codes(find, good_adapter(tmp_path / "adapter")) == []


@pytest.mark.parametrize(
    "find", [opening, running_info(), stripping()], ids=["open", "info", "strip"]
)
def test_the_stripped_good_adapter_breaks_no_rule(
    tmp_path: Path, find: adapterdefects.Finder
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    bare(folder)
    assert codes(find, folder) == []
