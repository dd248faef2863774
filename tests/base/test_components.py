"""A pipeline of several models: the adapter's layers decide which component is the base."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from adapters import good_adapter
from bases import TENSORS
from folders import bytes_by_name
from safetensors.numpy import load_file, save_file

from vera_convert.conversion.strip_embed import embed, strip
from vera_convert.errors import CheckpointError, UsageError
from vera_convert.merging.adapters import AdapterSpec
from vera_convert.merging.merge import merge
from vera_convert.merging.options import MergeOptions
from vera_convert.validation.validate import validate
from vera_convert.verification.options import VerifyOptions
from vera_convert.verification.verify import verify

WEIGHTS = "diffusion_pytorch_model.safetensors"
NARROW = {name: (shape[0] // 2, *shape[1:]) for name, shape in TENSORS.items()}
OTHER = {name.replace("self_attn", "attn1"): shape for name, shape in TENSORS.items()}


def pipeline(
    folder: Path,
    components: Mapping[str, Mapping[str, Sequence[int]]],
    *,
    listed: Mapping[str, object] | None = None,
) -> Path:
    """Write a pipeline whose components have tensors of these shapes, with different values."""
    for seed, (name, shapes) in enumerate(components.items()):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text('{"_class_name": "DiT"}')
        values = np.random.default_rng(seed)
        arrays = {
            tensor: values.normal(size=shape).astype(np.float32) for tensor, shape in shapes.items()
        }
        save_file(arrays, folder / name / WEIGHTS, {"format": "pt"})
    entries = listed or {name: ["diffusers", "DiT"] for name in components}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Pipe", **entries}))
    return folder


def merged_component(adapter: Path, base: Path, out: Path) -> list[str]:
    """Merge, and return the names of the components whose weights changed."""
    merge(adapter, out, base=base)
    return sorted(
        path.parent.name
        for path in out.rglob(WEIGHTS)
        if path.read_bytes() != (base / path.relative_to(out)).read_bytes()
    )


@pytest.mark.parametrize(
    "equal",
    [
        ("transformer", "transformer_2"),
        ("transformer", "transformer_2", "transformer_3"),
        ("unet", "unet_2"),
        ("text_encoder", "text_encoder_2"),
        ("transformer", "unet"),
        ("prior", "decoder"),
    ],
)
def test_equal_components_are_refused(equal: tuple[str, ...], tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    base = pipeline(tmp_path / "base", {"vae": OTHER, **dict.fromkeys(equal, TENSORS)})
    acts: tuple[Callable[[], object], ...] = (
        lambda: merge(adapter, tmp_path / "out", base=base),
        lambda: strip(adapter, tmp_path / "out", base=base),
        lambda: embed(adapter, tmp_path / "out", base=base),
    )
    for act in acts:
        with pytest.raises(CheckpointError, match="V505") as caught:
            act()
        for name in equal:
            assert f"--base {base}/{name}" in str(caught.value)
        assert "vae" not in str(caught.value)
        assert not (tmp_path / "out").exists()
    found = validate(adapter, base=base)
    assert "V505" in {finding.code for finding in found.findings}


@pytest.mark.parametrize("name", ["transformer", "transformer_2"])
def test_the_folder_of_a_component_decides(name: str, tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    base = pipeline(tmp_path / "base", {"transformer": TENSORS, "transformer_2": TENSORS})
    merge(adapter, tmp_path / "out", base=base / name)
    before, after = load_file(base / name / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert any(not np.array_equal(after[tensor], array) for tensor, array in before.items())


@pytest.mark.parametrize("name", ["transformer", "transformer_2"])
@pytest.mark.parametrize("path", ["/data/Wan/{}", "Wan/{}/", "./{}"])
def test_the_path_in_the_config_decides(name: str, path: str, tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter", base_model_name_or_path=path.format(name))
    base = pipeline(tmp_path / "base", {"transformer": TENSORS, "transformer_2": TENSORS})
    assert merged_component(adapter, base, tmp_path / "out") == [name]


@pytest.mark.parametrize(
    ("components", "wanted"),
    [
        ({"transformer": TENSORS, "vae": OTHER}, "transformer"),
        ({"text_encoder": NARROW, "text_encoder_2": TENSORS, "unet": OTHER}, "text_encoder_2"),
        ({"text_encoder": TENSORS, "text_encoder_2": NARROW, "unet": OTHER}, "text_encoder"),
        ({"transformer": OTHER, "transformer_2": TENSORS}, "transformer_2"),
        ({"unet": OTHER, "text_encoder": TENSORS}, "text_encoder"),
    ],
)
def test_the_only_component_with_the_layers_is_merged_and_verified(
    components: Mapping[str, Mapping[str, Sequence[int]]], wanted: str, tmp_path: Path
) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    base, out = pipeline(tmp_path / "base", components), tmp_path / "out"
    assert merged_component(adapter, base, out) == [wanted]
    options = VerifyOptions(layers_only=True)
    assert verify(adapter, merged=out, base=base, options=options).wrong == 0
    if "transformer_2" not in components:
        (out / "merge-provenance.json").unlink()
        assert verify(adapter, merged=out, base=base, options=options).wrong == 0
    (out / wanted / WEIGHTS).write_bytes((base / wanted / WEIGHTS).read_bytes())
    assert verify(adapter, merged=out, base=base, options=options).wrong


def test_if_no_component_fits_the_refusal_names_the_main_component(tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    base = pipeline(tmp_path / "base", {"text_encoder": OTHER, "unet": OTHER, "vae": NARROW})
    with pytest.raises(CheckpointError, match=r"V520 .*attn1"):
        merge(adapter, tmp_path / "out", base=base)


def test_an_equal_component_without_weights_is_a_candidate(tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    listed = {name: ["diffusers", "DiT"] for name in ("transformer", "transformer_2", "vae")}
    base = pipeline(tmp_path / "base", {"transformer_2": TENSORS}, listed=listed)
    with pytest.raises(CheckpointError, match=r"V505 .*transformer and transformer_2"):
        merge(adapter, tmp_path / "out", base=base)
    listed["transformer"] = [None, None]  # type: ignore[list-item]
    one = pipeline(tmp_path / "one", {"transformer_2": TENSORS}, listed=listed)
    assert merged_component(adapter, one, tmp_path / "out") == ["transformer_2"]


def test_an_equal_component_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    base = pipeline(tmp_path / "base", {"transformer": TENSORS, "transformer_2": TENSORS})
    path = base / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="V0"):
        merge(adapter, tmp_path / "out", base=base)


def test_another_component_that_cannot_be_read_is_copied(tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    base = pipeline(tmp_path / "base", {"transformer": TENSORS, "vae": OTHER})
    (base / "vae" / WEIGHTS).write_bytes(b"any bytes")
    assert merged_component(adapter, base, tmp_path / "out") == ["transformer"]
    assert bytes_by_name(tmp_path / "out")[f"vae/{WEIGHTS}"] == b"any bytes"


def test_adapters_of_two_components_are_merged_one_by_one(tmp_path: Path) -> None:
    first = good_adapter(tmp_path / "first")
    with_others = {
        name.replace("self_attn", "attn1"): array
        for name, array in load_file(first / "adapter_model.safetensors").items()
    }
    second = good_adapter(tmp_path / "second", tensors={**dict.fromkeys(TENSORS), **with_others})
    save_file(with_others, second / "adapter_model.safetensors", {"format": "pt"})
    base = pipeline(tmp_path / "base", {"unet": OTHER, "text_encoder": TENSORS})
    both = MergeOptions(add=(AdapterSpec(str(second)),))
    with pytest.raises(UsageError, match="text_encoder, unet"):
        merge(first, tmp_path / "out", base=base, options=both)
    merge(first, tmp_path / "one", base=base)
    assert merged_component(second, tmp_path / "one", tmp_path / "two") == ["unet"]
