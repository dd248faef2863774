from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from safetensors import safe_open

from vera_convert.base.facts import parse_key_map
from vera_convert.base.match import Match, match_modules
from vera_convert.base.model import BaseModel, BaseTensor, read_base
from vera_convert.base.replacements import match_replacements
from vera_convert.base.saved_places import Part
from vera_convert.errors import CheckpointError, UsageError
from vera_convert.files.header import TensorInfo
from vera_convert.hub.lookup import HubAccess, Location
from vera_convert.targets.linear import Linear

Shape = Sequence[int]


def base_of(shapes: Mapping[str, Shape], **config: object) -> BaseModel:
    tensors = {
        name: BaseTensor("model.safetensors", TensorInfo(name, "F32", tuple(shape), 0, 0))
        for name, shape in shapes.items()
    }
    return BaseModel(Location("base", None), {"model_type": "llama", **config}, {}, tensors)


def llama(prefix: str = "model.", *, layers: int = 2) -> dict[str, Shape]:
    """Return the shapes of a tiny Llama: q and o are square, k has fewer outputs, down more
    inputs.
    """
    names = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "mlp.down_proj": (8, 12)}
    return {
        f"{prefix}layers.{n}.{name}.weight": shape
        for n in range(layers)
        for name, shape in names.items()
    } | {f"{prefix}embed_tokens.weight": (40, 8), f"{prefix}norm.weight": (8,)}


Q = {f"model.layers.{n}.self_attn.q_proj": 8 for n in range(2)}
LANGUAGE = ("model.layers", "model.language_model.layers")


def refused(layers: Mapping[str, int], base: BaseModel, **options: object) -> tuple[str, str]:
    """Return the code and the text of the refusal."""
    with pytest.raises(CheckpointError) as error:
        match_modules(layers, base, **options)  # type: ignore[arg-type]
    return error.value.findings[0].code, str(error.value)


def conv1d_of(match: Match) -> frozenset[str]:
    """Return the modules whose tensors are stored as (in, out)."""
    return frozenset(module for module, layer in match.layers.items() if layer.conv1d)


# --- the strategies ------------------------------------------------------------------------------


def test_names_that_fit_are_used_unchanged() -> None:
    layers = {**Q, "model.layers.1.mlp.down_proj": 8, "model.layers.0.self_attn.k_proj": 4}
    match = match_modules(layers, base_of(llama()), widest=12)
    assert match.strategy.name == "names as they are"
    assert match.tensors == {module: f"{module}.weight" for module in layers}
    assert list(match.tensors) == list(layers)
    assert match.layers["model.layers.1.mlp.down_proj"] == Linear(8, 12)
    assert conv1d_of(match) == match.tied == frozenset()


def test_names_that_fit_take_precedence_over_a_key_map_and_a_prefix() -> None:
    both = llama() | llama("model.model.") | llama("model.language_model.")
    match = match_modules(Q, base_of(both), key_map=[LANGUAGE])
    assert match.tensors == {module: f"{module}.weight" for module in Q}


@pytest.mark.parametrize(
    ("adapter", "disk", "strategy"),
    [
        ("", "model.", 'prefix "model." added'),
        ("model.", "", 'prefix "model." removed'),
        ("", "bert.", 'prefix "bert." added'),
        ("transformer.", "", 'prefix "transformer." removed'),
        ("", "my_own.", 'prefix "my_own." added'),
    ],
)
def test_a_base_prefix_is_added_or_removed(adapter: str, disk: str, strategy: str) -> None:
    layers = {f"{adapter}layers.{n}.self_attn.q_proj": 8 for n in range(2)}
    match = match_modules(layers, base_of(llama(disk), model_type="my-own"))
    assert match.strategy.name == strategy
    assert [*match.tensors.values()] == [
        f"{disk}layers.{n}.self_attn.q_proj.weight" for n in (0, 1)
    ]


def test_a_prefix_of_no_model_class_is_not_guessed() -> None:
    layers = {f"layers.{n}.self_attn.q_proj": 8 for n in range(2)}
    code, text = refused(layers, base_of(llama("tower.")))
    assert code == "V520"
    assert "All would fit with --key-map =tower." in text


def test_no_key_map_is_proposed_for_a_single_layer_while_the_others_fit() -> None:
    """A pooler that the model class built anew is not the base's masked-language head."""
    layers = {"layers.0.self_attn.q_proj": 8, "pooler.dense": 8}
    base = base_of(llama("") | {"cls.predictions.transform.dense.weight": (8, 8)})
    code, text = refused(layers, base)
    assert code == "V520"
    assert "--key-map pooler" not in text
    assert "If the model class built this layer anew" in text


