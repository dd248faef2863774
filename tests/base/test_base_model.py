from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bases import tiny_base
from hub_server import HubServer
from numpy.typing import NDArray
from safetensors.numpy import save, save_file

from vera_convert.base.model import BaseModel, read_base
from vera_convert.base.orientation import Orientation
from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.hub.lookup import HubAccess, Location, locate
from vera_convert.targets.linear import CONV1D_LAYERS

INDEX = "model.safetensors.index.json"
Shards = Mapping[str, Mapping[str, Sequence[int]]]

SHARDS: Shards = {
    "model-00001-of-00002.safetensors": {"a.weight": (4, 2), "a.bias": (4,)},
    "deep/model-00002-of-00002.safetensors": {"b.weight": (2, 2)},
}


def arrays(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def write_model(
    folder: Path,
    shards: Shards,
    *,
    weight_map: Mapping[str, str] | None = None,
    config: Mapping[str, object] | None = None,
    index: str = INDEX,
) -> Location:
    folder.mkdir(parents=True, exist_ok=True)
    for name, shapes in shards.items():
        (folder / name).parent.mkdir(exist_ok=True)
        save_file(arrays(shapes), folder / name, {"format": "pt"})
    if weight_map is None:
        weight_map = {tensor: name for name, shapes in shards.items() for tensor in shapes}
    if index:
        document = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / index).write_text(json.dumps(document))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return Location("base", folder)


def read(location: Location) -> BaseModel:
    return read_base(location, HubAccess(offline=True))


def codes(location: Location) -> list[str]:
    with pytest.raises(CheckpointError) as error:
        read(location)
    return [found.code for found in error.value.findings]


def test_a_base_in_one_file_is_read(fixtures: Path) -> None:
    base = read(Location("base", fixtures / "bases/llama-bf16"))
    assert base.model_type == "llama"
    assert base.tie_word_embeddings is False
    assert list(base.files) == ["model.safetensors"]
    name = "model.layers.1.mlp.down_proj.weight"
    assert base.tensors[name].file == "model.safetensors"
    assert base.tensors[name].info.shape == (48, 80)
    assert base.findings == ()


def test_shards_in_subfolders_are_read_through_the_index(tmp_path: Path) -> None:
    base = read(write_model(tmp_path, SHARDS, config={"model_type": "x"}))
    assert base.index == INDEX
    assert list(base.files) == sorted(SHARDS)
    assert {name: tensor.file for name, tensor in base.tensors.items()} == {
        tensor: file for file, shapes in SHARDS.items() for tensor in shapes
    }


def test_a_diffusers_component_is_found_by_its_folder_or_its_pipeline(tmp_path: Path) -> None:
    stem = "diffusion_pytorch_model"
    shards = {f"{stem}-00001-of-00001.safetensors": {"x.weight": (2, 2)}}
    config = {"_class_name": "Transformer"}
    folder = tmp_path / "transformer"
    location = write_model(folder, shards, index=f"{stem}.safetensors.index.json", config=config)
    (tmp_path / "model_index.json").write_text("{}")
    assert read(location).config == config
    base = read(Location("base", tmp_path))
    assert base.config == config
    assert base.prefix == "transformer/"
    assert list(base.files) == [f"transformer/{name}" for name in shards]


def test_a_base_without_a_config_has_no_type(tmp_path: Path) -> None:
    base = read(write_model(tmp_path, {"model.safetensors": {"x.weight": (2, 2)}}, index=""))
    assert base.config == {}
    assert base.model_type is None
    assert base.tie_word_embeddings is None


def test_a_nested_config_is_read(tmp_path: Path) -> None:
    config = {"model_type": 3, "text_config": {"tie_word_embeddings": True}}
    base = read(write_model(tmp_path, SHARDS, config=config))
    assert base.model_type is None
    assert base.tie_word_embeddings is True


def test_a_weight_file_that_the_index_does_not_name_is_reported_and_not_read(
    tmp_path: Path,
) -> None:
    location = write_model(tmp_path, SHARDS)
    (tmp_path / "model.safetensors").write_bytes(b"anything")
    base = read(location)
    assert base.strays == ("model.safetensors",)
    assert [found.code for found in base.findings] == ["V512"]
    assert "model.safetensors" not in base.files


def test_a_missing_shard_is_named_before_a_header_is_read(tmp_path: Path) -> None:
    location = write_model(tmp_path, SHARDS)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    (tmp_path / "deep/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"V507.*deep/model-00002-of-00002\.safetensors is not"
    ):
        read(location)


