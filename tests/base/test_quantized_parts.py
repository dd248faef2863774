"""A quantized base with a part that is missing, foreign or misshapen is refused with a code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from folders import DATA

from vera_convert.base.model import BaseModel, BaseTensor, read_base
from vera_convert.base.quantized.layer_settings import settings_by_layer
from vera_convert.base.quantized.recognize import layer_of
from vera_convert.base.quantized.unpack import unpacked
from vera_convert.errors import CheckpointError
from vera_convert.files.header import TensorInfo
from vera_convert.hub.lookup import HubAccess, Location
from vera_convert.rules import CATALOG
from vera_convert.targets import patterns

FIXTURES = DATA / "quantized"
NAMES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
CODES = {"V552", "V553", "V554"}
Change = Callable[[TensorInfo], TensorInfo]
OPTIONAL = {"g_idx", "weight_format"}
"""Parts that the libraries do not need in these files or in any file."""


def base_of(name: str) -> BaseModel:
    folder = FIXTURES / name / "base"
    return read_base(Location("base", folder), HubAccess(offline=True))


def section_of(base: BaseModel) -> Mapping[str, Any]:
    section = base.config["quantization_config"]
    assert isinstance(section, Mapping)
    return section


def parts_of(base: BaseModel) -> tuple[str, ...]:
    """Return the parts of the first packed weight."""
    return next(iter(unpacked(base).weights.values())).parts


def with_tensors(base: BaseModel, tensors: Mapping[str, BaseTensor]) -> set[str]:
    """Return the codes of the defects of a base with these tensors."""
    return {finding.code for finding in unpacked(replace(base, tensors=tensors)).defects}


@pytest.mark.parametrize("code", ["V550", "V552", "V553", "V554", "V556", "V562"])
def test_a_refusal_names_the_three_ways_out(code: str) -> None:
    remedy = CATALOG[code].remedy
    for way in ("to-lora", "original 16-bit or 32-bit model with --base", "quantizer's own tool"):
        assert way in remedy
    assert "differs slightly from the model of the training" in remedy


@pytest.mark.parametrize("name", NAMES)
def test_the_good_base_has_no_defects(name: str) -> None:
    base = unpacked(base_of(name))
    assert base.defects == ()
    assert len(base.weights) == (2 if "mxfp4" in name else 7)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_part_is_named(name: str) -> None:
    base = base_of(name)
    for part in parts_of(base):
        rest = {key: tensor for key, tensor in base.tensors.items() if key != part}
        is_optional = part.rpartition(".")[2] in OPTIONAL and name != "gptq-4bit-v1"
        found = with_tensors(base, rest)
        assert (found == set()) if is_optional else (found and found <= CODES), part


@pytest.mark.parametrize("name", NAMES)
def test_a_part_of_another_shape_is_refused(name: str) -> None:
    base = base_of(name)
    for part in parts_of(base):
        tensor = base.tensors[part]
        shape = tensor.info.shape
        for other in ((*shape, 1), (*(size + 1 for size in shape), 2)):
            changed = replace(tensor, info=tensor.info._replace(shape=other))
            found = with_tensors(base, {**base.tensors, part: changed})
            assert found, (part, other)
            assert found <= CODES


@pytest.mark.parametrize("name", NAMES)
def test_a_part_of_another_dtype_is_refused(name: str) -> None:
    base = base_of(name)
    for part in parts_of(base):
        tensor = base.tensors[part]
        for dtype in ("I64", "U32", "BOOL", "F8_E8M0"):
            if dtype != tensor.info.dtype:
                changed = replace(tensor, info=tensor.info._replace(dtype=dtype))
                found = with_tensors(base, {**base.tensors, part: changed})
                assert found, (part, dtype)
                assert found <= CODES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "rest", ["weight_g_idx", "zero", "weight.absmax", "SCB", "_weight_qdata", "qweight", "foreign"]
)
def test_a_foreign_part_is_refused(name: str, rest: str) -> None:
    base = base_of(name)
    main = next(iter(unpacked(base).weights.values())).main
    foreign = f"{layer_of(main)[0]}.{rest}"
    if foreign in base.tensors:
        return
    info = TensorInfo(foreign, "F32", (3, 3), 0, 36)
    found = with_tensors(base, {**base.tensors, foreign: replace(base.tensors[main], info=info)})
    assert found
    assert found <= CODES


@pytest.mark.parametrize("name", NAMES)
def test_two_configs_that_disagree_are_refused(name: str) -> None:
    base = base_of(name)
    section = base.config["quantization_config"]
    assert isinstance(section, Mapping)
    part = {"quantization_config": {**section, "quant_method": "hqq", "load_in_4bit": None}}
    config = {**base.config, "text_config": part}
    defects = unpacked(replace(base, config=config)).defects
    assert {finding.code for finding in defects} == {"V554"}
    assert "several quantization_configs, and these disagree" in defects[0].reason


def first_layer(base: BaseModel) -> str:
    """Return the path of the first packed layer."""
    return layer_of(next(iter(unpacked(base).weights.values())).main)[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "U8"])
def test_a_packed_bias_is_refused(name: str, dtype: str) -> None:
    base = base_of(name)
    rest = "gate_up_proj_bias" if "mxfp4" in name else "bias"
    bias = f"{first_layer(base)}.{rest}"
    info = TensorInfo(bias, dtype, (64,), 0, 64)
    file = next(iter(base.files))
    assert with_tensors(base, {**base.tensors, bias: BaseTensor(file, info)}) == {"V553"}


@pytest.mark.parametrize("name", [name for name in NAMES if "mxfp4" not in name])
def test_a_bias_has_a_value_for_each_output(name: str) -> None:
    base = base_of(name)
    weight = next(iter(unpacked(base).weights.values()))
    bias = f"{first_layer(base)}.bias"
    for size, codes in ((weight.shape[0], set()), (weight.shape[0] + 1, {"V553"})):
        info = TensorInfo(bias, "BF16", (size,), 0, 2 * size)
        tensors = {**base.tensors, bias: BaseTensor(next(iter(base.files)), info)}
        assert with_tensors(base, tensors) == codes


@pytest.mark.parametrize("name", [name for name in NAMES if "mxfp4" not in name])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_whose_class_stores_the_transpose_is_refused_by_name(
    name: str, has_bias: bool
) -> None:
    base = base_of(name)
    path = first_layer(base)
    new = "h.0.attn.c_attn"
    tensors = {key.replace(f"{path}.", f"{new}."): each for key, each in base.tensors.items()}
    if has_bias:
        outputs = next(iter(unpacked(base).weights.values())).shape[0]
        info = TensorInfo(f"{new}.bias", "BF16", (outputs,), 0, 2 * outputs)
        tensors[f"{new}.bias"] = BaseTensor(next(iter(base.files)), info)
    files = {
        file: replace(
            header,
            metadata={k.replace(f"{path}.", f"{new}."): v for k, v in header.metadata.items()},
        )
        for file, header in base.files.items()
    }
    values = {key.replace(f"{path}.", f"{new}."): value for key, value in base.values.items()}
    config = {**base.config, "model_type": "gpt2"}
    found = unpacked(replace(base, tensors=tensors, files=files, values=values, config=config))
    (finding,) = found.defects
    assert finding.code == "V554"
    assert finding.place == f"{new}.weight"
    assert found.labels[0] in finding.reason
    assert "(in, out)" in finding.reason
    shapes = unpacked(base).view.tensors, found.view.tensors
    assert shapes[0][f"{path}.weight"].info.shape == shapes[1][f"{new}.weight"].info.shape


def test_a_layer_that_the_config_does_not_describe_is_refused_with_the_reason() -> None:
    base = base_of("gptq-8bit")
    config = {key: value for key, value in base.config.items() if key != "quantization_config"}
    first, *_ = unpacked(replace(base, config=config)).defects
    assert first.code == "V554"
    assert "GPTQ or AWQ" in first.reason
    assert "the base's config does not say how the layer is quantized" in first.reason


@pytest.mark.parametrize("expression", ["re:.*proj$", "re:(", "re:(a|a)+$"])
def test_the_expressions_of_a_config_are_compared_in_one_process(
    expression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of("ct-pack-int8-channel-noproj")
    section = section_of(base)
    (group,) = section["config_groups"].values()
    targets = [f"re:.*x{number}$" for number in range(5)]
    other = {**group, "targets": targets, "weights": {**group["weights"], "num_bits": 4}}
    groups = {"a": other, "b": {**group, "targets": [*targets, expression]}}
    settings = {**section, "config_groups": groups}
    started: list[str] = []
    run = patterns._run_child

    def noted(request: str) -> str:
        started.append(request)
        return run(request)

    monkeypatch.setattr(patterns, "_run_child", noted)
    found = unpacked(replace(base, config={**base.config, "quantization_config": settings}))
    assert found.defects == ()
    assert len(found.weights) == 7
    assert len(started) == 1


def with_groups(base: BaseModel, *more: Mapping[str, object]) -> BaseModel:
    """Return a compressed-tensors base with more groups in the config, before the base's own
    groups.
    """
    section = section_of(base)
    groups = {f"more {number}": group for number, group in enumerate(more)}
    settings = {**section, "config_groups": {**groups, **section["config_groups"]}}
    return replace(base, config={**base.config, "quantization_config": settings})


CHANNEL = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
SURPLUS: tuple[Mapping[str, object], ...] = (
    {"targets": ["LlamaAttention"], "weights": None, "input_activations": {"num_bits": 8}},
    {"targets": ["Embedding"], "format": "mxfp4-pack-quantized", "weights": CHANNEL},
    {"targets": ["re:.*experts.*"], "format": "marlin-24", "weights": CHANNEL},
    {"targets": ["q_proj"], "format": "dense", "weights": None},
    {"targets": ["Conv2d"], "weights": {**CHANNEL, "actorder": "group"}},
    {"targets": "Linear"},
)


@pytest.mark.parametrize("number", range(len(SURPLUS)))
def test_a_group_of_other_layers_does_not_matter(number: int) -> None:
    found = unpacked(with_groups(base_of("ct-pack-int8-channel-noproj"), SURPLUS[number]))
    assert found.defects == ()
    assert len(found.weights) == 7


@pytest.mark.parametrize("target", ["re:model.*q_proj", "model.layers.0.self_attn.q_proj"])
@pytest.mark.parametrize(
    "group", [{"weights": {**CHANNEL, "num_bits": 4}}, {"format": "mxfp4", "weights": CHANNEL}]
)
def test_the_group_that_names_a_layer_decides(target: str, group: Mapping[str, object]) -> None:
    base = base_of("ct-pack-int8-channel-noproj")
    found = unpacked(with_groups(base, {"targets": [target], **group}))
    assert {finding.code for finding in found.defects} <= {"V553", "V554"}
    named = {finding.place for finding in found.defects}
    assert "model.layers.0.self_attn.q_proj.weight_packed" in named
    assert all("q_proj" in place for place in named)


def test_a_path_precedes_an_expression_and_an_expression_precedes_a_class() -> None:
    paths = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj", "lm_head"]
    groups = {
        "a": {"targets": ["Linear", "self_attn.q_proj", "re:.*gate_proj$", 5]},
        "b": {"targets": ["re:.*proj", paths[0], "re:head"]},
        "c": None,
        "d": {"targets": ["Embedding"]},
        "e": {"targets": ["re:.*gate_proj$"]},
    }
    base = base_of("ct-pack-int8-channel-noproj")
    found = settings_by_layer(base, {"config_groups": groups, "ignore": []}, paths)
    wanted = {paths[0]: "b", paths[1]: "e", paths[2]: "ad"}
    for path, keys in wanted.items():
        assert found[path] == {"config_groups": {key: groups[key] for key in keys}, "ignore": []}


def test_a_path_of_very_many_elements_is_compared_soon() -> None:
    path = ".".join("a" * 200_000)
    settings = {"config_groups": {"group": {"targets": ["a.a", path]}, "other": {}}}
    base = base_of("ct-pack-int8-channel-noproj")
    found = settings_by_layer(base, settings, [path])
    assert found == {path: {"config_groups": {"group": {"targets": ["a.a", path]}}}}


# --- the rules of gptqmodel ----------------------------------------------------------------------


def with_rules(base: BaseModel, rules: object) -> BaseModel:
    settings = {**section_of(base), "dynamic": rules}
    return replace(base, config={**base.config, "quantization_config": settings})


def of_8_bits(base: BaseModel, ending: str) -> BaseModel:
    """Return a 4-bit base in which layers with this ending have 8 bits."""
    other = base_of("gptq-8bit").tensors
    mixed = {
        name: other[name] if layer_of(name)[0].endswith(ending) else tensor
        for name, tensor in base.tensors.items()
    }
    return replace(base, tensors=mixed)


def test_rules_give_some_layers_other_bits() -> None:
    base = of_8_bits(base_of("gptq-4bit-v1"), "down_proj")
    assert {finding.code for finding in unpacked(base).defects} == {"V553"}
    wide = {"bits": 8, "group_size": section_of(base_of("gptq-8bit"))["group_size"]}
    for rules in (
        {"+:.*down_proj": wide},
        {r".*\.mlp\.down_proj$": wide, ".*": {}, "-:.*down_proj": {}},
        {r"^model\.layers\.0\.mlp\.down_proj$": wide},
    ):
        found = unpacked(with_rules(base, rules))
        assert found.defects == ()
        assert len(found.weights) == 7


@pytest.mark.parametrize(
    "rules",
    [
        {"-:.*q_proj": {}},
        {"-:.*q_proj": {}, ".*q_proj": {"bits": 4}},
        {"+:.*q_proj": {"bits": 8}},
        {".*q_proj": {"bits": 3}},
        {".*q_proj": {"group_size": None}},
        {".*q_proj": {"group_size": 0}},
        {".*q_proj": None},
        {"model.*self_attn.q": {"group_size": 8}},
    ],
)
@pytest.mark.parametrize("name", ["gptq-4bit-v1", "awq-gemm"])
def test_a_rule_that_contradicts_a_layer_is_refused(name: str, rules: Mapping[str, object]) -> None:
    found = unpacked(with_rules(base_of(name), rules))
    assert {finding.code for finding in found.defects} <= {"V553", "V554"}
    places = {finding.place for finding in found.defects}
    assert places
    assert all("q_proj" in place for place in places)


@pytest.mark.parametrize("rules", [{"(": {"bits": 4}}, {"(.|.)+#": {}}, ["-:.*"], "none"])
def test_rules_that_cannot_be_evaluated_are_refused(rules: object) -> None:
    found = unpacked(with_rules(base_of("gptq-4bit-v1"), rules))
    assert {finding.code for finding in found.defects} == {"V554"}
    assert "dynamic" in found.defects[0].reason


def test_every_weight_that_cannot_be_dequantized_is_a_finding() -> None:
    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(60)]
    tensors = {name: BaseTensor("m", TensorInfo(name, "U8", (8, 8), 0, 0)) for name in names}
    base = BaseModel(Location("base", None), {}, {}, tensors)
    with pytest.raises(CheckpointError) as error:
        unpacked(base).refuse_defects()
    assert [finding.code for finding in error.value.findings] == ["V552"] * 60