def test_a_wrapper_in_the_path_of_some_layers_is_removed_by_a_key_map() -> None:
    layers = {"layers.0.self_attn.q_proj": 8, "layers.1.my_wrapper.self_attn.q_proj": 8}
    code, text = refused(layers, base_of(llama("")))
    assert code == "V520"
    assert "All would fit with --key-map layers.1.my_wrapper=layers.1." in text


def test_two_prefixes_that_fit_are_ambiguous_until_the_user_chooses() -> None:
    base = base_of(llama("bert.") | llama("roberta."))
    layers = {"layers.0.self_attn.q_proj": 8}
    code, text = refused(layers, base)
    assert code == "V521"
    assert 'prefix "bert." added and prefix "roberta." added' in text
    match = match_modules(layers, base, key_map=[("", "roberta")])
    assert match.strategy.name == "--key-map =roberta"
    assert match.tensors == {
        "layers.0.self_attn.q_proj": "roberta.layers.0.self_attn.q_proj.weight"
    }


def test_two_strategies_with_the_same_tensors_are_not_ambiguous() -> None:
    match = match_modules(
        {"layers.0.self_attn.q_proj": 8}, base_of(llama("bert.")), key_map=[("", "bert")]
    )
    assert match.strategy.name == 'prefix "bert." added'


def test_a_key_map_that_contradicts_a_prefix_is_ambiguous() -> None:
    base = base_of(llama("bert.") | llama("tower."))
    code, text = refused({"layers.0.self_attn.q_proj": 8}, base, key_map=[("", "tower")])
    assert code == "V521"
    assert "--key-map =tower" in text


def test_renames_are_combined_with_prefixes() -> None:
    base = base_of(llama("language_model.model."), model_type="llava")
    of_head = {"model.language_model.layers.0.self_attn.q_proj": 8}
    match = match_modules(of_head, base)
    assert match.strategy.name == "names of Llava since transformers 4.52"
    without_head = {"language_model.layers.0.self_attn.q_proj": 8}
    tensor = "language_model.model.layers.0.self_attn.q_proj.weight"
    match = match_modules(without_head, base)
    assert match.tensors == {"language_model.layers.0.self_attn.q_proj": tensor}
    assert match.strategy.name == 'prefix "model." added, names of Llava since transformers 4.52'
    assert (
        match.strategy.undo(tensor.removesuffix(".weight"))
        == "language_model.layers.0.self_attn.q_proj"
    )


# --- refusals ------------------------------------------------------------------------------------


def test_the_refusal_shows_counts_and_a_name_of_each_side() -> None:
    # R01: the adapter's names lack the first elements of the served class's names.
    code, text = refused(Q, base_of(llama("model.language_model.")))
    assert code == "V520"
    assert "0 of 2 layers" in text
    assert '"model.layers.0.self_attn.q_proj"' in text
    assert '"model.language_model.layers.0.self_attn.q_proj.weight"' in text
    assert "All would fit with --key-map model=model.language_model." in text


def test_a_single_missing_layer_refuses_all_layers() -> None:
    code, text = refused({**Q, "model.layers.2.self_attn.q_proj": 8}, base_of(llama()))
    assert code == "V520"
    assert "2 of 3 layers" in text
    assert '"model.layers.2.self_attn.q_proj" has none' in text
    assert "would fit" not in text


def test_an_adapter_with_two_layouts_is_refused() -> None:
    # R06: half of the keys are renamed.
    layers = {"model.layers.0.self_attn.q_proj": 8, "language_model.layers.1.self_attn.q_proj": 8}
    maps = [("language_model", "model"), ("model", "language_model")]
    code, text = refused(layers, base_of(llama()), key_map=maps[1:])
    assert code == "V520"
    assert "1 of 2 layers" in text
    assert match_modules(layers, base_of(llama()), key_map=maps).strategy.name == (
        "--key-map language_model=model"
    )


def test_two_layers_of_one_tensor_are_refused() -> None:
    layers = {"model.layers.0.self_attn.q_proj": 8, "layers.0.self_attn.q_proj": 8}
    code, _ = refused(layers, base_of(llama("")), key_map=[("model", "")])
    assert code == "V520"


