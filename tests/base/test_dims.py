"""The dims of A and B if the base's files hold more layers than the adapter's file adapts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapterdefects import A, B, drawn
from adapters import KEY, RANK, good_adapter
from bases import TENSORS, tiny_base
from folders import bytes_by_name, refusal, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vera_convert.base.facts import BaseOptions
from vera_convert.conversion.migration import Mode, migrate
from vera_convert.conversion.regeneration import regenerate_for
from vera_convert.conversion.strip_embed import embed, strip
from vera_convert.draws.generator import Draw, Variant
from vera_convert.errors import CheckpointError
from vera_convert.merging.merge import merge
from vera_convert.rules import Finding, Severity
from vera_convert.summary import info
from vera_convert.targets.built import BuiltLayers
from vera_convert.validation.validate import validate

LAYERS = {"model_type": "unheard-of", "num_hidden_layers": 2}
Shapes = Mapping[str, Sequence[int]]
LEFT_OUT: Mapping[str, Shapes] = {
    "a layer behind the last one": {"model.layers.2.self_attn.q_proj.weight": (40, 48)},
    "a block for several tokens": {"mtp.layers.0.self_attn.q_proj.weight": (40, 48)},
    "such a block in the model": {"model.mtp_layers.0.self_attn.v_proj.weight": (40, 48)},
}
"""Layers whose names show that no class builds the layers."""
UNTOLD: Mapping[str, Shapes] = {
    "a vision tower": {"vision.blocks.0.attn.q_proj.weight": (40, 48)},
    "experts": {f"model.layers.1.mlp.experts.{n}.v_proj.weight": (40, 48) for n in range(2)},
    "a stack of its own": {"model.encoder.layers.0.self_attn.q_proj.weight": (40, 48)},
}
"""Layers for which the files do not show whether the class builds the layers."""


def found(findings: Sequence[Finding], code: str = "V411") -> list[Finding]:
    """Return the findings with a code."""
    return [finding for finding in findings if finding.code == code]


def severities(findings: Sequence[Finding]) -> dict[str, Severity]:
    """Return the severity of each code."""
    return {finding.code: finding.severity for finding in findings}


@pytest.mark.parametrize("more", [*LEFT_OUT.values(), *UNTOLD.values()], ids=[*LEFT_OUT, *UNTOLD])
@pytest.mark.parametrize("stripped", [True, False], ids=["from the key", "stored"])
def test_layers_that_only_the_base_has_change_no_byte_of_the_result(
    more: Shapes, stripped: bool, tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter", stripped=stripped)
    plain = tiny_base(tmp_path / "plain", config=LAYERS)
    wider = tiny_base(tmp_path / "wider", config=LAYERS, tensors=more)
    for base in (plain, wider):
        out = tmp_path / f"of-{base.name}"
        out.mkdir()
        embed(folder, out / "embedded", base=base)
        strip(folder, out / "stripped", base=base)
        migrate(folder, out / "migrated", to=Mode.EMBEDDED, base=base)
        migrate(folder, out / "asis", to=Mode.ASIS, base=base)
        if stripped:
            regenerate_for(folder, out / "pair.safetensors", base=base)
    assert bytes_by_name(tmp_path / "of-plain") == bytes_by_name(tmp_path / "of-wider")
    merged = []
    for base in (plain, wider):
        merge(folder, tmp_path / f"merged-{base.name}", base=base)
        merged.append(tensors_of(tmp_path / f"merged-{base.name}"))
    assert merged[0].items() <= merged[1].items()
    assert info(folder, base=wider).sizes.embedded == info(folder, base=plain).sizes.embedded
    assert info(folder, base=wider).effects == info(folder, base=plain).effects


def tensors_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each tensor of a merged model."""
    from safetensors.numpy import load_file

    return {name: each.tobytes() for name, each in load_file(folder / "model.safetensors").items()}


