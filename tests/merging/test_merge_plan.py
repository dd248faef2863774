"""The file layout of a merged model's weights: unchanged from the base, or new."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from adapters import good_adapter, good_tensors
from folders import bytes_by_name
from merges import INDEX, assert_same, expected_tensors, filled_base, merged_with, tensors_of
from safetensors.numpy import load_file, save_file

from vera_convert.errors import UsageError

# --- layouts -------------------------------------------------------------------------------------


def test_shards_keep_their_headers_and_the_index_its_bytes(tmp_path: Path, adapter: Path) -> None:
    base = filled_base(tmp_path / "base", shards=4)
    merged_with(adapter, base, tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), expected_tensors({adapter: 1.0}, base))
    for path in base.glob("*.safetensors"):
        before, after = path.read_bytes(), (tmp_path / "out" / path.name).read_bytes()
        length = 8 + int.from_bytes(before[:8], "little")
        assert before[:length] == after[:length]
        assert len(before) == len(after)
    assert (tmp_path / "out" / INDEX).read_bytes() == (base / INDEX).read_bytes()


def test_an_unusual_header_is_kept_unchanged(tmp_path: Path, adapter: Path, base: Path) -> None:
    content = (base / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    document = json.loads(content[8 : 8 + length])
    text = json.dumps(dict(reversed(document.items())), indent=1).encode() + b"    "
    odd = len(text).to_bytes(8, "little") + text + content[8 + length :]
    (base / "model.safetensors").write_bytes(odd)
    merged_with(adapter, base, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes().startswith(odd[: 8 + len(text)])
    assert_same(tensors_of(tmp_path / "out"), expected_tensors({adapter: 1.0}, base))


def test_shards_may_lie_in_subfolders(tmp_path: Path, adapter: Path) -> None:
    base = filled_base(tmp_path / "base", shards=2)
    text = (base / INDEX).read_text().replace("model-", "parts/model-")
    (base / INDEX).write_text(text)
    (base / "parts").mkdir()
    for path in base.glob("*.safetensors"):
        path.rename(base / "parts" / path.name)
    merged_with(adapter, base, tmp_path / "out")
    assert_same(
        tensors_of(tmp_path / "out/parts"), expected_tensors({adapter: 1.0}, base / "parts")
    )
    assert (tmp_path / "out" / INDEX).read_text() == text


def test_a_wrong_total_size_is_corrected(tmp_path: Path, adapter: Path) -> None:
    base = filled_base(tmp_path / "base", shards=2)
    text = (base / INDEX).read_text()
    total = json.loads(text)["metadata"]["total_size"]
    (base / INDEX).write_text(text.replace(str(total), "17"))
    merged_with(adapter, base, tmp_path / "out")
    assert (tmp_path / "out" / INDEX).read_text() == text


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("limit", [2500, 6000, 10**9])
def test_shards_can_get_another_size(
    tmp_path: Path, adapter: Path, shards: int, limit: int
) -> None:
    base = filled_base(tmp_path / "base", shards=shards)
    merged_with(adapter, base, tmp_path / "out", max_shard_size=limit)
    assert_same(tensors_of(tmp_path / "out"), expected_tensors({adapter: 1.0}, base))
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    if limit == 10**9:
        assert files == ["model.safetensors"]
        assert not (tmp_path / "out" / INDEX).exists()
        return
    assert files == [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    index = json.loads((tmp_path / "out" / INDEX).read_bytes())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors_of(base).values())
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        assert len(tensors) == 1 or sum(a.nbytes for a in tensors.values()) <= limit
        assert all(index["weight_map"][name] == file for name in tensors)


@pytest.mark.parametrize("shards", [1, 2])
def test_float_tensors_can_be_given_another_dtype(
    tmp_path: Path, adapter: Path, shards: int
) -> None:
    config = {"model_type": "llama", "torch_dtype": "float32", "text_config": {"dtype": "float32"}}
    base = filled_base(tmp_path / "base", dtypes={"norm": "int8"}, config=config, shards=shards)
    merged_with(adapter, base, tmp_path / "out", dtype="bfloat16")
    found = tensors_of(tmp_path / "out")
    for name, tensor in expected_tensors({adapter: 1.0}, base).items():
        kept = tensor.dtype == np.int8
        assert found[name].dtype == (np.int8 if kept else ml_dtypes.bfloat16), name
        assert np.allclose(found[name].astype("f4"), tensor.astype("f4"), rtol=2**-8, atol=0), name
    text = (base / "config.json").read_text().replace('"float32"', '"bfloat16"')
    assert (tmp_path / "out/config.json").read_text() == text
    if shards == 2:
        total = json.loads((tmp_path / "out" / INDEX).read_bytes())["metadata"]["total_size"]
        assert total == sum(tensor.nbytes for tensor in found.values())


def test_an_unknown_dtype_is_refused(tmp_path: Path, adapter: Path, base: Path) -> None:
    with pytest.raises(UsageError, match=r"int4.*float64, float32, bfloat16, float16"):
        merged_with(adapter, base, tmp_path / "out", dtype="int4")


def test_a_diffusers_component_and_its_pipeline(tmp_path: Path) -> None:
    stored = {name.replace("model.layers", "blocks"): a for name, a in good_tensors().items()}
    without = dict.fromkeys(good_tensors())
    adapter = good_adapter(tmp_path / "adapter", tensors=without | stored)
    component = filled_base(tmp_path / "pipeline/transformer", config={"_class_name": "DiT"})
    tensors = {
        name.replace("model.layers", "blocks"): a for name, a in tensors_of(component).items()
    }
    (component / "model.safetensors").unlink()
    save_file(tensors, component / "diffusion_pytorch_model.safetensors")
    pipeline = component.parent
    (pipeline / "model_index.json").write_text("{}")
    (pipeline / "vae").mkdir()
    (pipeline / "vae/config.json").write_text("{}")
    (pipeline / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"any bytes")
    expected = expected_tensors({adapter: 1.0}, component)
    merged_with(adapter, component, tmp_path / "alone", max_shard_size=4000)
    assert_same(tensors_of(tmp_path / "alone"), expected)
    assert (tmp_path / "alone/diffusion_pytorch_model.safetensors.index.json").exists()
    merged_with(adapter, pipeline, tmp_path / "whole")
    assert_same(tensors_of(tmp_path / "whole/transformer"), expected)
    found = bytes_by_name(tmp_path / "whole")
    assert found["vae/diffusion_pytorch_model.safetensors"] == b"any bytes"
    assert found["model_index.json"] == b"{}"
    assert "library_name: diffusers" in found["README.md"].decode()