def test_names_are_escaped() -> None:
    _, text = refused({"a\x1b[31m": 8}, base_of({"b\u202e.weight": (8, 8)}))
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_shapes_that_differ_are_refused() -> None:
    wrong = {**Q, "model.layers.0.self_attn.k_proj": 8}
    code, text = refused(wrong, base_of(llama()))
    assert code == "V522"
    assert "it has 4 outputs and lambda_b has 8 values" in text
    code, text = refused({"model.layers.0.mlp.down_proj": 8}, base_of(llama()), widest=11)
    assert code == "V522"
    assert "it has 12 inputs and vera_A has 11 columns" in text


def test_outputs_equal_to_the_inputs_of_a_layer_do_not_transpose_the_layer() -> None:
    # lambda_b is as long as down_proj is wide; no Llama layer is stored as (in, out).
    code, _ = refused({"model.layers.0.mlp.down_proj": 12}, base_of(llama()))
    assert code == "V522"


def test_a_weight_that_is_no_matrix_is_refused() -> None:
    assert refused({"model.norm": 8}, base_of(llama()))[0] == "V523"
    experts = base_of({"experts.weight": (2, 8, 8)})
    assert "several experts" in refused({"experts": 8}, experts)[1]


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((8, 4, 3), "nn.Conv1d"), ((8, 4, 1, 1), "nn.Conv2d"), ((8, 4, 2, 2, 2), "nn.Conv3d")],
)
def test_the_refusal_of_a_convolution_names_the_convolution(
    shape: tuple[int, ...], kind: str
) -> None:
    code, text = refused({"conv_in": 8}, base_of({"conv_in.weight": shape}))
    assert code == "V523"
    assert f"probably the layer is a convolution ({kind})" in text


def test_a_base_without_matrices_is_refused() -> None:
    code, text = refused(Q, base_of({"x.qweight": (8, 1)}))
    assert code == "V520"
    assert "0 of 2 layers" in text


def test_every_layer_of_another_shape_is_a_finding() -> None:
    layers = {f"model.layers.{n}.self_attn.q_proj": 9 for n in range(60)}
    with pytest.raises(CheckpointError) as error:
        match_modules(layers, base_of(llama(layers=60)))
    assert [finding.code for finding in error.value.findings] == ["V522"] * 60


# --- --key-map -----------------------------------------------------------------------------------


def test_a_key_map_is_used_if_no_other_strategy_fits() -> None:
    base = base_of(llama("model.language_model."))
    match = match_modules(Q, base, key_map=[("model.layer", "x"), LANGUAGE, LANGUAGE])
    assert match.strategy.name == "--key-map model.layers=model.language_model.layers"
    assert [*match.tensors.values()] == [
        f"model.language_model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)
    ]


def test_two_key_maps_that_fit_are_ambiguous() -> None:
    base = base_of(llama("model.language_model."))
    code, text = refused(Q, base, key_map=[LANGUAGE, ("model", "model.language_model")])
    assert code == "V521"
    assert "model.layers=model.language_model.layers" in text
    assert "--key-map model=model.language_model" in text


@pytest.mark.parametrize(
    ("old", "new", "module", "expected"),
    [
        ("a", "b", "a.x", "b.x"),
        ("a", "b", "a", "b"),
        ("a", "b", "ab.x", "ab.x"),
        ("a.b", "c", "a.b.x", "c.x"),
        ("", "p", "a.x", "p.a.x"),
        ("a", "", "a.x", "x"),
    ],
)
def test_a_key_map_replaces_whole_leading_elements(
    old: str, new: str, module: str, expected: str
) -> None:
    base = base_of({f"{expected}.weight": (8, 8)})
    match = match_modules({module: 8}, base, key_map=[(old, new)])
    assert match.tensors == {module: f"{expected}.weight"}


def test_a_key_map_is_parsed() -> None:
    assert parse_key_map("key_map", "model.layers=x.layers") == ("model.layers", "x.layers")
    assert parse_key_map("key_map", "=p") == ("", "p")
    assert parse_key_map("key_map", "p=") == ("p", "")
    for text in ("", "=", "a", "a=b=c", ".a=b", "a.=b", "a..b=c", "a b=c"):
        with pytest.raises(UsageError, match=r"key_map is .*: give OLD=NEW"):
            parse_key_map("key_map", text)


# --- orientation ---------------------------------------------------------------------------------

