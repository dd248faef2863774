"""Adapters of other methods in a tree with VeRA adapters: named, skipped, never called good."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from adapters import good_adapter
from bases import tiny_base
from commandline import Run
from safetensors.numpy import save_file

from vera_convert.conversion.migration import migrate_tree
from vera_convert.errors import SurroundingsError
from vera_convert.lora.conversion import to_lora
from vera_convert.lora.engines import EngineName, Form
from vera_convert.lora.options import LoraOptions
from vera_convert.validation.validate import validate

SchemaErrors = Callable[..., list[str]]


def other(folder: Path, method: str, *, weights: bool = True) -> None:
    """Write an adapter of another method, with the files that PEFT writes for the method."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": method, "r": 8}))
    if weights:
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        save_file({name: np.zeros((8, 16), "f4")}, folder / "adapter_model.safetensors")


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Write two VeRA adapters, two LoRAs, and a prompt tuning adapter without weights."""
    tree = tmp_path / "tree"
    for name in ("a", "b"):
        good_adapter(tree / "vera" / name)
        other(tree / "lora" / name, "LORA")
    other(tree / "prompt", "PROMPT_TUNING", weights=False)
    return tree


def test_ignoring_the_rule_skips_other_methods(mixed: Path, run: Run) -> None:
    assert run("validate", "--recursive", mixed).status == 1
    ended = run("validate", "--recursive", mixed, "--ignore", "V101")
    assert ended.status == 0
    assert "5 adapters: 2 good, 3 of other methods passed over" in ended.out
    assert "passed over (PROMPT_TUNING)" in ended.out
    assert "V011" not in ended.out


def test_the_only_finding_about_another_method_is_the_method(mixed: Path) -> None:
    (mixed / "lora/a/adapter_model.safetensors").write_bytes(b"\x00")
    (mixed / "lora/b/adapter_model.bin").write_bytes(b"pickle")
    (mixed / "lora/b/optimizer.pt").write_bytes(b"state")
    found = validate(mixed, recursive=True)
    methods = {each.label: each.other_method for each in found.adapters if each.other_method}
    assert sorted(methods.values()) == ["LORA", "LORA", "PROMPT_TUNING"]
    for each in found.adapters:
        if each.other_method:
            assert [finding.code for finding in each.findings] == ["V101"]
            assert each.not_checked == ()


@pytest.mark.parametrize("config", [{}, {"peft_type": None}, {"peft_type": "vera"}])
def test_a_damaged_config_is_not_that_of_another_method(
    config: dict[str, object], mixed: Path
) -> None:
    (mixed / "vera/a/adapter_config.json").write_text(json.dumps({"r": 4, **config}))
    found = {each.label: each for each in validate(mixed, recursive=True).adapters}
    assert found[str(mixed / "vera/a")].other_method is None
    assert migrate_tree(mixed, mixed.parent / "out", to="asis").failed.keys() == {"vera/a"}


def test_errors_that_are_not_selected_are_not_good_either(mixed: Path, run: Run) -> None:
    (mixed / "vera/a/adapter_model.safetensors").unlink()
    ended = run("validate", "--recursive", mixed, "--ignore", "V101,V011")
    assert ended.status == 0
    assert "1 good, 1 with errors that are not selected, 3 of other methods" in ended.out


def test_no_format_counts_other_methods_as_good(mixed: Path, run: Run) -> None:
    ended = run("validate", "--recursive", mixed, "--ignore", "V101", "--format", "junit")
    passed = {
        case.get("classname")
        for case in ET.fromstring(ended.out).iter("testcase")  # noqa: S314 -- our own
        if case.find("skipped") is None and case.get("name") == "no finding"
    }
    assert not [name for name in passed if name and "vera" not in name]


def test_migrate_of_a_tree_skips_other_methods(
    mixed: Path, tmp_path: Path, run: Run, schema_errors: SchemaErrors
) -> None:
    ended = run("migrate", mixed, tmp_path / "out", "--recursive", "--to", "asis")
    assert ended.status == 0
    assert "2 adapters of LORA: lora/a, lora/b" in ended.out
    assert "1 adapter of PROMPT_TUNING: prompt" in ended.out
    assert "wrote 2 of 2 adapters" in ended.out
    written = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").glob("*/*"))
    assert written == [Path("vera/a"), Path("vera/b")]
    again = run("migrate", mixed, tmp_path / "two", "--recursive", "--to", "asis", "--json")
    assert schema_errors("migration", again.document) == []
    assert again.document["passed_over"]["prompt"] == "PROMPT_TUNING"


def test_a_tree_with_only_other_methods_has_nothing_to_migrate(tmp_path: Path) -> None:
    other(tmp_path / "tree" / "a", "LORA")
    with pytest.raises(SurroundingsError, match=r"no VeRA .* the one adapter there is LORA"):
        migrate_tree(tmp_path / "tree", tmp_path / "out", to="asis")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["info", "strip", "embed", "migrate", "merge"])
def test_an_adapter_named_on_the_command_line_is_refused_only_for_its_method(
    command: str, mixed: Path, tmp_path: Path, run: Run
) -> None:
    words = [command, mixed / "prompt"]
    words += [] if command == "info" else [tmp_path / "out"]
    words += ["--to", "asis"] if command == "migrate" else []
    ended = run(*words)
    assert ended.status == 1
    assert "V101" in ended.err
    assert "more" not in ended.err


CHECK = "`vera-convert verify ADAPTER --lora LORA`"


def made(folder: Path, form: Form) -> Path:
    """Convert the VeRA adapter ``mine`` to a LoRA, and keep the files of a form."""
    if form is Form.GGUF:
        pytest.importorskip("gguf")
    heads = {"num_attention_heads": 2, "num_hidden_layers": 2}
    of_pipeline = {"_class_name": "ATransformer"} if form is Form.DIFFUSERS else {}
    config = {"model_type": "llama", **heads, **of_pipeline}
    base, adapter = tiny_base(folder / "base", config=config), good_adapter(folder / "mine")
    to_lora(adapter, folder / "lora", base=base, options=LoraOptions(engine=EngineName(form)))
    return folder / "lora"


@pytest.mark.parametrize("form", Form)
def test_a_lora_of_ours_names_its_adapter_and_the_command_that_checks_it(
    form: Form, tmp_path: Path, run: Run
) -> None:
    lora = made(tmp_path, form)
    ended = run("validate", lora)
    assert ended.status == 1
    for text in ("V101", 'vera-convert made this LoRA from the VeRA adapter "mine"', CHECK):
        assert text in " ".join(ended.out.split())
    for command in ("info", "strip", "embed", "migrate", "merge", "to-lora"):
        words: list[object] = [command, lora, *([] if command == "info" else [tmp_path / "out"])]
        ended = run(*words, *(["--to", "asis"] if command == "migrate" else []))
        assert ended.status == 1
        assert "V101" in ended.err
        assert 'from the VeRA adapter "mine"' in ended.err
    assert not (tmp_path / "out").exists()


def test_a_lora_of_another_program_is_called_a_lora(tmp_path: Path, run: Run) -> None:
    other(tmp_path / "peft", "LORA")
    other(tmp_path / "mlx", "LORA", weights=False)
    (tmp_path / "mlx" / "adapter_config.json").write_text('{"fine_tune_type": "lora"}')
    save_file({"a": np.zeros(1, "f4")}, tmp_path / "mlx" / "adapters.safetensors")
    (tmp_path / "diffusers").mkdir()
    name = "pytorch_lora_weights.safetensors"
    save_file({"unet.a.lora_A.weight": np.zeros((1, 1), "f4")}, tmp_path / "diffusers" / name)
    for folder in ("peft", "mlx", "diffusers"):
        for command in ("validate", "info"):
            ended = run(command, tmp_path / folder)
            assert ended.status == 1
            told = " ".join((ended.out + ended.err).split())
            assert "V101" in told
            assert "is a LoRA" in told
            assert CHECK in told


@pytest.mark.parametrize(
    "record", ['{"source": 5}', '{"source": {"folder": ["x"]}}', "[]", "{", '{"source": null}']
)
def test_a_malformed_record_does_not_hide_that_the_adapter_is_a_lora(
    record: str, tmp_path: Path, run: Run
) -> None:
    other(tmp_path / "lora", "LORA", weights=False)
    metadata = {"format": "pt", "vera_convert.lora": record}
    path = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({"a": np.zeros(1, "f4")}, path, metadata)
    ended = run("info", tmp_path / "lora")
    assert ended.status == 1
    assert CHECK in ended.err
