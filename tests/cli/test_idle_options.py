"""Options without an effect are warned of; the folder of a base is not its subfolder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from adapters import good_adapter
from bases import TENSORS
from commandline import Run
from merges import INDEX, filled_base

from vera_convert import merge, strip
from vera_convert.verification import model_comparison

IDLE: tuple[tuple[str, str, str], ...] = (
    ("info A --base B", "--key-map nothing.here=model", "--key-map nothing.here=model"),
    ("validate A --base B", "--key-map nothing.here=model", "--key-map nothing.here=model"),
    ("strip A OUT --base B", "--key-map nothing.here=model", "--key-map nothing.here=model"),
    ("embed S OUT --base B", "--key-map nothing.here=model", "--key-map nothing.here=model"),
    ("migrate A OUT --to asis", "--key-map nothing.here=model", "--key-map nothing.here=model"),
    ("regenerate OUT --for S", "--key-map nothing.here=model", "--key-map nothing.here=model"),
    ("to-lora A OUT --base B", "--key-map nothing.here=model", "--key-map nothing.here=model"),
    ("merge A OUT --base B", "--key-map nothing.here=model", "--key-map nothing.here=model"),
    ("verify A --merged M --base B --layers-only", "--key-map no.where=m", "--key-map no.where=m"),
    ("embed A OUT --base B", "--generator float64-fused", "--generator"),
    ("to-lora A OUT --base B", "--generator float64-fused", "--generator"),
    ("merge A OUT --base B", "--generator float64-fused", "--generator"),
    ("verify A --merged M --base B --layers-only", "--generator float64-fused", "--generator"),
    ("merge A OUT --base B", "--dequantize", "--dequantize"),
    ("verify A --merged M --base B --layers-only", "--dequantize", "--dequantize"),
    ("merge A OUT --base B", "--tied add", "--tied"),
    ("verify A --merged M --base B --layers-only", "--tied untie", "--tied"),
    ("migrate A OUT --to asis", "--base-for other/name=B", "--base-for other/name=B"),
    ("migrate T OUT --to asis --recursive", "--base-for other/name=B", "--base-for other/name=B"),
    ("migrate A OUT --to asis", "--peft-version 9.9", "--peft-version"),
    ("to-lora A OUT --base B", "--fill-layers", "--fill-layers"),
    ("to-lora A OUT --base B", "--drop-head", "--drop-head"),
    ("to-lora A OUT --base B", "--rank 5", "--rank 5"),
)
"""Calls with an option that has no effect, each with the place of the warning.

Permissions (such as --force), filters (--select), limits (--max-error), assertions about the base
(--base-dtype) and choices between equal results (--projections) are never warned of.
"""


@pytest.mark.parametrize(("call", "option", "place"), IDLE)
def test_an_option_without_an_effect_is_a_warning(
    call: str, option: str, place: str, run: Run, tmp_path: Path
) -> None:
    words = {"A": "adapter", "S": "stripped", "B": "base", "M": "merged", "T": "tree"}
    good_adapter(tmp_path / "adapter")
    good_adapter(tmp_path / "tree" / "one")
    filled_base(tmp_path / "base")
    strip(tmp_path / "adapter", tmp_path / "stripped", base=tmp_path / "base")
    merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    arguments = [str(tmp_path / words.get(w, "out")) if w.isupper() else w for w in call.split()]
    plain = run(*arguments)
    assert (plain.status, "V564" in plain.err + plain.out) == (0, False)
    written = content(tmp_path / "out")
    remove(tmp_path / "out")
    ended = run(*arguments, *option.split())
    assert ended.status == 0
    told = ended.err + ended.out
    assert (told.count("V564"), f"{place}: " in told) == (1, True)
    assert content(tmp_path / "out") == written
    remove(tmp_path / "out")
    assert run(*arguments, *option.split(), "--json").out.count('"V564"') == 1


def content(out: Path) -> dict[str, bytes]:
    """Return the bytes of the model's or adapter's own files, without records, which name
    the options.
    """
    files = [out] if out.is_file() else [*out.rglob("*config.json"), *out.rglob("*.safetensors")]
    return {file.name: without_header(file) for file in files}


def without_header(file: Path) -> bytes:
    """Return the bytes of a file; for a safetensors file, only the bytes of the tensors."""
    raw = file.read_bytes()
    return raw if file.suffix == ".json" else raw[8 + int.from_bytes(raw[:8], "little") :]


def remove(out: Path) -> None:
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "call",
    [
        "to-lora A OUT --base B --rank 4",
        "to-lora A OUT --base B --rank 2 --accept-error",
        "merge A OUT --base B --add S --generator float32-fused",
        "embed S OUT --generator float32-fused",
        "migrate T OUT --to asis --recursive --base-for example/tiny-llama=B",
    ],
)
def test_an_option_with_an_effect_or_with_the_given_value_is_no_warning(
    call: str, run: Run, tmp_path: Path
) -> None:
    words = {"A": "adapter", "S": "stripped", "B": "base", "T": "tree"}
    good_adapter(tmp_path / "adapter")
    good_adapter(tmp_path / "tree" / "one")
    filled_base(tmp_path / "base")
    strip(tmp_path / "adapter", tmp_path / "stripped", base=tmp_path / "base")
    arguments = [str(tmp_path / words.get(w, "out")) if w.isupper() else w for w in call.split()]
    ended = run(*arguments)
    assert (ended.status, "V564" in ended.err) == (0, False)


def test_a_key_map_that_matches_is_no_warning(run: Run, adapter: Path, base: Path) -> None:
    assert "V564" not in run("info", adapter, "--base", base, "--key-map", "model=model").err


@pytest.mark.parametrize("key_map", ["model.layers=xyz", "=model", "model="])
@pytest.mark.parametrize("command", ["info", "merge"])
def test_a_key_map_is_a_warning_if_the_names_fit_without(
    command: str, key_map: str, run: Run, adapter: Path, base: Path
) -> None:
    out = [base.parent / "out"] if command == "merge" else []
    ended = run(command, adapter, *out, "--base", base, "--key-map", key_map)
    assert ended.status == 0
    said = f"V564 --key-map {key_map}: the adapter's names fit the base without this key map."
    assert ended.err.count(said) == 1


def test_a_key_map_that_is_used_is_no_warning(run: Run, adapter: Path, tmp_path: Path) -> None:
    inner = {name: shape for name, shape in TENSORS.items() if name.startswith("model.layers.")}
    moved = {f"other.{name.removeprefix('model.')}": shape for name, shape in inner.items()}
    tensors = {**dict.fromkeys(inner), **moved}
    base = filled_base(tmp_path / "other", tensors=tensors, config={"model_type": "new"})
    ended = run("info", adapter, "--base", base, "--key-map", "model=other")
    assert (ended.status, "V564" in ended.err) == (0, False)
    assert "--key-map model=other" in ended.out


@pytest.mark.parametrize(("version", "told"), [("9.9", True), ("0.21.2", False), ("0.13", False)])
def test_an_unknown_version_of_peft_is_a_warning(
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


def test_a_folder_with_only_shards_of_a_variant_is_named(
    run: Run, adapter: Path, tmp_path: Path
) -> None:
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


def test_swapped_arguments_are_reported_before_a_missing_torch(
    run: Run, adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_comparison, "find_spec", lambda _name: None)
    ended = run("verify", base, "--merged", adapter)
    assert ended.status == 1
    assert "V614" in ended.err
    assert "torch" not in ended.err