GPT2: dict[str, Shape] = {
    "transformer.h.0.attn.c_attn.weight": (4, 12),
    "transformer.h.0.attn.c_attn.bias": (12,),
    "transformer.h.0.attn.c_proj.weight": (4, 4),
    "transformer.h.0.attn.c_proj.bias": (4,),
    "transformer.wte.weight": (40, 4),
}
ATTENTION = {"transformer.h.0.attn.c_attn": 12, "transformer.h.0.attn.c_proj": 4}


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_the_base_and_not_the_adapter_decides_conv1d(fan_in_fan_out: bool) -> None:
    for config in ({"model_type": "gpt2"}, {"model_type": None}):
        match = match_modules(
            ATTENTION, base_of(GPT2, **config), fan_in_fan_out=fan_in_fan_out, widest=4
        )
        assert conv1d_of(match) == ATTENTION.keys()
        assert match.layers["transformer.h.0.attn.c_attn"] == Linear(12, 4, conv1d=True)
    # A wrong field does not transpose a model that has no Conv1D layers.
    match = match_modules(Q, base_of(llama()), fan_in_fan_out=fan_in_fan_out)
    assert conv1d_of(match) == frozenset()


def test_a_square_weight_has_the_orientation_of_the_base_s_other_weights() -> None:
    module = "transformer.h.0.attn.c_proj"
    match = match_modules({module: 4}, base_of(GPT2, model_type=None))
    assert conv1d_of(match) == {module}


def test_the_config_field_decides_if_the_base_does_not() -> None:
    unknown = base_of({"x.weight": (8, 8), "y.weight": (2, 8)}, auto_map={})
    assert conv1d_of(match_modules({"x": 8}, unknown)) == frozenset()
    assert conv1d_of(match_modules({"x": 8}, unknown, fan_in_fan_out=True)) == {"x"}
    # A neighbor whose shape shows the orientation has precedence over the field.
    assert conv1d_of(match_modules({"x": 8, "y": 8}, unknown)) == {"x", "y"}
    assert conv1d_of(match_modules({"x": 8, "y": 2}, unknown, fan_in_fan_out=True)) == frozenset()


# --- tied heads ----------------------------------------------------------------------------------


@pytest.mark.parametrize("word", [True, None])
def test_a_tied_head_is_matched_with_the_embedding(word: bool | None) -> None:
    base = base_of(llama(), tie_word_embeddings=word)
    match = match_modules({"lm_head": 40, **Q}, base)
    assert match.tied == {"lm_head"}
    assert match.tensors["lm_head"] == "model.embed_tokens.weight"
    assert match.layers["lm_head"] == Linear(40, 8)
    assert list(match.tensors) == ["lm_head", *Q]


def test_a_head_that_is_not_tied_is_only_missing() -> None:
    layers = {**Q, "lm_head": 40}
    assert refused(layers, base_of(llama(), tie_word_embeddings=False))[0] == "V520"
    assert refused({**Q, "lm_head": 41}, base_of(llama()))[0] == "V520"
    assert refused({**layers, "model.layers.9.self_attn.q_proj": 8}, base_of(llama()))[0] == "V520"


def test_a_head_of_another_height_than_the_embedding_is_refused_with_both_heights() -> None:
    code, text = refused({**Q, "lm_head": 41}, base_of(llama()))
    assert code == "V520"
    assert '"model.embed_tokens.weight", which has 40 rows, and lambda_b has 41 values' in text
    assert "Pass the resized base" in text


def test_a_head_with_its_own_tensor_is_matched_like_other_layers() -> None:
    base = base_of(llama() | {"lm_head.weight": (40, 8)}, tie_word_embeddings=True)
    match = match_modules({**Q, "lm_head": 40}, base)
    assert match.tensors["lm_head"] == "lm_head.weight"
    assert match.tied == frozenset()


@pytest.mark.parametrize("stored", [{}, {"lm_head.weight": (40, 8)}])
def test_a_head_has_the_rows_of_the_weight_that_the_adapter_stores(
    stored: dict[str, Shape],
) -> None:
    base = base_of(llama() | stored, tie_word_embeddings=True)
    match = match_modules({**Q, "lm_head": 44}, base, copies={"lm_head": (44, 8)})
    assert match.layers["lm_head"] == Linear(44, 8)
    assert match.tensors["lm_head"] == next(iter(stored), "model.embed_tokens.weight")
    assert refused({**Q, "lm_head": 44}, base, copies={"lm_head": (44, 9)})[0] in ("V520", "V522")
    assert refused({**Q, "lm_head": 44}, base, copies={"lm_head": (43, 8)})[0] in ("V520", "V522")