ELEMENTS = st.sampled_from(
    [
        *("model", "layers", "mtp", "vision", "encoder", "decoder", "experts", "mlp"),
        *("self_attn", "blocks", "extra", "0", "1", "2", "7"),
    ]
)
TARGETS = st.sampled_from(["q_proj", "v_proj"])


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.lists(ELEMENTS, max_size=5),
    target=TARGETS,
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_a_further_tensor_of_any_name_changes_no_byte(
    path: list[str], target: str, shape: tuple[int, int], dtype: str, tmp_path_factory: Any
) -> None:
    name = ".".join((*path, target, "weight"))
    folder = tmp_path_factory.mktemp("more")
    adapter = good_adapter(folder / "adapter", stripped=True)
    plain = tiny_base(folder / "plain", config=LAYERS)
    if name in TENSORS:
        return  # the adapter adapts this layer
    told_apart = not any(name in other for other in TENSORS)
    more = tiny_base(
        folder / "more",
        config=LAYERS,
        tensors={name: shape},
        dtypes={name: dtype} if told_apart else {},
    )
    embed(adapter, folder / "expected", base=plain)
    done = embed(adapter, folder / "found", base=more)
    assert bytes_by_name(folder / "expected") == bytes_by_name(folder / "found")
    assert {f.code for f in done.findings} <= {"V410", "V411"}


# --- findings about further layers ---------------------------------------------------------------


