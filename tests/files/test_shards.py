from __future__ import annotations

import pytest

from vera_convert.errors import CheckpointError
from vera_convert.files.shards import (
    WeightFiles,
    find_weights,
    index_findings,
    read_weight_map,
    require_shards,
    stray_weights,
)

INDEX = "model.safetensors.index.json"
DIFFUSION = "diffusion_pytorch_model"
MISTRAL_INDEX = "consolidated.safetensors.index.json"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["config.json", "model.safetensors"], ("", None, "model.safetensors")),
        ([INDEX, "model-1.safetensors"], ("", INDEX, None)),
        # R39: the index has precedence over other weight files.
        ([INDEX, "model.safetensors", "consolidated.safetensors"], ("", INDEX, None)),
        (["model.safetensors", "model.fp16.safetensors"], ("", None, "model.safetensors")),
        ([f"{DIFFUSION}.safetensors"], ("", None, f"{DIFFUSION}.safetensors")),
        ([INDEX, "consolidated.safetensors.index.json"], ("", INDEX, None)),
        (["my_model.fp16.safetensors"], ("", None, "my_model.fp16.safetensors")),
        (["weights.safetensors"], ("", None, "weights.safetensors")),
        (["m-00001-of-00001.safetensors"], ("", None, "m-00001-of-00001.safetensors")),
        (["weights.safetensors", "adapter_model.safetensors"], ("", None, "weights.safetensors")),
        (["model.safetensors", "pytorch_model.bin"], ("", None, "model.safetensors")),
        (
            [
                "model_index.json",
                f"transformer/{DIFFUSION}.safetensors.index.json",
                f"transformer/{DIFFUSION}-1.safetensors",
                "vae/x.safetensors",
                "flux.safetensors",
            ],
            ("transformer/", f"transformer/{DIFFUSION}.safetensors.index.json", None),
        ),
        (
            ["model_index.json", f"unet/{DIFFUSION}.safetensors"],
            ("unet/", None, f"unet/{DIFFUSION}.safetensors"),
        ),
    ],
)
def test_the_weights_are_found(names: list[str], expected: tuple[str, str, str]) -> None:
    assert find_weights(names, place="base") == WeightFiles(*expected)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "V501"),
        (["config.json", "training_args.bin", "sub/model.safetensors"], "V501"),
        (["config.json", "pytorch_model.bin"], "V502.*pytorch_model.bin"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "V502"),
        (["model.gguf", "config.json"], "V503.*model.gguf"),
        (["tf_model.h5"], "V503"),
        (["adapter_config.json", "adapter_model.safetensors"], "V504"),
        (["a.safetensors", "b.safetensors"], "V505.*a.safetensors, b.safetensors"),
        (["model-00001-of-00002.safetensors"], "V505"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "V505"),
        (["a.safetensors.index.json", "b.safetensors.index.json"], "V505"),
        (["model_index.json", "unet/a.safetensors", "transformer/a.safetensors"], "V505"),
        (["consolidated.safetensors"], "V514.*consolidated.safetensors"),
        (["consolidated.safetensors", "pytorch_model.bin"], "V514"),
        (["consolidated-00001-of-00002.safetensors", MISTRAL_INDEX], "V514.*index"),
        (["consolidated-00001-of-00002.safetensors"], "V514"),
        ([MISTRAL_INDEX, "model-00001-of-00001.safetensors"], "V514.*index"),
        (["consolidated.safetensors", "a.safetensors"], "V505"),
        (["model.fp16.safetensors"], 'V515.*only the variant "fp16"'),
        (["model.fp16.safetensors.index.json"], 'V515.*only the variant "fp16"'),
        ([f"{DIFFUSION}.non_ema.safetensors"], 'V515.*only the variant "non_ema"'),
        (["model.fp16.safetensors", "model.bf16.safetensors"], 'V515.*"bf16" and "fp16"'),
        (["model.fp16-00001-of-00002.safetensors"], 'V515.*"fp16"'),
        (["model.safetensors.index.fp16.json", "model.fp16-1-of-1.safetensors"], "V515"),
        (["model_index.json", f"unet/{DIFFUSION}.fp16.safetensors"], 'V515.*"fp16"'),
        (["model_index.json", "vae/a.safetensors"], "V501"),
        (["model_index.json", "unet/a.bin"], "V501"),
    ],
)
def test_the_refusal_of_a_folder_without_weights_names_the_reason(
    names: list[str], reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        find_weights(names, place="base")


def test_an_index_names_shards_relative_to_its_folder() -> None:
    document = {"metadata": {}, "weight_map": {"a": "x.safetensors", "b": "deep/y.safetensors"}}
    assert read_weight_map(document, INDEX, place="i") == {
        "a": "x.safetensors",
        "b": "deep/y.safetensors",
    }
    below = read_weight_map(document, f"transformer/{INDEX}", place="i")
    assert below["b"] == "transformer/deep/y.safetensors"


@pytest.mark.parametrize(
    ("document", "code"),
    [
        ([], "V506"),
        ({}, "V506"),
        ({"weight_map": []}, "V506"),
        ({"weight_map": {}}, "V506"),
        ({"weight_map": {"a": None}}, "V506"),
        ({"weight_map": {"a": ["x.safetensors"]}}, "V506"),
        ({"weight_map": {"a": "x.bin"}}, "V506"),
        ({"weight_map": {"a": "../x.safetensors"}}, "V005"),
        ({"weight_map": {"a": "/x.safetensors"}}, "V005"),
        ({"weight_map": {"a": "C:\\x.safetensors"}}, "V005"),
        ({"weight_map": {"a": "x\0.safetensors"}}, "V005"),
    ],
)
def test_a_malformed_index_is_refused(document: object, code: str) -> None:
    with pytest.raises(CheckpointError, match=code):
        read_weight_map(document, INDEX, place="i")


def test_every_missing_shard_is_named() -> None:
    with pytest.raises(CheckpointError) as error:
        require_shards(["a", "b", "c"], ["b"], place="base")
    assert [found.reason for found in error.value.findings] == [
        "a is not there.",
        "c is not there.",
    ]


def test_other_weight_files_that_a_loader_could_take_are_strays() -> None:
    names = [
        "model.safetensors",
        "model.fp16.safetensors",
        "original/consolidated.safetensors",
        "adapter_model.safetensors",
        "vae/config.json",
        "vae/model.safetensors",
        "vae/deep/model.safetensors",
        "lora/adapter_config.json",
        "lora/adapter_model.safetensors",
    ]
    weights = WeightFiles("", None, "model.safetensors")
    assert stray_weights(names, weights, ["model.safetensors"]) == (
        "model.fp16.safetensors",
        "original/consolidated.safetensors",
    )


def test_strays_of_a_component_are_in_its_folder_or_the_root() -> None:
    names = ["flux.safetensors", "vae/a.safetensors", "unet/a.safetensors", "unet/b.safetensors"]
    names += ["unet/config.json", "model_index.json"]
    weights = WeightFiles("unet/", None, "unet/a.safetensors")
    assert stray_weights(names, weights, ["unet/a.safetensors"]) == (
        "flux.safetensors",
        "unet/b.safetensors",
    )


def test_index_and_shards_are_compared_both_ways() -> None:
    weight_map = {"ok": "1", "absent": "1", "moved": "1", "twice": "2"}
    shards = {"1": ["ok", "twice"], "2": ["moved", "twice", "extra"]}
    findings = index_findings(weight_map, shards, place="model")
    assert {finding.place for finding in findings} == {"model"}
    assert [(finding.code, finding.reason) for finding in findings] == [
        ("V508", '"absent", which the index puts into 1.'),
        ("V509", '"moved", which the index puts into 1, and which lies in 2.'),
        ("V510", '"extra", which lies in 2.'),
        ("V511", '"twice", which the index puts into 2, and which lies in 1, 2.'),
    ]