def test_index_and_shards_of_two_saves_are_refused(tmp_path: Path) -> None:
    one, two = SHARDS
    weight_map = {"a.weight": two, "b.weight": two, "c.weight": one}
    shards = {one: SHARDS[one], two: {**SHARDS[two], "a.bias": (4,)}}
    location = write_model(tmp_path, shards, weight_map=weight_map)
    assert codes(location) == ["V508", "V509", "V510", "V511"]


def test_the_defects_of_all_shards_are_reported_at_once(tmp_path: Path) -> None:
    location = write_model(tmp_path, SHARDS)
    for name in SHARDS:
        (tmp_path / name).write_bytes(b"\xff" * 7)
    assert len(codes(location)) == 2


@pytest.mark.parametrize(
    ("name", "text", "code"),
    [
        ("config.json", "[]", "V513"),
        ("config.json", '{"a": 1, "a": 2}', "V023"),
        (INDEX, '{"weight_map": {"x": "../x.safetensors"}}', "V005"),
        (INDEX, '{"weight_map": {}}', "V506"),
    ],
)
def test_malformed_text_is_refused(name: str, text: str, code: str, tmp_path: Path) -> None:
    location = write_model(tmp_path, SHARDS)
    (tmp_path / name).write_text(text)
    assert codes(location) == [code]


def test_a_shard_outside_of_the_folder_is_not_read(tmp_path: Path) -> None:
    location = write_model(tmp_path / "model", SHARDS)
    inside, outside = tmp_path / "model" / next(iter(SHARDS)), tmp_path / "outside.safetensors"
    inside.rename(outside)
    try:
        inside.symlink_to(outside)
    except OSError:
        pytest.skip("no links here")
    assert codes(location) == ["V002"]


def test_a_missing_folder_is_no_fault_of_the_base(tmp_path: Path) -> None:
    with pytest.raises(SurroundingsError, match="absent"):
        read(Location("base", tmp_path / "absent"))


# --- on the Hub ----------------------------------------------------------------------------------


def test_of_a_base_on_the_hub_only_headers_are_read(server: HubServer, tmp_path: Path) -> None:
    shards = {f"model-{n:05}-of-00020.safetensors": {f"{n}.weight": (600, 500)} for n in range(20)}
    files = {name: save(arrays(shapes)) for name, shapes in shards.items()}
    weight_map = {tensor: name for name, shapes in shards.items() for tensor in shapes}
    files[INDEX] = json.dumps({"weight_map": weight_map}).encode()
    files["config.json"] = b'{"model_type": "llama"}'
    files["model.safetensors"] = b"stray"
    server.add("org/base", files)
    access = HubAccess(cache_dir=tmp_path / "cache")
    location = locate("org/base", kind="base", access=access)
    base = read_base(location, access)
    assert list(base.files) == sorted(shards)
    assert base.model_type == "llama"
    assert base.strays == ("model.safetensors",)
    assert sum(map(len, files.values())) > 24_000_000
    assert server.bytes_served < 20 * 33_000 + 10_000
    assert len(server.requests) == 23  # commit and files, config, index, and one for each shard
    read_base(locate("org/base", kind="base", access=access), access)
    assert len(server.requests) == 24  # the headers of a commit are cached; the branch may move
    local = read(write_model(tmp_path / "local", shards))
    for field in ("tensors", "prefix", "index", "values"):
        assert getattr(base, field) == getattr(local, field)


@pytest.mark.parametrize(
    ("rest", "values", "requests"),
    [
        ("weight.quant_state.bitsandbytes__nf4", np.full(90, 7, np.uint8), 20),
        # all packed sizes are read before the packed weights
        ("weight_shape", np.full(2, 7, np.int64), 1),
    ],
)
def test_tensors_that_state_shapes_are_read_together_and_once(
    server: HubServer, tmp_path: Path, rest: str, values: NDArray[Any], requests: int
) -> None:
    tensors: dict[str, NDArray[Any]] = {"a": np.zeros(40_000, np.uint64)}
    for layer in range(20):
        tensors[f"{layer:02}.weight"] = np.full((40_000, 1), layer, np.uint8)
        tensors[f"{layer:02}.{rest}"] = values + values.dtype.type(layer)
    files = {"model.safetensors": save(tensors), "config.json": b"{}"}
    server.add("org/base", files)
    access = HubAccess(cache_dir=tmp_path / "cache")

    def read_from_hub() -> Mapping[str, bytes]:
        return read_base(locate("org/base", kind="base", access=access), access).values

    found = read_from_hub()
    assert found == {name: tensors[name].tobytes() for name in tensors if rest in name}
    assert len(server.requests) == 3 + requests  # commit and files, config, header
    assert read_from_hub() == found
    assert len(server.requests) == 4 + requests


