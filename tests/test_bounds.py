"""Small files that could cause much work: every kind of work has a limit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import good_adapter
from bases import LLAMA_SIZES, TENSORS, tiny_base
from commandline import Run
from limits import in_memory

from vera_convert.base.match import Match, match_modules
from vera_convert.base.model import BaseModel, BaseTensor
from vera_convert.base.quantized.layer_settings import settings_by_layer
from vera_convert.base.quantized.recognize import Quantization
from vera_convert.base.quantized.targets import quantized_targets
from vera_convert.base.quantized.unpack import unpacked
from vera_convert.base.renames import model_types, release_names
from vera_convert.base.replacements import match_replacements
from vera_convert.base.strategies import AS_THEY_ARE
from vera_convert.base.vocabulary import shared_embedding
from vera_convert.errors import CheckpointError, UsageError
from vera_convert.files.header import TensorInfo
from vera_convert.files.shards import find_weights
from vera_convert.hub.lookup import Location
from vera_convert.validation.selection import Settings, read_settings

SECONDS = 10.0
"""The limit in CPU seconds; without limits, each case took longer or much more memory."""


@contextmanager
def soon() -> Iterator[None]:
    started = time.process_time()
    yield
    assert time.process_time() - started < SECONDS


def base_of(names: Iterator[str], config: Mapping[str, Any]) -> BaseModel:
    infos = {
        name: BaseTensor("model.safetensors", TensorInfo(name, "F32", (8, 8), 0, 256))
        for name in names
    }
    return BaseModel(Location("base", None), config, {}, infos)


def layers(count: int, target: str = "q_proj") -> Iterator[str]:
    return (f"model.layers.{number}.self_attn.{target}.weight" for number in range(count))


def quantized(base: BaseModel) -> int:
    """Return how many layers the config calls quantized."""
    findings = quantized_targets(base, base.tensors)
    return int(findings[0].reason.partition(" of ")[0].replace(",", "")) if findings else 0


# --- quantization_config -------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["modules_to_not_convert", "modules_in_block_to_quantize"])
def test_many_patterns_and_many_layers_are_compared_soon(field: str) -> None:
    kept = [f"model.layers.{number}.self_attn.q_proj" for number in range(0, 40_000, 2)]
    config = {"quantization_config": {"quant_method": "gptq", field: kept}}
    with soon():
        found = quantized(base_of(layers(20_000), config))
    assert found == 10_000


@pytest.mark.parametrize("pattern", ["re:.*\\.{}\\..*", "*.{}.*"])
def test_patterns_that_cannot_be_compared_soon_leave_every_layer_quantized(pattern: str) -> None:
    ignored = [pattern.format(number) for number in range(20_000)]
    config = {"quantization_config": {"quant_method": "fp8", "ignore": ignored}}
    with soon():
        assert quantized(base_of(layers(500), config)) == 500


def test_undecided_layers_count_as_quantized_beside_a_list_of_quantized_layers() -> None:
    config = {"quantization_config": {"modules_in_block_to_quantize": ["(a+)+x"]}}
    assert quantized(base_of(iter(["a" * 40 + ".weight"]), config)) == 1


def test_names_with_many_parts_are_looked_up_within_a_limit() -> None:
    ignored = [".".join(["x"] * size) for size in range(1, 100)]
    config = {"quantization_config": {"quant_method": "fp8", "ignore": ignored}}
    names = (f"{'a.' * 98}n{number}.weight" for number in range(10_000))
    with soon():
        assert quantized(base_of(names, config)) == 10_000


@pytest.mark.parametrize(
    ("kept", "name", "fits"),
    [
        ("layers.1", "model.layers.1.q", True),
        ("layers.1", "model.layers.10.q", False),
        ("q_proj", "a.q_proj", True),
        ("proj", "a.q_proj", True),
        ("a.q_proj.weight", "a.q_proj", True),
        ("model.*.q", "model.layers.1.q", True),
        ("layers.*", "model.layers.1.q", True),
        ("*q", "model.layers.1.q", True),
        ("*.k", "model.layers.1.q", False),
        ("re:.*q$", "model.layers.1.q", True),
        ("re:layers", "model.layers.1.q", False),
    ],
)
def test_a_pattern_fits_at_parts_of_a_path_and_at_the_end(kept: str, name: str, fits: bool) -> None:
    config = {"quantization_config": {"quant_method": "fp8", "ignore": [kept]}}
    assert quantized(base_of(iter([f"{name}.weight"]), config)) == (0 if fits else 1)


def test_a_config_of_very_many_quantization_configs_is_read_as_one() -> None:
    parts = {
        f"part{number}": {"quantization_config": {"quant_method": "fp8", "ignore": [str(number)]}}
        for number in range(20_000)
    }
    with soon():
        assert quantized(base_of(layers(500), parts)) == 500


def packed_base(count: int, config: Mapping[str, Any]) -> BaseModel:
    """Return a base whose layers have 8-bit integers, as a quantizer's base has."""
    base = base_of(layers(count), config)
    tensors = {
        name: replace(tensor, info=tensor.info._replace(dtype="I8", end=64))
        for name, tensor in base.tensors.items()
    }
    return replace(base, tensors=tensors)


