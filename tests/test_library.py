"""The library in Python: names, signatures, docstrings with examples that run, and `repr`s."""

from __future__ import annotations

import ast
import copy
import dataclasses
import doctest
import inspect
import pickle
import shutil
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from adapters import good_adapter
from folders import DATA
from merges import filled_base

import vera_convert
from vera_convert import Finding, Rule, Severity, UsageError

PUBLIC = {name: getattr(vera_convert, name) for name in vera_convert.__all__}
FUNCTIONS = sorted(name for name, value in PUBLIC.items() if inspect.isfunction(value))
CLASSES = sorted(name for name, value in PUBLIC.items() if inspect.isclass(value))
MADE_BY_CALLERS = ["AdapterSpec", "BaseOptions", "HubAccess", "LoraOptions", "MergeOptions"]
EXAMPLES = [*FUNCTIONS, *MADE_BY_CALLERS, "VerifyOptions", "Finding"]
FOLDERS = ("adapter", "base", "tree", "broken")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    good_adapter(folder / "adapter", base_model_name_or_path="org/model")
    good_adapter(folder / "tree" / "one")
    good_adapter(folder / "broken", r=0)
    filled_base(folder / "base")
    return folder


@pytest.fixture
def here(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in a folder with an adapter, its base, a tree of adapters and a broken adapter."""
    for name in FOLDERS:
        shutil.copytree(inputs / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_stub_lists_each_name_once_and_every_name_can_be_loaded() -> None:
    stub = (Path(vera_convert.__file__).with_suffix(".pyi")).read_text(encoding="ascii")
    tree = ast.parse(stub)
    aliases = [
        alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    names = [alias.name for alias in aliases]
    assert [*names] == [*vera_convert.__all__]
    assert sorted(names) == dir(vera_convert)
    assert len(names) == len({*names})
    assert all(alias.name == alias.asname for alias in aliases)
    assert all(value is not None for value in PUBLIC.values())
    with pytest.raises(AttributeError):
        _ = vera_convert.nothing_of_this_name  # type: ignore[attr-defined]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_the_docstrings_run(name: str) -> None:
    value = PUBLIC[name]
    found = [
        example
        for example in doctest.DocTestFinder(recurse=False).find(value, name)
        if example.examples
    ]
    assert found, f"{name} has no example"
    module = inspect.getmodule(value)
    for example in found:
        example.globs = {**vars(module), **example.globs}
        runner = doctest.DocTestRunner(verbose=False)
        output: list[str] = []
        runner.run(example, out=output.append)
        assert runner.failures == 0, "".join(output)


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_every_public_name_is_documented(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name])
    assert text
    value = PUBLIC[name]
    if inspect.isfunction(value):
        for parameter in inspect.signature(value).parameters:
            assert f" {parameter}: " in text, parameter
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            assert f" {field.name}: " in text, field.name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_signature_reads_as_a_caller_writes_it(name: str) -> None:
    for parameter in inspect.signature(PUBLIC[name]).parameters.values():
        assert not inspect.isfunction(parameter.default), parameter
        assert parameter.annotation is not inspect.Parameter.empty


def results() -> dict[str, Any]:
    adapter, base = "adapter", "base"
    return {
        "info": vera_convert.info(adapter, base=base),
        "validate": vera_convert.validate(adapter, base=base),
        "checked": vera_convert.validate("broken").adapters[0],
        "strip": vera_convert.strip(adapter, "stripped", base=base),
        "migrate_tree": vera_convert.migrate_tree("tree", "trees", to="asis"),
        "regenerate": vera_convert.regenerate_for(adapter, "ab.safetensors"),
        "merge": vera_convert.merge(adapter, "merged", base=base),
        "to_lora": vera_convert.to_lora(adapter, "lora", base=base),
        "count": vera_convert.count(base, rank=4, targets="q_proj"),
        "verify": vera_convert.verify(adapter, other="stripped"),
    }


@pytest.mark.usefixtures("here")
def test_the_repr_of_a_result_is_one_short_line_that_names_its_facts() -> None:
    for name, result in results().items():
        assert len(repr(result)) < 400, name
        assert repr(result).startswith(f"{type(result).__name__}("), name
        assert "\n" not in repr(result)
    assert "location='adapter'" in repr(vera_convert.info("adapter"))
    assert "findings=<1>" in repr(vera_convert.validate("broken").adapters[0])


@pytest.mark.usefixtures("here")
def test_results_and_options_can_be_pickled_and_copied() -> None:
    options = {name: PUBLIC[name]() for name in CLASSES if name.endswith("Options")}
    assert len(options) >= 4
    for name, value in {**results(), **options}.items():
        assert repr(pickle.loads(pickle.dumps(value))) == repr(value), name  # noqa: S301
        assert repr(copy.deepcopy(value)) == repr(value), name


@pytest.mark.usefixtures("here")
def test_the_findings_of_every_result_are_a_tuple_that_can_be_read_twice() -> None:
    for name, result in results().items():
        if hasattr(result, "findings"):
            assert isinstance(result.findings, tuple), name
    found = vera_convert.validate("broken")
    assert [*found.findings] == [*found.findings] != []


@pytest.mark.usefixtures("here")
def test_findings_rules_and_severities_are_public() -> None:
    finding = vera_convert.validate("broken").findings[0]
    assert isinstance(finding, Finding)
    assert isinstance(finding.rule, Rule)
    assert finding.severity is Severity.ERROR
    assert issubclass(Severity, Enum)


def test_count_takes_a_config_in_every_form() -> None:
    import json

    file = DATA / "configs" / "llama-3.2-3b.json"
    expected = vera_convert.count(file, rank=4, targets="q_proj")
    document = json.loads(file.read_bytes())

    class Config:
        def to_dict(self) -> dict[str, object]:
            return document  # type: ignore[no-any-return]

    assert vera_convert.count(document, rank=4, targets="q_proj") == expected
    assert vera_convert.count(Config(), rank=4, targets="q_proj") == expected
    with pytest.raises(UsageError, match="revision has no effect"):
        vera_convert.count(document, rank=4, revision="main")


def test_count_takes_a_config_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    counted = vera_convert.count(config, rank=4, targets="q_proj")
    assert counted.layers == 2
    assert counted.vera.parameters == 2 * (4 + 16)