def test_a_block_that_several_layers_share_is_named() -> None:
    """Zamba2 stores a shared block with the first layer that uses the block."""
    names = {number: f"layers.{number}.shared_transformer.q_proj" for number in (5, 11)}
    base = base_of(llama() | {f"{names[5]}.weight": (8, 8)})
    with pytest.raises(CheckpointError, match=r"V520 .*share one block, stored as .*layers\.5\."):
        match_modules({**Q, **dict.fromkeys(names.values(), 8)}, base)


# --- replacements --------------------------------------------------------------------------------


def test_replacements_follow_the_same_strategy() -> None:
    shapes = llama("bert.") | {"bert.layers.0.self_attn.q_proj.bias": (8,), "score.weight": (2, 8)}
    base = base_of(shapes)
    match = match_modules({"layers.0.self_attn.q_proj": 8}, base)
    names = {
        "base_model.model.layers.0.self_attn.q_proj.base_layer.bias": (
            "bert.layers.0.self_attn.q_proj.bias"
        ),
        "base_model.model.norm.weight": "bert.norm.weight",
        "base_model.model.score.weight": "score.weight",
        "base_model.model.classifier.weight": "classifier.weight",
    }
    saved: dict[str, tuple[int, ...]] = dict.fromkeys(names, (8,))
    assert match_replacements(saved, match, base) == {
        name: (Part(target, (8,)),) for name, target in names.items()
    }


def test_two_replacements_of_one_tensor_are_refused() -> None:
    base = base_of(llama() | {"lm_head.weight": (40, 8)})
    match = match_modules(Q, base)
    names = ["base_model.model.lm_head.weight", "base_model.model.lm_head.base_layer.weight"]
    with pytest.raises(CheckpointError, match=r"V525 lm_head\.weight"):
        match_replacements(dict.fromkeys(names, (40, 8)), match, base)


EXPERTS = {
    f"layers.0.mlp.experts.{number}.{layer}.weight": (8, 3) if layer == "down_proj" else (3, 8)
    for number in range(2)
    for layer in ("gate_proj", "up_proj", "down_proj")
}


def test_a_tensor_of_all_experts_replaces_the_layers_of_each_expert() -> None:
    base = base_of(llama() | EXPERTS)
    path = "base_model.model.layers.0.mlp.experts"
    shapes = {f"{path}.gate_up_proj": (2, 6, 8), f"{path}.down_proj": (2, 8, 3)}
    found = match_replacements(shapes, match_modules(Q, base), base)
    layers = "layers.0.mlp.experts"
    assert found[f"{path}.gate_up_proj"] == (
        Part(f"{layers}.0.gate_proj.weight", (3, 8), 0),
        Part(f"{layers}.0.up_proj.weight", (3, 8), 24),
        Part(f"{layers}.1.gate_proj.weight", (3, 8), 48),
        Part(f"{layers}.1.up_proj.weight", (3, 8), 72),
    )
    assert found[f"{path}.down_proj"][1] == Part(f"{layers}.1.down_proj.weight", (8, 3), 24)


def test_a_tensor_of_fewer_experts_than_the_base_has_replaces_none() -> None:
    base = base_of(llama() | EXPERTS)
    name = "base_model.model.layers.0.mlp.experts.down_proj"
    found = match_replacements({name: (1, 8, 3)}, match_modules(Q, base), base)
    assert found[name] == (Part("layers.0.mlp.experts.down_proj", (1, 8, 3)),)


# --- real adapters -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "base"),
    [
        ("llama_fp32_proj", "llama-fp32"),
        ("gpt2_fp32_proj", "gpt2-fp32"),
        ("bert_cls_fp32_proj", "bert-cls-fp32"),
    ],
)
@pytest.mark.parametrize("version", ["0.11.0", "0.21.2"])
def test_every_real_adapter_finds_its_layers(
    version: str, case: str, base: str, fixtures: Path
) -> None:
    model = read_base(Location(base, fixtures / "bases" / base), HubAccess(offline=True))
    ending = ".vera_lambda_b"
    with safe_open(fixtures / version / case / "adapter_model.safetensors", "numpy") as file:
        layers = {
            name.removeprefix("base_model.model.").removesuffix(ending): file.get_tensor(name).size
            for name in file.keys()  # noqa: SIM118 - it is no mapping
            if name.endswith(ending)
        }
        widest = file.get_slice("base_model.vera_A").get_shape()[1]
    match = match_modules(layers, model, widest=widest)
    assert match.strategy.name == "names as they are"
    assert conv1d_of(match) == (frozenset(layers) if base == "gpt2-fp32" else frozenset())
    assert max(layer.in_features for layer in match.layers.values()) == widest