def test_many_quantization_configs_and_many_packed_layers_are_read_soon() -> None:
    parts = {
        f"part{number}": {"quantization_config": {"quant_method": f"method{number}"}}
        for number in range(20_000)
    }
    base = packed_base(1_000, parts)
    with soon():
        found = unpacked(base)
        quantization = Quantization(base)
        assert not any(map(quantization.is_packed, base.tensors))
    assert len(found.defects) == 1_000
    assert "method2 and 19,997 more" in found.first_defect
    assert len(found.first_defect) < 300


def test_a_list_of_plain_modules_is_read_once_for_all_layers() -> None:
    kept = [f"other.module{number}" for number in range(20_000)]
    settings = {"quant_method": "int8", "modules_to_not_convert": kept}
    base = packed_base(4_000, {"quantization_config": settings})
    quantization = Quantization(base)
    with soon():
        assert not any(map(quantization.is_packed, base.tensors))


def test_a_group_for_each_of_many_layers_is_found_soon() -> None:
    base = base_of(layers(20_000), {})
    paths = [name.removesuffix(".weight") for name in base.tensors]
    groups = {path: {"targets": [path]} for path in paths}
    with soon():
        found = settings_by_layer(base, {"config_groups": groups}, paths)
    assert all(found[path]["config_groups"] == {path: groups[path]} for path in paths)


# --- names ---------------------------------------------------------------------------------------


def test_a_config_has_sixteen_types_of_models_at_most() -> None:
    parts = {f"part{number}": {"model_type": f"type{number}"} for number in range(200)}
    found = model_types({**parts, "model_type": "outermost"})
    assert found[0] == "outermost"
    assert len(found) == 16
    assert model_types({"a": {"b": {"model_type": "deep"}}, "model_type": 3}) == ["deep"]


def test_nested_configs_with_very_many_types_are_matched_soon() -> None:
    kinds = [f"kind{number}" for number in range(400)]
    config = {"model_type": "llava", "parts": {kind: {"model_type": kind} for kind in kinds}}
    names = (f"{kind}.layers.{number}.q.weight" for kind in kinds for number in range(50))
    lambdas = {f"layers.{number}.other": 8 for number in range(2_000)}
    with soon(), pytest.raises(CheckpointError):
        match_modules(lambdas, base_of(names, config))


def test_names_that_differ_in_more_than_numbers_are_renamed_within_a_limit() -> None:
    names = (f"language_model.model.layers.0.x{number}y.weight" for number in range(60_000))
    with soon():
        assert not [*release_names(base_of(names, {"model_type": "llava"}))]


def test_very_many_replacements_are_distinguished_soon() -> None:
    shapes = {f"base_model.model.x{number}.weight": (8,) for number in range(60_000)}
    base = base_of(iter(()), {})
    match = Match(AS_THEY_ARE, {}, {})
    with soon():
        assert len(match_replacements(shapes, match, base)) == 60_000
    with pytest.raises(CheckpointError, match="both replace"):
        match_replacements({**shapes, "x7.weight": (8,)}, match, base)


def test_very_many_biases_that_may_have_other_names_in_the_base_are_placed_soon(
    tmp_path: Path, run: Run
) -> None:
    count = 1_500
    biases = {
        f"base_model.model.x{number}.decoder.bias": np.zeros(8, np.float32)
        for number in range(count)
    }
    stored = {f"x{number}.bias": (8,) for number in range(count)}
    base = tiny_base(tmp_path / "base", tensors=stored)
    adapter = good_adapter(tmp_path / "adapter", tensors=biases, bias="all")
    with soon():
        assert run("validate", adapter, "--base", base).status == 0


def test_the_heads_of_many_classes_are_distinguished_soon(tmp_path: Path, run: Run) -> None:
    count = 8_000
    heads = {
        f"base_model.model.x{number}.head.weight": np.zeros((2, 2), np.float32)
        for number in range(count)
    }
    of_classes = {f"x{number}.cls.predictions.head.weight": (2, 2) for number in range(count)}
    base = tiny_base(tmp_path / "base", tensors=of_classes)
    adapter = good_adapter(tmp_path / "adapter", tensors=heads, modules_to_save=["head"])
    with soon():
        run("validate", adapter, "--base", base)


def test_the_embedding_of_a_head_is_found_soon_among_very_many() -> None:
    names = (f"part{number}.embed_tokens.weight" for number in range(6_000))
    base = base_of(names, {})
    with soon():
        assert not any(shared_embedding(base, "lm_head", 8, 8) for _ in range(6_000))


def test_a_tensor_of_absurdly_many_experts_is_no_tensor_of_the_base() -> None:
    name = "base_model.model.layers.0.mlp.experts.gate_up_proj"
    with in_memory():
        found = match_replacements(
            {name: (5_000_000, 1, 1)}, Match(AS_THEY_ARE, {}, {}), base_of(layers(2), {})
        )
    assert [part.target for part in found[name]] == ["layers.0.mlp.experts.gate_up_proj"]


