"""Options without an effect are told; a base's folder is told apart from its parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from adapters import good_adapter
from commandline import Run
from merges import INDEX, filled_base

from vera_convert.verification import model_comparison


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return good_adapter(tmp_path / "adapter")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return filled_base(tmp_path / "base")


@pytest.mark.parametrize(
    ("options", "place"),
    [
        (["--key-map", "nothing.here=model"], "--key-map nothing.here=model"),
        (["--dequantize"], "--dequantize"),
    ],
)
def test_an_option_of_merge_without_an_effect_is_told(
    options: list[str], place: str, run: Run, adapter: Path, base: Path
) -> None:
    tmp_path = adapter.parent
    ended = run("merge", adapter, tmp_path / "out", "--base", base, *options)
    assert ended.status == 0
    assert f"warning: V564 {place}: " in ended.err
    assert "V555" not in ended.err
    plain = run("merge", adapter, tmp_path / "plain", "--base", base)
    assert plain.err == ""
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_a_key_map_that_matches_is_no_warning(run: Run, adapter: Path, base: Path) -> None:
    assert "V564" not in run("info", adapter, "--base", base, "--key-map", "model=model").err


@pytest.mark.parametrize(("version", "told"), [("9.9", True), ("0.21.2", False), ("0.13", False)])
def test_a_version_of_peft_that_nobody_knows_is_told(
    version: str, told: bool, run: Run, adapter: Path, tmp_path: Path
) -> None:
    ended = run("migrate", adapter, tmp_path / "out", "--to=asis", "--peft-version", version)
    assert ended.status == 0
    assert ("V564 --peft-version: " in ended.err) is told


def test_a_model_in_a_subfolder_is_named(
    run: Run, adapter: Path, base: Path, tmp_path: Path
) -> None:
    pipeline = tmp_path / "sentences"
    shutil.copytree(base, pipeline / "0_Transformer")
    (pipeline / "modules.json").write_text("[]")
    ended = run("merge", adapter, tmp_path / "out", "--base", pipeline)
    assert ended.status == 1
    assert f"V501 {pipeline}: " in ended.err
    assert f"pass {pipeline}/0_Transformer." in ended.err
    assert run("merge", adapter, tmp_path / "out", "--base", pipeline / "0_Transformer").status == 0


def test_shards_of_a_variant_alone_are_called_so(run: Run, adapter: Path, tmp_path: Path) -> None:
    part = filled_base(tmp_path / "pipeline" / "transformer", shards=2)
    index = json.loads((part / INDEX).read_bytes())
    for name in {*index["weight_map"].values()}:
        (part / name).rename(part / name.replace("model-", "diffusion_pytorch_model.fp16-"))
    (part / INDEX).rename(part / "diffusion_pytorch_model.safetensors.index.fp16.json")
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "X"}')
    ended = run("merge", adapter, tmp_path / "out", "--base", tmp_path / "pipeline")
    assert ended.status == 1
    assert "V515" in ended.err
    assert 'the variant "fp16"' in ended.err


def test_swapped_arguments_are_told_before_a_missing_torch(
    run: Run, adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_comparison, "find_spec", lambda _name: None)
    ended = run("verify", base, "--merged", adapter)
    assert ended.status == 1
    assert "V614" in ended.err
    assert "torch" not in ended.err
