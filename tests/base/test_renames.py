"""The renames, compared with the installed transformers and with the names of older releases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from releases import needs
from safetensors.numpy import load_file
from smallmodels import EYE, MODELS, linear_layers, real_model

from vera_convert.base.match import Match, match_modules
from vera_convert.base.model import BaseModel, BaseTensor, read_base
from vera_convert.base.rename_table import Family, conversions, families
from vera_convert.base.renames import model_types, release_names
from vera_convert.base.replacements import match_replacements
from vera_convert.base.saved_places import Part
from vera_convert.errors import CheckpointError
from vera_convert.files.header import TensorInfo
from vera_convert.hub.lookup import HubAccess, Location

CLIP, SIGLIP = ({"model_type": f"{name}_vision_model"} for name in ("clip", "siglip"))


def base_of(paths: Iterable[str], **config: object) -> BaseModel:
    """Return a base with a square matrix for each path."""
    tensors = {
        f"{path}.weight": BaseTensor("m", TensorInfo(f"{path}.weight", "F32", (8, 8), 0, 0))
        for path in paths
    }
    return BaseModel(Location("base", None), config, {}, tensors)


def matched(modules: Iterable[str], base: BaseModel) -> Match:
    return match_modules(dict.fromkeys(modules, 8), base)


# --- the renames of each release -----------------------------------------------------------------

TEXT, TOWER = "layers.1.self_attn.q_proj", "encoder.layers.0.self_attn.v_proj"
OLD_LLAVA = (
    f"language_model.model.{TEXT}",
    f"vision_tower.vision_model.{TOWER}",
    "multi_modal_projector.linear_1",
    "language_model.lm_head",
)
LLAVA_4_57 = (
    f"model.language_model.{TEXT}",
    f"model.vision_tower.vision_model.{TOWER}",
    "model.multi_modal_projector.linear_1",
    "lm_head",
)
LLAVA_5 = (LLAVA_4_57[0], f"model.vision_tower.{TOWER}", *LLAVA_4_57[2:])
SAVED_BY_5 = (OLD_LLAVA[0], f"vision_tower.{TOWER}", *OLD_LLAVA[2:])
WITHOUT_HEAD = (f"language_model.{TEXT}", f"vision_tower.{TOWER}", "multi_modal_projector.linear_1")
LLAVA_FORMS = {
    "4.44": OLD_LLAVA,
    "4.57": LLAVA_4_57,
    "5.24": LLAVA_5,
    "saved by 5.24": SAVED_BY_5,
}
OLD_QWEN = (f"model.{TEXT}", "visual.blocks.0.attn.qkv", "lm_head")
QWEN = (f"model.language_model.{TEXT}", "model.visual.blocks.0.attn.qkv", "lm_head")
OLD_VIT = (
    "vit.encoder.layer.0.attention.attention.query",
    "vit.encoder.layer.0.attention.output.dense",
    "vit.encoder.layer.11.intermediate.dense",
    "vit.encoder.layer.11.output.dense",
    "classifier",
)
VIT = (
    "vit.layers.0.attention.q_proj",
    "vit.layers.0.attention.o_proj",
    "vit.layers.11.mlp.fc1",
    "vit.layers.11.mlp.fc2",
    "classifier",
)


@pytest.mark.parametrize("kind", ["llava", "gemma3", "paligemma"])
@pytest.mark.parametrize("vision", [CLIP, SIGLIP, {}], ids=["clip", "siglip", "unsaid"])
@pytest.mark.parametrize("trained", LLAVA_FORMS)
@pytest.mark.parametrize("stored", LLAVA_FORMS)
def test_each_layout_of_llava_is_found_in_each_other_layout(
    kind: str, vision: Mapping[str, str], trained: str, stored: str
) -> None:
    # R05: the files have one layout, and the adapter has another.
    adapter, files = LLAVA_FORMS[trained], LLAVA_FORMS[stored]
    base = base_of(files, model_type=kind, vision_config=vision)
    match = matched(adapter, base)
    assert match.tensors == {
        name: f"{path}.weight" for name, path in zip(adapter, files, strict=True)
    }
    assert (match.strategy.name == "names as they are") == (trained == stored)
    for name, path in zip(adapter, files, strict=True):
        assert match.strategy.rename(name) == path
        assert match.strategy.undo(path) == name


@pytest.mark.parametrize("stored", LLAVA_FORMS)
def test_an_adapter_of_the_class_without_a_head_is_found(stored: str) -> None:
    files = LLAVA_FORMS[stored]
    match = matched(WITHOUT_HEAD, base_of(files, model_type="llava", vision_config=CLIP))
    assert [*match.tensors.values()] == [f"{path}.weight" for path in files[:3]]
    assert match.strategy.undo(files[0]) == WITHOUT_HEAD[0]
    assert match.strategy.undo(files[3]) is None  # the adapter's model has no head


@pytest.mark.parametrize(("trained", "stored"), [(OLD_LLAVA, LLAVA_5), (LLAVA_5, OLD_LLAVA)])
def test_an_adapter_with_names_of_two_releases_is_refused(
    trained: tuple[str, ...], stored: tuple[str, ...]
) -> None:
    # R06: only half of the keys are renamed.
    base = base_of(
        [*stored, stored[0].replace("q_proj", "k_proj")], model_type="llava", vision_config=CLIP
    )
    mixed = [trained[0], stored[0].replace("q_proj", "k_proj")]
    with pytest.raises(CheckpointError) as error:
        matched(mixed, base)
    assert error.value.findings[0].code == "V520"
    assert "1 of 2 layers" in str(error.value)


def test_a_base_with_both_names_of_a_layer_is_refused() -> None:
    base = base_of([*OLD_LLAVA, LLAVA_5[1], LLAVA_5[0]], model_type="llava", vision_config=CLIP)
    with pytest.raises(CheckpointError, match="V520"):
        matched(LLAVA_4_57, base)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize(("trained", "stored"), [(QWEN, OLD_QWEN), (OLD_QWEN, QWEN)])
def test_each_layout_of_qwen_vl_is_found(
    kind: str, trained: tuple[str, ...], stored: tuple[str, ...]
) -> None:
    match = matched(trained, base_of(stored, model_type=kind))
    assert [*match.tensors.values()] == [f"{path}.weight" for path in stored]
    assert "Qwen2-VL" in match.strategy.name


@pytest.mark.parametrize("kind", ["vit", "deit", "vit_msn", "ijepa", "vivit"])
@pytest.mark.parametrize(("trained", "stored"), [(VIT, OLD_VIT), (OLD_VIT, VIT)])
def test_each_layout_of_vit_is_found(
    kind: str, trained: tuple[str, ...], stored: tuple[str, ...]
) -> None:
    match = matched(trained, base_of(stored, model_type=kind))
    assert [*match.tensors.values()] == [f"{path}.weight" for path in stored]
    assert "ViT" in match.strategy.name


@pytest.mark.parametrize(
    ("kind", "files", "memory"),
    [
        ("gpt_neox", "embed_out", "lm_head"),
        ("nemotron_h", "backbone.layers.0.mixer.in_proj", "model.layers.0.mixer.in_proj"),
        (
            "qwen2_audio",  # transformers 5.10 to 5.23 wrote these files
            "model.language_model.model.layers.0.mlp.up_proj",
            "model.language_model.layers.0.mlp.up_proj",
        ),
        (
            "qwen2_audio",
            "language_model.model.layers.0.mlp.up_proj",
            "model.language_model.layers.0.mlp.up_proj",
        ),
        ("gemma3", "language_model.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("dinov2", "encoder.layer.3.mlp.weights_out", "encoder.layer.3.mlp.down_proj"),
        (
            "dinov2",
            "dinov2.encoder.layer.3.attention.attention.key",
            "encoder.layer.3.attention.k_proj",
        ),
        ("exaone", "transformer.h.0.attn.attention.out_proj", "model.layers.0.self_attn.o_proj"),
        ("segformer", "encoder.block.1.0.mlp.dense1", "stages.1.blocks.0.mlp.fc1"),
        ("colqwen2", "vlm.model.visual.blocks.0.mlp.fc1", "vlm.visual.blocks.0.mlp.fc1"),
        (
            "video_llava",
            "video_tower.vision_model.encoder.layers.0.mlp.fc1",
            "model.video_tower.encoder.layers.0.mlp.fc1",
        ),
        ("vit_mae", "decoder.decoder_layers.0.output.dense", "decoder.decoder_layers.0.mlp.fc2"),
    ],
)
def test_a_layer_of_another_family_is_found(kind: str, files: str, memory: str) -> None:
    match = matched([memory], base_of([files], model_type=kind))
    assert match.tensors == {memory: f"{files}.weight"}


def test_renames_hold_only_for_their_model_types() -> None:
    assert [*release_names(base_of(OLD_VIT, model_type="bert"))] == []
    assert [*release_names(base_of(OLD_LLAVA))] == []
    with pytest.raises(CheckpointError, match="V520"):
        matched(VIT, base_of(OLD_VIT, model_type="bert"))
    composite = base_of(
        [f"encoder.{path.removeprefix('vit.')}" for path in OLD_VIT],
        model_type="vision-encoder-decoder",
        encoder={"model_type": "vit"},
    )
    module = "encoder.layers.0.attention.q_proj"
    assert matched([module], composite).strategy.rename(module) == (
        "encoder.encoder.layer.0.attention.attention.query"
    )


def test_a_head_that_the_base_lacks_is_named_like_its_files() -> None:
    paths = (f"language_model.model.{TEXT}", "language_model.model.embed_tokens")
    match = match_modules(
        {f"model.language_model.{TEXT}": 8, "lm_head": 8},
        base_of(paths, model_type="llava", tie_word_embeddings=True),
    )
    assert match.tied == {"lm_head"}
    assert match.strategy.rename("lm_head") == "language_model.lm_head"


def test_replaced_modules_follow_their_renaming_where_the_layers_need_none() -> None:
    layer = "model.layers.0.self_attn.q_proj"
    base = base_of([layer, "model.layers.0.block_sparse_moe.gate"], model_type="mixtral")
    name = "base_model.model.model.layers.0.mlp.gate.weight"
    assert match_replacements({name: (8, 8)}, matched([layer], base), base) == {
        name: (Part("model.layers.0.block_sparse_moe.gate.weight", (8, 8)),)
    }


def test_a_config_with_every_type_is_not_slower_than_one_type() -> None:
    every = sorted(set().union(*(family.types for family in families())))
    renames = (rename for family in families() for rename in family.renames)
    paths = {files.removeprefix("^").replace("#", "0") for files, _ in renames}
    base = base_of(paths, parts={kind: {"model_type": kind} for kind in every})
    assert len(model_types(base.config)) < len(every)
    assert len([*release_names(base)]) <= 4


# --- layouts that are refused by name ------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind", "files", "memory"),
    [
        ("V542", "dinov2", "encoder.layer.0.mlp.weights_in", "encoder.layer.0.mlp.gate_proj"),
        ("V542", "nomic_bert", "encoder.layers.0.attn.Wqkv", "layers.0.self_attn.k_proj"),
        (
            "V542",
            "molmo2",
            "model.transformer.blocks.3.self_attn.att_proj",
            "model.language_model.layers.3.self_attn.v_proj",
        ),
        (
            "V543",
            "kimi_k25",
            "vision_tower.encoder.blocks.0.wqkv",
            "model.vision_tower.layers.0.attn.q_proj",
        ),
        (
            "V543",
            "mistral_large4",
            "vision_encoder.transformer.layers.0.attention.wq",
            "model.vision_tower.transformer.layers.0.attention.q_proj",
        ),
        (
            "V545",
            "minimax_m3_vl",
            "language_model.model.layers.0.block_sparse_moe.shared_experts.gate_proj",
            "model.language_model.layers.0.mlp.shared_experts.gate_up_proj",
        ),
    ],
)
def test_a_layer_without_a_tensor_of_its_own_is_refused_by_name(
    code: str, kind: str, files: str, memory: str
) -> None:
    base = base_of([files, files.replace("gate_proj", "up_proj")], model_type=kind)
    try:
        findings = matched([memory], base).refusals
    # without another tensor of the block, the rename is not proven
    except CheckpointError as error:
        findings = [*error.findings]
    finding = findings[0]
    assert finding.code == code
    assert files in str(finding)
    assert memory in str(finding)
    # The same numbers in another place, or another model type, prove nothing about this layer.
    other = base_of([files.replace("0", "1").replace("3", "1")], model_type=kind)
    with pytest.raises(CheckpointError, match="V520"):
        matched([memory], other)


@pytest.mark.parametrize(
    "stack",
    [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.block_sparse_moe.input_linear.weight",
    ],
)
def test_an_expert_of_a_stack_is_refused_by_name(stack: str) -> None:
    base = base_of(["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.experts.3.w1"])
    tensor = BaseTensor("m", TensorInfo(stack, "F32", (4, 8, 8), 0, 0))
    base = BaseModel(base.location, {"model_type": "x"}, {}, {**base.tensors, stack: tensor})
    layers = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.3.gate_proj"]
    with pytest.raises(CheckpointError, match=f'V544.*experts.3.gate_proj" is .*"{stack}"'):
        matched(layers, base)


@pytest.mark.parametrize(
    ("stack", "shape", "layer", "size"),
    [
        ("experts.gate_up_proj", (4, 48, 32), "gate_proj", (24, 32)),
        ("experts.gate_up_proj", (4, 32, 48), "up_proj", (24, 32)),
        ("experts.gate_up_proj", (4, 48, 48), "w3", (24, 48)),
        ("experts.down_proj", (4, 32, 24), "w2", (32, 24)),
        ("experts.down_proj", (4, 24, 32), "down_proj", (32, 24)),
        ("experts.up_proj.weight", (4, 24, 32), "up_proj", (24, 32)),
        ("input_linear.weight", (4, 48, 32), "gate_proj", (24, 32)),
        ("output_linear.weight", (4, 32, 24), "down_proj", (32, 24)),
    ],
)
def test_a_stack_shows_the_size_of_an_expert_s_layer(
    stack: str, shape: tuple[int, ...], layer: str, size: tuple[int, int]
) -> None:
    name, module = f"layers.1.mlp.{stack}", f"layers.1.mlp.experts.3.{layer}"
    tensors = {name: BaseTensor("m", TensorInfo(name, "F32", shape, 0, 0))}
    base = BaseModel(base_of([]).location, {}, {}, tensors)
    match = match_modules({module: size[0]}, base)
    assert match.tensors == {module: name}
    assert match.layers[module][:2] == size
    (finding,) = match.refusals
    assert finding.code == "V544"


@pytest.mark.parametrize(
    ("module", "outputs"),
    [
        ("layers.1.mlp.experts.3.up_proj", 25),  # no axis of this size
        ("layers.1.mlp.experts.4.up_proj", 24),  # the stack has four experts
        ("layers.1.mlp.experts.3.down_proj", 24),  # another kind of layer
        ("other.layers.1.mlp.experts.3.up_proj", 24),  # another part of the model
    ],
)
def test_a_stack_that_does_not_fit_a_layer_proves_no_size(module: str, outputs: int) -> None:
    name = "layers.1.mlp.experts.gate_up_proj"
    tensors = {name: BaseTensor("m", TensorInfo(name, "F32", (4, 48, 32), 0, 0))}
    with pytest.raises(CheckpointError, match="V544"):
        match_modules({module: outputs}, BaseModel(base_of([]).location, {}, {}, tensors))


def test_experts_that_are_stored_separately_fit_unchanged() -> None:
    experts = [f"model.layers.0.block_sparse_moe.experts.{n}.w{m}" for n in (0, 1) for m in (1, 2)]
    match = matched(experts, base_of(experts, model_type="mixtral"))
    assert match.strategy.name == "names as they are"


# --- real models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_layer_of_a_real_model_is_found_in_its_files(
    name: str, tmp_path: Path
) -> None:
    model = real_model(name)
    model.save_pretrained(tmp_path)
    base = read_base(Location("base", tmp_path), HubAccess())
    stored = load_file(tmp_path / "model.safetensors")
    layers = {
        module: layer
        for module, layer in linear_layers(model).items()
        if not (module == "lm_head" and base.tie_word_embeddings)
    }
    match = match_modules({module: layer.out_features for module, layer in layers.items()}, base)
    for module, layer in layers.items():
        values = layer.weight.detach().numpy()
        np.testing.assert_array_equal(stored[match.tensors[module]], values, err_msg=module)
        assert match.strategy.undo(match.tensors[module].removesuffix(".weight")) == module


@needs("transformers", "5.0", "earlier releases keep the two layers in one, as the file does")
def test_the_rows_of_a_swiglu_of_dinov2_are_known(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(**EYE, use_swiglu_ffn=True)
    model = transformers.Dinov2Model(config)
    model.save_pretrained(tmp_path)
    layers = {module: layer.out_features for module, layer in linear_layers(model).items()}
    base = read_base(Location("base", tmp_path), HubAccess())
    match = match_modules(layers, base)
    assert match.refusals == []
    first = {module: part.first for module, part in match.parts.items()}
    own = {name: match.tensors[name] for name in first}
    stored = load_file(tmp_path / "model.safetensors")
    for module, layer in linear_layers(model).items():
        if module in first:
            rows = stored[own[module]][first[module] :][: layer.out_features]
            np.testing.assert_array_equal(rows, layer.weight.detach().numpy(), err_msg=module)
    rest = {
        module: width
        for module, width in layers.items()
        if not module.endswith(("gate_proj", "up_proj"))
    }
    assert any(module.endswith("mlp.down_proj") for module in rest)
    assert match_modules(rest, base).strategy.name == "names of DINOv2 since transformers 5"


# --- old names to new names and back -------------------------------------------------------------


def renamed(base: BaseModel, names: Iterable[str], wanted: Iterable[str]) -> bool:
    """Say whether a table of renames turns these names in the files into the wanted names, and
    back.
    """
    pairs = [*zip(names, wanted, strict=True)]
    return any(
        all(names.undo(old) == new and names.rename(new) == old for old, new in pairs)
        for names in release_names(base)
    )


def _first_names(family: Family) -> Iterator[str]:
    """Yield the paths that a family renames, except paths that another rename produces."""
    for files, own in family.renames:
        path = files.removeprefix("^")
        others = (memory.removeprefix("^") for _, memory in family.renames if memory != own)
        if not any(f".{part}." in f".{path}." for part in others):
            yield path


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_old_names_of_a_family_become_new_names_and_old_names_again(family: Family) -> None:
    for kind in family.types:
        old = [f"{path}.x".replace("#", "1") for path in _first_names(family)]
        base = base_of(old, model_type=kind)
        newest = [view for view in release_names(base) if "before" not in view.name]
        assert newest, kind
        new = [newest[0].undo(path) or "" for path in old]
        changed = [
            (before, after) for before, after in zip(old, new, strict=True) if before != after
        ]
        assert changed, kind
        assert renamed(base, old, new), kind
        if family.optional:  # names without this part do not show where the part was
            continue
        assert renamed(base_of(new, model_type=kind), new, old), kind


TABLES = [(kind, table) for kind, tables in conversions().items() for table in tables]


@pytest.mark.parametrize(("kind", "table"), TABLES, ids=[kind for kind, _ in TABLES])
def test_old_names_of_a_whole_model_become_new_names_and_old_names_again(
    kind: str, table: Mapping[str, str]
) -> None:
    old = [files.replace("#", "1") for files in table]
    new = [memory.replace("#", "1") for memory in table.values()]
    assert len({*old}) == len({*new}) == len(table)
    assert renamed(base_of(old, model_type=kind), old, new)
    assert renamed(base_of(new, model_type=kind), new, old)


def test_deepseek_v4_is_found_in_its_own_files() -> None:
    files = ["layers.0.attn.wq_a", "layers.0.attn.wo_b", "layers.3.ffn.shared_experts.w2", "head"]
    base = base_of(files, model_type="deepseek_v4")
    layers = (
        *("model.layers.0.self_attn.q_a_proj", "model.layers.0.self_attn.o_b_proj"),
        *("model.layers.3.mlp.shared_experts.down_proj", "lm_head"),
    )
    match = matched(layers, base)
    assert [*match.tensors.values()] == [f"{path}.weight" for path in files]
    assert match.strategy.name == 'names of deepseek_v4 since transformers 5, prefix "model." added'


def test_a_layer_whose_weight_is_renamed_without_its_module_is_found() -> None:
    base = base_of(["layers.0.self_attn.q_proj"], model_type="jev")
    name = "weight"
    tensor = BaseTensor("m", TensorInfo(name, "F32", (8, 8), 0, 0))
    base = BaseModel(base.location, base.config, {}, {**base.tensors, name: tensor})
    match = matched(["model.layers.0.self_attn.q_proj", "proj"], base)
    assert match.tensors["proj"] == name


def test_a_number_is_a_name_only_where_a_table_says_so() -> None:
    files = ["flow_lm.flow_net.res_blocks.0.mlp.2", "flow_lm.flow_net.res_blocks.2.mlp.0"]
    layers = ["flow_head.layers.0.fc2", "flow_head.layers.2.fc1"]
    match = matched(layers, base_of(files, model_type="gradium_phonon_tts"))
    assert [*match.tensors.values()] == [f"{path}.weight" for path in files]
    assert match.strategy.undo("flow_lm.flow_net.res_blocks.0.mlp.1") is None
    with pytest.raises(CheckpointError, match="V520"):
        matched(
            [*layers, "flow_head.layers.1.fc1"], base_of(files, model_type="gradium_phonon_tts")
        )


def test_the_published_names_of_kimi_are_found() -> None:
    files = {
        "model.language_model.layers.0.self_attn.q_a_proj": (
            "language_model.model.layers.0.self_attn.q_a_proj"
        ),
        "model.vision_tower.layers.0.mlp.fc1": "vision_tower.encoder.blocks.0.mlp.fc0",
        "model.mm_projector.in_proj": "mm_projector.proj.0",
    }
    saved = {
        "model.vision_tower.patch_embed.proj": "vision_tower.patch_embed.proj",
        "model.mm_projector.pre_norm": "mm_projector.pre_norm",
    }
    base = base_of([*files.values(), *saved.values()], model_type="kimi_k25")
    match = matched(files, base)
    assert match.tensors == {module: f"{path}.weight" for module, path in files.items()}
    keys = {f"base_model.model.{module}.weight": path for module, path in saved.items()}
    found = match_replacements(dict.fromkeys(keys, (8, 8)), match, base)
    assert found == {key: (Part(f"{path}.weight", (8, 8)),) for key, path in keys.items()}


# --- the installed registry ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def renamed_by_registry() -> Callable[[Any, str], str]:
    """Return the name in memory that the installed transformers gives a layer of the files."""
    loading = pytest.importorskip("transformers.core_model_loading")
    registry = pytest.importorskip("transformers.conversion_mapping")

    def rename(model: Any, path: str) -> str:
        steps = registry.get_model_conversion_mapping(model)
        plain = [step for step in steps if isinstance(step, loading.WeightRenaming)]
        named, _ = loading.rename_source_key(f"{path}.weight", plain, [])
        return str(named).removesuffix(".weight")

    return rename


@pytest.mark.parametrize("name", MODELS)
def test_the_registry_takes_former_names_to_the_same_layers(
    name: str, renamed_by_registry: Callable[[Any, str], str]
) -> None:
    model = real_model(name)
    layers = linear_layers(model)
    base = base_of(layers, **model.config.to_dict())
    for view in release_names(base):
        if "since" in view.name:  # no release wrote a file with names of several releases
            continue
        for module in layers:
            assert renamed_by_registry(model, view.undo(module) or "") == module