# --- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "front{}.base_model.model.model.layers.{}.q_proj.vera_lambda_b",
        "base_model.model.model.layers.{}._x{}_module.q_proj.vera_lambda_b",
        "front{}.base_model.model.model.layers.{}.weight",
    ],
)
def test_a_message_about_names_lists_a_few(tmp_path: Path, run: Run, name: str) -> None:
    vectors = {name.format(n, n): np.zeros(16, np.float32) for n in range(1_000)}
    adapter = good_adapter(tmp_path / "adapter", tensors=vectors)
    for command in (("validate", adapter), ("migrate", adapter, tmp_path / "out", "--to", "asis")):
        ended = run(*command)
        assert len(ended.out) + len(ended.err) < 10_000, ended.out[:1_000]


def test_the_text_about_an_adapter_lists_no_thousands_of_kinds(tmp_path: Path, run: Run) -> None:
    vectors = {
        f"base_model.model.kind{number}x.vera_lambda_{kind}": np.ones(size, np.float32)
        for number in range(1_000)
        for kind, size in (("b", 8), ("d", 4))
    }
    adapter = good_adapter(tmp_path / "adapter", tensors=vectors)
    text = run("info", adapter).out
    assert "others 902 kinds, listed by --json" in " ".join(text.split())
    assert len(text) < 10_000
    assert len(run("info", adapter, "--json").document["groups"]) == 1_002


def test_the_message_about_other_sizes_of_a_base_lists_a_few(tmp_path: Path, run: Run) -> None:
    tables = {f"model.x{number}.embed_tokens.weight": (3, number + 100) for number in range(1_000)}
    config = {"model_type": "llama", **LLAMA_SIZES}
    base = tiny_base(tmp_path / "base", tensors=tables, config=config)
    ended = run("validate", good_adapter(tmp_path / "adapter"), "--base", base)
    assert "V559" in ended.out
    assert "1,994 more sizes" in " ".join(ended.out.split())
    assert len(ended.out) < 10_000


# --- numbers in names ----------------------------------------------------------------------------


@pytest.mark.parametrize("digits", ["1" * 5_000, "0" * 100_000, "٣"])
def test_a_shard_of_an_absurd_number_of_shards_is_no_shard(digits: str) -> None:
    for name in (f"model-1-of-{digits}.safetensors", f"model-{digits}-of-1.safetensors"):
        with soon():
            assert find_weights([name], place="base").single == name
    with pytest.raises(CheckpointError):
        find_weights(["x-00001-of-00002.safetensors"], place="base")


# --- pyproject.toml ------------------------------------------------------------------------------


def settings(folder: Path, text: str) -> Settings:
    (folder / "pyproject.toml").write_text(text)
    return read_settings(folder)


@pytest.mark.parametrize(
    "text",
    [
        "a" + ".a" * 33 + " = 1",
        "a" + ".a" * 30_000 + " = 1",
        "[" + "a" + " . a" * 30_000 + "]",
        'x = { "a"' + '."a"' * 5_000 + " = 1 }",
        '"""a"""' + ".'b'" * 40 + " = 1",
    ],
)
def test_a_toml_key_of_very_many_parts_is_refused(text: str, tmp_path: Path) -> None:
    with soon(), pytest.raises(UsageError, match="dots"):
        settings(tmp_path, text)


@pytest.mark.parametrize("text", ["x = " + "9" * 5_000, "x = [" * 5_000, "x = 2020-99-99", "x = "])
def test_text_that_tomllib_cannot_read_is_no_toml(text: str, tmp_path: Path) -> None:
    with soon(), pytest.raises(UsageError, match="TOML"):
        settings(tmp_path, text)


@pytest.mark.parametrize("letter", ["a", ".", '"', "'", " ", "#", "\\", "a.", '"""', "-_", '\\"""'])
def test_long_toml_is_searched_for_deep_keys_soon(letter: str, tmp_path: Path) -> None:
    with soon(), pytest.raises(UsageError):
        settings(tmp_path, letter * (900_000 // len(letter)) + "\n]")


@pytest.mark.parametrize(
    "text",
    [
        'description = "' + "a.b." * 1_000 + '"',
        'description = """' + "\n...a.b" * 1_000 + '"""',
        "description = '" + ". " * 1_000 + "'  # " + "a.b" * 1_000,
        "x = [" + "0.1, " * 1_000 + "]",
        "[a.b.c.d.e]\nf.g.h = 1.5",
    ],
)
def test_dots_in_texts_and_numbers_are_no_keys(text: str, tmp_path: Path) -> None:
    own = '\n[tool.vera-convert.validate]\nignore = ["V122"]\n'
    assert settings(tmp_path, text + own).ignore == ("V122",)


def test_the_limits_refuse_no_ordinary_base(tmp_path: Path, run: Run) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    config = {"model_type": "llama", "quantization_config": {"ignore": ["lm_head", "re:.*_proj"]}}
    base = tiny_base(tmp_path / "base", config=config)
    ended = run("validate", adapter, "--base", base)
    assert ended.status == 0, ended.out
    assert len(TENSORS) < 20