@pytest.mark.parametrize("more", LEFT_OUT.values(), ids=LEFT_OUT)
def test_layers_that_no_class_builds_are_a_note(more: Shapes, tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter", stripped=True)
    base = tiny_base(tmp_path / "base", config=LAYERS, tensors=more)
    (finding,) = found(embed(folder, tmp_path / "out", base=base).findings)
    assert finding.severity is Severity.NOTE


@pytest.mark.parametrize("more", UNTOLD.values(), ids=UNTOLD)
def test_layers_that_could_change_the_dims_are_a_warning_with_both_dims(
    more: Shapes, tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter", stripped=True)
    base = tiny_base(tmp_path / "base", config=LAYERS, tensors=more)
    (finding,) = found(embed(folder, tmp_path / "out", base=base).findings)
    assert finding.severity is Severity.WARNING
    assert "16 inputs and 16 outputs" in finding.reason
    assert "48 inputs and 40 outputs" in finding.reason


@pytest.mark.parametrize("more", UNTOLD.values(), ids=UNTOLD)
def test_stored_a_and_b_prove_the_dims(more: Shapes, tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    base = tiny_base(tmp_path / "base", config=LAYERS, tensors=more)
    (checked,) = validate([folder], base=base, fail_on=Severity.WARNING).adapters
    assert severities(checked.findings) == {"V411": Severity.NOTE, "V122": Severity.NOTE}
    strip(folder, tmp_path / "stripped", base=base)
    (checked,) = validate([tmp_path / "stripped"], base=base).adapters
    assert severities(checked.findings) == {"V411": Severity.NOTE, "V122": Severity.NOTE}
    wide = good_adapter(tmp_path / "wide")
    drawn(width=48, height=40)(wide)
    assert strip(wide, tmp_path / "wide-stripped", base=base).embedded is False
    back = embed(tmp_path / "wide-stripped", tmp_path / "back", base=base)
    assert weights(back.out)[A].shape == (RANK, 48)


def test_further_layers_that_are_not_wider_are_a_note(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter", stripped=True)
    tower = {f"vision.blocks.{n}.q_proj.weight": (16, 16) for n in range(3)}
    base = tiny_base(tmp_path / "base", config=LAYERS, tensors=tower)
    (finding,) = found(embed(folder, tmp_path / "out", base=base).findings)
    assert finding.severity is Severity.NOTE
    assert "vision.blocks.0.q_proj and 2 more layers" in finding.reason


# --- files that lack layers ----------------------------------------------------------------------


def without(*modules: str) -> dict[str, None]:
    """Return changes that remove the vectors of some layers."""
    names = (f"base_model.model.model.layers.{module}.vera_lambda_" for module in modules)
    return {name + vector: None for name in names for vector in "bd"}


WIDE_LAST: Shapes = {"model.layers.2.self_attn.q_proj.weight": (40, 48)}
CUT: Mapping[str, tuple[dict[str, object], Shapes, dict[str, None]]] = {
    "the last layer": ({"num_hidden_layers": 3}, WIDE_LAST, {}),
    "a layer between others": (
        {},
        {"model.layers.0.self_attn.q_proj.weight": (40, 48)},
        without("0.self_attn.q_proj"),
    ),
    "one of the last layer's targets": (
        {},
        {"model.layers.1.self_attn.q_proj.weight": (40, 48)},
        without("1.self_attn.q_proj"),
    ),
    "a layer of the text model": (
        {"text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 9}},
        WIDE_LAST,
        {},
    ),
}


@pytest.mark.parametrize(("config", "more", "gone"), CUT.values(), ids=CUT)
def test_a_file_that_lacks_a_layer_is_refused_with_both_dims(
    config: dict[str, object], more: Shapes, gone: dict[str, Any], tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter", stripped=True, tensors=gone)
    base = tiny_base(tmp_path / "base", config={"model_type": "x", **config}, tensors=more)
    for act in (
        lambda: embed(folder, tmp_path / "no", base=base),
        lambda: merge(folder, tmp_path / "no", base=base),
        lambda: migrate(folder, tmp_path / "no", to=Mode.EMBEDDED, base=base),
        lambda: regenerate_for(folder, tmp_path / "no.safetensors", base=base),
        lambda: info(folder, base=base),
    ):
        assert refusal(act) == "V421"
    (checked,) = validate([folder], base=base).adapters
    (finding,) = found(checked.findings, "V421")
    assert "16 inputs and 16 outputs without this layer" in finding.reason
    assert "48 inputs and 40 outputs with this layer" in finding.reason
    assert not (tmp_path / "no").exists()


def test_a_missing_layer_that_does_not_change_the_dims_is_a_warning(tmp_path: Path) -> None:
    gone: dict[str, Any] = without("0.self_attn.v_proj")
    folder = good_adapter(tmp_path / "adapter", stripped=True, tensors=gone)
    base = tiny_base(tmp_path / "base", config=LAYERS)
    (finding,) = found(embed(folder, tmp_path / "out", base=base).findings)
    assert finding.severity is Severity.WARNING
    assert "model.layers.0.self_attn.v_proj" in finding.reason


def test_a_target_that_a_known_class_builds_in_every_layer_counts_as_missing(
    tmp_path: Path,
) -> None:
    targets = ["q_proj", "v_proj", "down_proj"]
    folder = good_adapter(tmp_path / "adapter", stripped=True, target_modules=targets)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    known = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 32, **sizes}
    base = tiny_base(tmp_path / "base", config=known)
    assert refusal(lambda: embed(folder, tmp_path / "no", base=base)) == "V421"
    other = tiny_base(tmp_path / "other", config=LAYERS)
    (finding,) = found(embed(folder, tmp_path / "out", base=other).findings)
    assert finding.severity is Severity.WARNING
    assert weights(tmp_path / "out")[A].shape == (RANK, 16)


def test_stored_a_and_b_of_a_file_that_lacks_layers_are_used_unchanged(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    drawn(width=48, height=40)(folder)
    base = tiny_base(
        tmp_path / "base", config={"model_type": "x", "num_hidden_layers": 3}, tensors=WIDE_LAST
    )
    assert [f.code for f in strip(folder, tmp_path / "out", base=base).findings] == ["V411"]
    unlike = good_adapter(tmp_path / "unlike")
    drawn(width=20)(unlike)
    assert {"V411", "V416"} <= {f.code for f in info(unlike, base=base).findings}


def test_a_merge_reports_a_and_b_that_are_wider_than_every_layer(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    drawn(width=20, height=20)(folder)
    base = tiny_base(tmp_path / "base")
    assert "V416" in {
        finding.code for finding in merge(folder, tmp_path / "out", base=base).findings
    }


# --- lists that PEFT shortens --------------------------------------------------------------------


def test_layers_with_full_names_in_target_modules_count_despite_layers_to_transform(
    tmp_path: Path,
) -> None:
    kinds = {"self_attn.q_proj": (16, 16), "mlp.up_proj": (24, 16)}
    shapes = {f"model.layers.{n}.{kind}": s for n in range(10) for kind, s in kinds.items()}
    shapes["model.layers.9.mlp.up_proj"] = (40, 16)
    vectors = {
        f"base_model.model.model.layers.0.{kind}.vera_lambda_{v}": np.ones(n, np.float32)
        for kind, (out, _) in kinds.items()
        for v, n in (("b", out), ("d", RANK))
    }
    gone: dict[str, Any] = without(*(f"{n}.self_attn.{t}_proj" for n in (0, 1) for t in "qv"))
    folder = good_adapter(
        tmp_path / "adapter",
        stripped=True,
        tensors={**gone, **vectors},
        target_modules=[*shapes],
        layers_to_transform=[0],
    )
    weights_of = {f"{name}.weight": shape for name, shape in shapes.items()}
    for name, more in (("base", {}), ("more", {"mtp.q_proj.weight": (90, 90)})):
        base = tiny_base(
            tmp_path / name,
            config={"model_type": "x", "num_hidden_layers": 10},
            tensors={**weights_of, **more},
        )
        embed(folder, tmp_path / f"{name}-out", base=base)
        stored = weights(tmp_path / f"{name}-out")
        expected = Draw(
            Variant.FLOAT32_FUSED, key=KEY, rank=RANK, in_features=16, out_features=40
        ).matrices()
        assert np.array_equal(stored[A], expected[0])
        assert np.array_equal(stored[B], expected[1])


# --- the config of the base ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "adapted", "module", "built"),
    [
        ({"num_hidden_layers": 2}, "model.layers.1.q", "model.layers.2.q", False),
        ({"num_hidden_layers": 3}, "model.layers.1.q", "model.layers.2.q", None),
        ({}, "model.layers.1.q", "model.layers.2.q", None),
        ({"n_layer": 2}, "h.1.attn.c", "h.2.attn.c", False),
        (
            {"encoder_layers": 2, "decoder_layers": 4},
            "model.decoder.layers.1.fc1",
            "model.decoder.layers.3.fc1",
            None,
        ),
        (
            {"encoder_layers": 9, "decoder_layers": 4},
            "model.decoder.layers.1.fc1",
            "model.decoder.layers.4.fc1",
            False,
        ),
        (
            {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 27}},
            "model.language_model.layers.1.q",
            "model.language_model.layers.2.q",
            False,
        ),
        (
            {"text_config": {"num_hidden_layers": 26}, "vision_config": {"num_hidden_layers": 27}},
            "vision.layers.25.q",
            "vision.layers.26.q",
            None,
        ),
        ({"num_layers": 1, "num_single_layers": 3}, "single_blocks.1.q", "single_blocks.2.q", None),
        ({"num_hidden_layers": 2}, "model.layers.1.q", "visual.layers.5.q", None),
        ({"num_hidden_layers": True}, "model.layers.0.q", "model.layers.1.q", None),
        (
            {"num_hidden_layers": 4, "num_kv_shared_layers": 2},
            "model.layers.1.self_attn.k_proj",
            "model.layers.2.self_attn.k_proj",
            False,
        ),
        ({}, "model.layers.0.q", "mtp.layers.0.q", False),
        ({}, "mtp.layers.0.q", "mtp.layers.1.q", None),
    ],
)
def test_a_config_shows_which_layers_are_built(
    config: dict[str, object], adapted: str, module: str, built: bool | None
) -> None:
    assert BuiltLayers(config, [adapted]).has(module) is built


def test_a_config_nested_without_end_costs_no_time() -> None:
    config: dict[str, object] = {"num_hidden_layers": 2}
    for _ in range(300):
        config = {f"{n}_config": config for n in range(9)}
    assert BuiltLayers(config, ["a.0.q"]).has("a.9.q") is None


def test_dims_are_the_widest_of_the_layers_that_the_file_adapts(tmp_path: Path) -> None:
    vectors = {
        f"base_model.model.model.layers.{n}.mlp.down_proj.vera_lambda_{v}": np.ones(size, "f4")
        for n in range(2)
        for v, size in (("b", 16), ("d", RANK))
    }
    folder = good_adapter(
        tmp_path / "adapter",
        stripped=True,
        tensors=vectors,
        target_modules=["q_proj", "v_proj", "down_proj"],
    )
    done = embed(folder, tmp_path / "out", base=BaseOptions(str(tiny_base(tmp_path / "base"))))
    assert not found(done.findings)
    assert weights(tmp_path / "out")[A].shape == (RANK, 24)
    assert weights(tmp_path / "out")[B].shape == (16, RANK)


def test_layers_that_the_config_does_not_match_are_reported_or_refused(tmp_path: Path) -> None:
    more = {"mtp.q_proj.weight": (90, 90), "vision.w_proj.weight": (90, 90)}
    for name, tensors in (("base", {}), ("more", more)):
        base = tiny_base(tmp_path / name, tensors=tensors)
        narrow = good_adapter(tmp_path / f"{name}-narrow", target_modules=["v_proj"])
        with pytest.raises(CheckpointError, match="V412"):
            embed(narrow, tmp_path / "no", base=base)
        unlike = good_adapter(tmp_path / f"{name}-unlike", target_modules=["w_proj"])
        findings = strip(unlike, tmp_path / f"{name}-out", base=base).findings
        (finding,) = (each for each in findings if each.code == "V132")
        assert finding.severity is Severity.WARNING
        assert "match none of the 4 layers" in finding.reason
        assert finding.file == "adapter_config.json"
        json.dumps(finding.reason)