def test_a_missing_shard_on_the_hub_is_named(server: HubServer, tmp_path: Path) -> None:
    server.add("org/base", {INDEX: b'{"weight_map": {"x": "model-1.safetensors"}}'})
    access = HubAccess(cache_dir=tmp_path / "cache")
    with pytest.raises(CheckpointError, match="V507"):
        read_base(locate("org/base", kind="base", access=access), access)


# --- orientation ---------------------------------------------------------------------------------


def oriented(tmp_path: Path, shapes: Mapping[str, Sequence[int]], **config: object) -> Orientation:
    model = write_model(tmp_path, {"model.safetensors": shapes}, index="", config=config)
    return Orientation(read(model))


def test_a_bias_shows_the_orientation_of_a_weight(tmp_path: Path) -> None:
    shapes = {
        "x.up.weight": (2, 6),
        "x.up.bias": (6,),
        "x.down.weight": (2, 6),
        "x.down.bias": (2,),
    }
    orientation = oriented(tmp_path, shapes, model_type="llama")
    assert orientation.is_conv1d("x.up.weight") is True
    assert orientation.is_conv1d("x.down.weight") is False


def test_a_square_weight_has_the_orientation_of_weights_with_the_same_name(fixtures: Path) -> None:
    base = read(Location("base", fixtures / "bases/gpt2-fp32"))
    orientation = Orientation(replace(base, config={}))
    assert base.tensors["transformer.h.0.attn.c_proj.weight"].info.shape == (32, 32)
    assert orientation.is_conv1d("transformer.h.0.attn.c_proj.weight") is True
    assert orientation.is_conv1d("transformer.wte.weight") is None


def test_the_model_type_shows_the_orientation_if_no_bias_does(tmp_path: Path) -> None:
    shapes = {"h.c_proj.weight": (4, 4), "score.weight": (4, 4)}
    orientation = oriented(tmp_path, shapes, model_type="gpt2")
    assert orientation.is_conv1d("h.c_proj.weight") is True
    assert orientation.is_conv1d("score.weight") is False
    orientation = oriented(tmp_path, shapes, decoder={"model_type": "gpt2"})
    assert orientation.is_conv1d("h.c_proj.weight") is True
    for config in ({"model_type": "llama"}, {"_class_name": "Transformer"}):
        assert oriented(tmp_path, shapes, **config).is_conv1d("h.c_proj.weight") is False


def test_the_orientation_of_a_model_with_its_own_code_is_not_known(tmp_path: Path) -> None:
    shapes = {"h.c_proj.weight": (4, 4)}
    for config in ({}, {"model_type": "own", "auto_map": {}}):
        assert oriented(tmp_path, shapes, **config).is_conv1d("h.c_proj.weight") is None


def test_every_model_of_transformers_with_conv1d_is_known() -> None:
    package = find_spec("transformers")
    if package is None or package.origin is None:
        pytest.skip("transformers is not installed")
    found: dict[str, set[str]] = {}
    for code in Path(package.origin).parent.glob("models/*/modeling_*.py"):
        layers = re.findall(r"self\.(\w+) = Conv1D\(", code.read_text(encoding="utf-8"))
        if layers:
            found[code.parent.name] = set(layers)
    types = {"clvp": "clvp_decoder", "openai": "openai-gpt"}
    assert found
    for folder, names in found.items():
        assert names <= CONV1D_LAYERS[types.get(folder, folder)]


@pytest.mark.skipif(os.name != "posix", reason="needs pipes and links")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("pipe", "V001 .*is a named pipe"),
        ("socket", "V001 .*is a socket"),
        ("folder", "V001 .*is a folder"),
        ("dead link", "is a link to nothing, which leads nowhere"),
        ("circle", "is a link to .*, which leads nowhere"),
        ("device", "V002 .*leads to /dev/null"),
    ],
)
def test_a_config_or_weights_that_are_no_file_are_refused(
    what: str, reason: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(tmp_path / "base")
    path = base / name
    path.unlink()
    monkeypatch.chdir(base)  # the path of a socket must be short
    if what == "pipe":
        os.mkfifo(path)
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(name)
    elif what == "folder":
        path.mkdir()
    else:
        targets = {"dead link": "nothing", "circle": name, "device": "/dev/null"}
        path.symlink_to(targets[what])
    with pytest.raises((CheckpointError, SurroundingsError), match=reason) as caught:
        read_base(Location("base", base), HubAccess())
    assert f"{name}: " in str(caught.value)


@pytest.mark.skipif(os.name != "posix", reason="needs pipes and links")
def test_a_shard_that_is_no_file_is_not_called_missing(tmp_path: Path) -> None:
    location = write_model(tmp_path, SHARDS)
    (tmp_path / "deep/model-00002-of-00002.safetensors").unlink()
    os.mkfifo(tmp_path / "deep/model-00002-of-00002.safetensors")
    assert codes(location) == ["V001"]
