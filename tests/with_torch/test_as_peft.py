"""Call the model as users of PEFT call PEFT's model, and compare the results of both."""

# mypy: allow-subclassing-any
from __future__ import annotations

import copy
import inspect
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import theirwarnings
import torch
import torchmodels
import transformers
from peft.tuners.tuners_utils import BaseTuner
from peftmodels import config_of, saved, weights, wrapped_twice
from torch import nn

from vera_convert import CheckpointError, Rounding, SurroundingsError, UsageError, Variant
from vera_convert.with_torch import VeraConfig, VeraLinear, VeraModel
from vera_convert.with_torch.peft_names import DECLINED

pytestmark = [theirwarnings.OF_PEFT, theirwarnings.OF_TORCH]

FIELDS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_weights": False}
OURS = VeraConfig(r=4, target_modules=("q_proj", "v_proj"), init_weights=False)


def llama(**fields: Any) -> VeraModel:
    return VeraModel(torchmodels.built("llama"), replace(OURS, **fields))


def output_of(model: Any) -> Any:
    return torchmodels.logits(model, "llama")


def trained_names(model: Any) -> set[str]:
    return {
        name.removeprefix("base_model.") for name, p in model.named_parameters() if p.requires_grad
    }


# --- methods and arguments -----------------------------------------------------------------------


def public(kind: type, *without: type) -> set[str]:
    known = {name for each in without for name in dir(each)}
    return {name for name in dir(kind) if not name.startswith("_")} - known


THEIRS = public(peft.PeftModel, nn.Module) | {
    *("merge_adapter", "unmerge_adapter", "merge_and_unload", "unload"),
    *("disable_adapter_layers", "enable_adapter_layers", "inject_adapter"),
}
OF_THE_BASE = {"generate", "base_model_torch_dtype"}
"""Names that PEFT's class defines, and that VeraModel takes from the wrapped model."""


def test_every_method_of_peft_s_model_exists_or_is_declined_with_a_reason() -> None:
    assert "delete_adapter" in THEIRS
    assert all(hasattr(peft.PeftModel, name) or hasattr(BaseTuner, name) for name in THEIRS)
    missing = {name for name in THEIRS - OF_THE_BASE if not hasattr(VeraModel, name)}
    assert missing <= DECLINED.keys()
    for name in DECLINED:
        with pytest.raises(AttributeError, match=f"VeraModel has no {name}: .{{10,}}"):
            getattr(llama(), name)


def test_push_to_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(transformers.PreTrainedModel, "push_to_hub", never)
    with pytest.raises(UsageError, match="hf upload"):
        llama().push_to_hub("someone/adapter", private=True)


def test_arguments_can_be_given_by_pefts_names_and_in_pefts_order(tmp_path: Path) -> None:
    model = llama()
    model.add_adapter("two", peft.VeraConfig(**FIELDS, projection_prng_key=0))
    call: Any = model
    call.add_adapter(peft_config=OURS, adapter_name="three")
    model.set_adapter(["two", "three"], inference_mode=True)
    assert model.active_adapters == ["two", "three"]
    assert model.active_adapter == "two"
    assert trained_names(model) == set()
    call.save_pretrained(save_directory=tmp_path / "out")
    base = torchmodels.built("llama")
    loaded = VeraModel.from_pretrained(base, tmp_path / "out", adapter_name="a", is_trainable=True)
    loaded.load_adapter(tmp_path / "out" / "two", "b")
    assert set(loaded.peft_config) == {"a", "b"}
    assert loaded.get_base_model() is base is loaded.base_model.model
    assert len(trained_names(loaded)) == 8


def test_a_config_object_of_peft_is_accepted(tmp_path: Path) -> None:
    fields = {**FIELDS, "task_type": "CAUSAL_LM", "modules_to_save": ["lm_head"]}
    theirs = peft.get_peft_model(torchmodels.built("llama"), peft.VeraConfig(**fields))
    ours = VeraModel(torchmodels.built("llama"), peft.VeraConfig(**fields))
    one, other = saved(theirs, ours, tmp_path)
    assert config_of(one) == config_of(other)
    assert ours.modules_to_save == theirs.modules_to_save == {"lm_head"}
    for wrong in (peft.LoraConfig(), {"r": 4}, None):
        with pytest.raises(UsageError, match="a VeraConfig is expected"):
            ours.add_adapter(wrong, adapter="b")  # type: ignore[arg-type]


def test_parameters_are_counted_and_printed_as_by_peft(capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = wrapped_twice("llama")
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    theirs.print_trainable_parameters()
    expected = capsys.readouterr().out
    ours.print_trainable_parameters()
    assert capsys.readouterr().out == expected


def test_a_choice_can_be_given_as_a_string(tmp_path: Path) -> None:
    model: Any = VeraModel
    base = torchmodels.built("llama")
    separate = model(base, replace(OURS, save_projection=False), variant="float32-separate")
    separate.save_pretrained(tmp_path / "out")
    for options in (
        {"variant": "float32-separate", "rounding": "bf16"},
        {"variant": Variant.FLOAT32_SEPARATE, "rounding": Rounding.BF16, "projections": "auto"},
    ):
        loaded = model.from_pretrained(torchmodels.built("llama"), tmp_path / "out", **options)
        assert torch.equal(loaded.vera_A.default, separate.vera_A.default.bfloat16().float())
    for wrong in ({"variant": "x"}, {"rounding": "x"}, {"projections": "x"}):
        with pytest.raises(UsageError, match=f"{next(iter(wrong))} is .*x.*: give one of"):
            model.from_pretrained(torchmodels.built("llama"), tmp_path / "out", **wrong)
    tied: Any = VeraModel(torchmodels.built("gpt2"), replace(OURS, target_modules=("lm_head",)))
    with pytest.raises(UsageError, match=r"tied is .*x"):
        tied.merge(tied="x")
    tied.merge(tied="add")
    changed = tied.unload()
    assert changed.lm_head.weight is changed.transformer.wte.weight


# --- several adapters ----------------------------------------------------------------------------


def two(**fields: Any) -> tuple[Any, VeraModel]:
    """Wrap a model with PEFT and with this package, each time with the same two adapters."""
    theirs, ours = wrapped_twice("llama", **fields)
    given = {**FIELDS, "target_modules": ["q_proj", "down_proj", "v_proj"]}
    theirs.add_adapter("two", peft.VeraConfig(**given))
    ours.add_adapter(VeraConfig(**given), adapter="two")
    ours.load_state_dict(theirs.base_model.state_dict(), strict=False)
    return theirs, ours


@pytest.mark.parametrize("deleted", ["default", "two"])
@pytest.mark.parametrize("active", ["default", "two"])
@pytest.mark.filterwarnings("ignore:Adapter .* was active:UserWarning", "ignore:the active adapter")
def test_a_deleted_adapter_is_gone_as_in_peft(deleted: str, active: str) -> None:
    models = two()
    for model in models:
        model.set_adapter(active)
        model.delete_adapter(deleted)
    theirs, ours = models
    assert ours.active_adapters == theirs.active_adapters
    assert trained_names(ours) == trained_names(theirs)
    assert torch.equal(output_of(ours), output_of(theirs))
    copies = {name for name in theirs.base_model.state_dict() if ".vera_A." in name[1:]}
    names = set(theirs.base_model.state_dict()) - copies
    assert set(ours.state_dict()) == {name for name in names if ".vera_B." not in name[1:]}
    with pytest.raises(UsageError, match=f"no adapter {deleted}"):
        ours.delete_adapter(deleted)
    ours.add_adapter(OURS, adapter=deleted)
    ours.set_adapter(deleted)


def test_deleting_the_active_adapter_warns_which_adapter_is_active_now() -> None:
    model = llama()
    model.add_adapter(OURS, adapter="two")
    with pytest.warns(UserWarning, match="default is deleted: two is active now"):
        model.delete_adapter("default")


def test_a_model_without_adapters_computes_like_its_base() -> None:
    model = llama(modules_to_save=("lm_head",))
    model.model.lm_head.modules_to_save["default"].weight.data += 1
    model.delete_adapter("default")
    assert torch.equal(output_of(model), output_of(torchmodels.built("llama")))
    assert model.active_adapters == []
    assert model.trainable_parameters() == []
    with pytest.raises(UsageError, match="no adapter to save"):
        model.save_pretrained("nowhere")
    with pytest.raises(UsageError, match="no adapter is active"):
        _ = model.active_adapter
    model.add_adapter(OURS)
    model.set_adapter("default")
    assert not torch.equal(output_of(model), output_of(torchmodels.built("llama")))
    assert len(model.trainable_parameters()) == 8


def test_a_merged_adapter_cannot_be_deleted_or_loaded_again(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "out")
    model.merge()
    for act in (model.delete_adapter, lambda name: model.load_adapter(tmp_path / "out", name)):
        with pytest.raises(UsageError, match="unmerge"):
            act("default")


def test_other_adapters_can_be_added_and_deleted_beside_a_merged_adapter() -> None:
    theirs, ours = two()
    for model in (theirs, ours):
        model.merge_adapter(["default"])
        model.delete_adapter("two")
    ours.add_adapter(OURS, "three")  # PEFT would unmerge the other adapter
    assert torch.equal(output_of(ours), output_of(theirs))
    assert ours.active_adapters == theirs.active_adapters == ["default"]
    with pytest.raises(UsageError, match="before other adapters are made active"):
        ours.set_adapter("three")


def test_only_selected_adapters_are_saved(tmp_path: Path) -> None:
    theirs, ours = two()
    theirs.save_pretrained(tmp_path / "theirs", selected_adapters=["two"])
    ours.save_pretrained(tmp_path / "ours", selected_adapters=["two"])
    files = {path.relative_to(tmp_path / "ours") for path in (tmp_path / "ours").rglob("*.*")}
    assert files == {
        Path("two/adapter_config.json"),
        Path("two/adapter_model.safetensors"),
    }
    assert weights(tmp_path / "ours/two") == weights(tmp_path / "theirs/two")
    ours.save_pretrained(tmp_path / "by-name", selected_adapters="two")
    assert weights(tmp_path / "by-name/two") == weights(tmp_path / "ours/two")
    for wrong, message in ((["three"], "no adapter three"), ([], "none is selected")):
        with pytest.raises(UsageError, match=message):
            ours.save_pretrained(tmp_path / "new", selected_adapters=wrong)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("chosen", [None, ["two"], ["two", "default"]])
def test_named_adapters_are_merged_as_by_peft(chosen: list[str] | None) -> None:
    theirs, ours = two()
    expected = theirs.merge_and_unload(adapter_names=chosen).state_dict()
    merged = ours.merge_and_unload(adapter_names=chosen).state_dict()
    assert list(merged) == list(expected)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_merge_and_unmerge_have_peft_s_names() -> None:
    theirs, ours = two()
    for names in (["two"], ["default"]):
        for model in (theirs, ours):
            model.merge_adapter(names)
        assert torch.equal(output_of(ours), output_of(theirs))
    for model in (theirs, ours):
        model.unmerge_adapter()
    assert torch.equal(output_of(ours), output_of(theirs))
    ours.merge_adapter("two")
    assert ours.model.model.layers[0].self_attn.q_proj.merged == ("two",)


def test_adapters_can_be_switched_off_and_on() -> None:
    theirs, ours = wrapped_twice("llama")
    base = output_of(torchmodels.built("llama"))
    for model in (theirs, ours):
        adapted = output_of(model)
        with model.disable_adapter():
            assert torch.equal(output_of(model), base)
        tuner = model.base_model
        tuner.disable_adapter_layers()
        assert torch.equal(output_of(model), base)
        tuner.enable_adapter_layers()
        assert torch.equal(output_of(model), adapted)


def nested(model: Any) -> Any:
    with model.disable_adapter():
        with model.disable_adapter():
            pass
        return output_of(model)


def switched_off_and_set(model: Any) -> Any:
    model.base_model.disable_adapter_layers()
    model.set_adapter("two")
    return output_of(model)


def switched_on_again(model: Any) -> Any:
    switched_off_and_set(model)
    model.base_model.enable_adapter_layers()
    return output_of(model)


@pytest.mark.parametrize("act", [nested, switched_off_and_set, switched_on_again])
def test_disabled_adapters_stay_disabled_until_enabled(act: Callable[[Any], Any]) -> None:
    theirs, ours = two(modules_to_save=["lm_head"])
    ours.model.lm_head.modules_to_save["default"].weight.data += 1
    theirs.base_model.model.lm_head.modules_to_save["default"].weight.data += 1
    assert torch.equal(act(ours), act(theirs))


def test_a_merge_with_disabled_adapters_is_refused() -> None:
    model = llama()
    with model.disable_adapter():
        assert not model.has_active_enabled_adapter
        for merge in (model.merge, model.merge_and_unload):
            with pytest.raises(UsageError, match="switched off"):
                merge()
    assert model.has_active_enabled_adapter


# --- trained parameters --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [VeraConfig, peft.VeraConfig])
def test_a_config_for_inference_freezes_its_adapter(kind: Any) -> None:
    fields = {**FIELDS, "inference_mode": True, "modules_to_save": ["lm_head"]}
    theirs = peft.get_peft_model(torchmodels.built("llama"), peft.VeraConfig(**fields))
    ours = VeraModel(torchmodels.built("llama"), kind(**fields))
    assert trained_names(ours) == trained_names(theirs) == set()
    assert ours.configs["default"].inference_mode


def test_a_cast_of_the_whole_model_casts_the_adapter_as_in_peft() -> None:
    for dtype in ("float16", "bfloat16", "float64"):
        theirs, ours = wrapped_twice("llama")
        for model in (theirs, ours):
            model.to(getattr(torch, dtype))
        assert torch.equal(output_of(ours), output_of(theirs))
        assert {p.dtype for p in ours.parameters()} == {getattr(torch, dtype)}


def test_set_adapter_keeps_unfrozen_base_weights_unfrozen() -> None:
    models = two()
    for model in models:
        model.base_model.model.lm_head.weight.requires_grad_(requires_grad=True)
        model.set_adapter("two")
        model.set_requires_grad("default", requires_grad=True)
    theirs, ours = models
    assert trained_names(ours) == trained_names(theirs)
    assert "model.lm_head.weight" in trained_names(ours)
    ours.add_adapter(OURS, adapter="three")
    ours.set_adapter("three", trainable=False)
    assert trained_names(ours) == {"model.lm_head.weight"}


@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_random_state_after_wrapping_and_loading_equals_peft_s(
    kind: str, init_weights: Any, tmp_path: Path
) -> None:
    fields = {"r": 4, **torchmodels.KINDS[kind].config, "init_weights": init_weights}
    bases = [torchmodels.built(kind) for _ in range(4)]

    def after(act: Callable[[], Any]) -> Any:
        torch.manual_seed(5)
        made = act()
        return made, torch.rand(3)

    theirs, expected = after(lambda: peft.get_peft_model(bases[0], peft.VeraConfig(**fields)))
    ours, found = after(lambda: VeraModel(bases[1], VeraConfig(**fields)))
    assert torch.equal(found, expected)
    one, other = saved(theirs, ours, tmp_path)
    _, expected = after(lambda: peft.PeftModel.from_pretrained(bases[2], one))
    _, found = after(lambda: VeraModel.from_pretrained(bases[3], other))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_loaded_model_is_in_the_mode_that_peft_leaves_it_in(
    trainable: Any, training: Any, tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path / "out")
    bases = [torchmodels.built("llama").train(training) for _ in range(2)]
    theirs = peft.PeftModel.from_pretrained(bases[0], tmp_path / "out", is_trainable=trainable)
    ours = VeraModel.from_pretrained(bases[1], tmp_path / "out", trainable=trainable)
    assert {name: part.training for name, part in bases[1].named_modules()}[""] is bases[0].training
    assert ours.model.training is theirs.base_model.model.training
    assert all(part.training is ours.model.training for part in ours.model.modules())
    assert trained_names(ours) == trained_names(theirs)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit"])
def test_an_adapter_can_be_kept_in_the_dtype_of_its_layers(kind: str, tmp_path: Path) -> None:
    fields = {"r": 4, "init_weights": False, **torchmodels.KINDS[kind].config}
    torch.manual_seed(2)
    theirs = peft.get_peft_model(
        torchmodels.built(kind, "bfloat16"), peft.VeraConfig(**fields), autocast_adapter_dtype=False
    ).eval()
    torch.manual_seed(2)
    base = torchmodels.built(kind, "bfloat16")
    ours = VeraModel(base, VeraConfig(**fields), autocast_adapter_dtype=False)
    expected = torchmodels.logits(theirs, kind, "bfloat16")
    assert torch.equal(torchmodels.logits(ours, kind, "bfloat16"), expected)
    assert {p.dtype for p in ours.trainable_parameters()} == {torch.bfloat16}
    assert ours.vera_A.default.dtype == torch.bfloat16
    one, other = saved(theirs, ours, tmp_path)
    assert weights(one) == weights(other)
    base = torchmodels.built(kind, "bfloat16")
    loaded = VeraModel.from_pretrained(base, one, autocast_adapter_dtype=False)
    assert torch.equal(torchmodels.logits(loaded, kind, "bfloat16"), expected)


def test_gradients_reach_checkpointed_layers_if_checkpointing_was_on_before() -> None:
    gradients = []
    for wrap in (
        lambda base: peft.get_peft_model(base, peft.VeraConfig(**FIELDS)),
        lambda base: VeraModel(base, OURS),
    ):
        base = torchmodels.built("llama")
        # transformers 5.24 renamed the method
        newer = getattr(base, "activation_checkpointing_enable", None)
        (newer or base.gradient_checkpointing_enable)({"use_reentrant": True})
        torch.manual_seed(0)
        model = wrap(base).train()
        model(**torchmodels.inputs_of("llama")).logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[1]) == 8
    torch.testing.assert_close(gradients[1], gradients[0])


# --- configs -------------------------------------------------------------------------------------


def test_names_can_be_a_set(tmp_path: Path) -> None:
    given: Any = {"v_proj", "q_proj"}
    model = llama(target_modules=given, modules_to_save={"lm_head"})
    model.save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_bytes())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["modules_to_save"] == ["lm_head"]


def test_a_config_value_that_json_cannot_store_is_refused_with_its_class() -> None:
    with pytest.raises(UsageError, match="an object of the class dtype"):
        llama(d_initial=torch.float32)


@pytest.mark.parametrize("fields", [{"target_modules": "all-linear"}, {"layers_to_transform": [1]}])
def test_a_long_list_is_saved_with_the_suffixes_that_peft_saves(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    def base() -> Any:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=96,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
            )
        )

    every = [name for name, part in base().model.named_modules() if isinstance(part, nn.Linear)]
    given = {"r": 4, "target_modules": [f"model.{name}" for name in every], **fields}
    theirs = peft.get_peft_model(base(), peft.VeraConfig(**given))
    ours = VeraModel(base(), VeraConfig(**given, peft_version=peft.__version__))
    one, other = saved(theirs, ours, tmp_path)
    assert config_of(one) == config_of(other)
    assert len(config_of(other)["target_modules"]) == 7
    assert weights(one) == weights(other)
    VeraModel.from_pretrained(base(), one)


def test_a_config_can_be_given_for_a_stored_adapter(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "out")

    def loaded(config: Any) -> VeraModel:
        return VeraModel.from_pretrained(
            torchmodels.built("llama"), tmp_path / "out", config=config
        )

    config = replace(OURS, vera_dropout=0.5)
    model = loaded(config)
    assert model.configs["default"].vera_dropout == 0.5
    layer = next(part for part in model.modules() if isinstance(part, VeraLinear))
    assert layer.dropout["default"] == 0.5
    assert torch.equal(output_of(model), output_of(llama()))
    assert loaded(peft.VeraConfig(**FIELDS)).configs["default"].vera_dropout == 0
    with pytest.raises(UsageError, match="VeraConfig"):
        loaded(peft.LoraConfig())
    for wrong in (replace(OURS, r=5), replace(OURS, bias="some")):
        with pytest.raises(CheckpointError):
            loaded(wrong)
    (tmp_path / "out/adapter_config.json").unlink()
    assert torch.equal(output_of(loaded(config)), output_of(llama()))
    with pytest.raises(CheckpointError, match=r"no adapter_config.json"):
        loaded(None)
    llama(save_projection=False).save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "new/adapter_model.safetensors", tmp_path / "out")
    with pytest.raises(CheckpointError, match="save_projection"):
        loaded(OURS)


@pytest.mark.parametrize(
    "options",
    [
        {"low_cpu_mem_usage": True, "torch_device": "cpu", "ephemeral_gpu_offload": False},
        {"key_mapping": None, "token": None, "cache_dir": None, "use_safetensors": True},
        {"subfolder": "two"},
    ],
)
def test_an_adapter_is_loaded_with_pefts_arguments(options: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = two()
    theirs.save_pretrained(tmp_path / "out")
    for model in (theirs, ours):
        model.load_adapter(tmp_path / "out", "new", is_trainable=True, **options)
        model.set_adapter("new")
    assert torch.equal(output_of(ours), output_of(theirs))
    assert not ours.configs["new"].inference_mode


def test_arguments_of_peft_that_would_change_the_result_are_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "out")
    for options, message in (
        ({"key_mapping": {"a": "b"}}, "key_map="),
        ({"ignore_mismatched_sizes": True}, "fits in part"),
        ({"token": "hf_1"}, "HubAccess"),
        ({"nothing_known": 1}, "no argument nothing_known"),
    ):
        with pytest.raises(UsageError, match=message):
            VeraModel.from_pretrained(torchmodels.built("llama"), tmp_path / "out", **options)


# --- files ---------------------------------------------------------------------------------------


def test_a_folder_may_be_empty_and_its_parents_missing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "some" / "where" / "out"):
        llama().save_pretrained(folder)
        assert (folder / "adapter_model.safetensors").is_file()
        with pytest.raises(UsageError, match="exists"):
            llama().save_pretrained(folder)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SurroundingsError, match="file"):
        llama().save_pretrained(tmp_path / "file" / "out")


def test_pefts_own_folder_can_be_replaced_and_its_card_stays(tmp_path: Path) -> None:
    theirs, ours = two()
    theirs.save_pretrained(tmp_path / "out")
    card = (tmp_path / "out/README.md").read_bytes()
    with pytest.raises(UsageError, match="exists"):
        ours.save_pretrained(tmp_path / "out")
    ours.save_pretrained(tmp_path / "out", force=True, selected_adapters=["default"])
    assert (tmp_path / "out/README.md").read_bytes() == card
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors"),
    }


def test_loading_under_an_existing_name_replaces_the_values(tmp_path: Path) -> None:
    other = llama(projection_prng_key=7, modules_to_save=("lm_head",))
    other.model.lm_head.modules_to_save["default"].weight.data += 1
    other.save_pretrained(tmp_path / "out")
    model = llama(modules_to_save=("lm_head",))
    model.add_adapter(OURS, adapter="two")
    model.set_adapter("two")
    of_two = output_of(model)
    model.set_adapter("default")
    parameters, before = model.trainable_parameters(), output_of(model)
    model.load_adapter(tmp_path / "out", "default", trainable=True)
    assert all(
        one is two for one, two in zip(model.trainable_parameters(), parameters, strict=True)
    )
    assert torch.equal(output_of(model), output_of(other))
    assert not torch.equal(output_of(model), before)
    model.set_adapter("two")
    assert torch.equal(output_of(model), of_two)
    with pytest.raises(UsageError, match="with other layers or another rank"):
        llama(r=3).load_adapter(tmp_path / "out")


# --- copies and pickles --------------------------------------------------------------------------


@pytest.mark.parametrize("with_peft", [True, False])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_model_can_be_pickled(
    protocol: int, with_peft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_peft:
        monkeypatch.delitem(sys.modules, "peft")
    model = llama(modules_to_save=("lm_head",))
    for again in (
        pickle.loads(pickle.dumps(model, protocol)),  # noqa: S301
        copy.deepcopy(model),
    ):
        assert type(again) is VeraModel
        assert torch.equal(output_of(again), output_of(model))
        assert again.configs == model.configs
        assert trained_names(again) == trained_names(model)
        again.merge()
    model.merge()


def test_isinstance_accepts_the_model_as_pefts_if_peft_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = llama()
    assert isinstance(model, VeraModel)
    assert isinstance(model, peft.PeftModel)
    assert type(model) is VeraModel
    assert not issubclass(VeraModel, peft.PeftModel)
    assert "VeraModel(" in repr(model)
    monkeypatch.delitem(sys.modules, "peft")
    assert model.__class__ is VeraModel
    assert not isinstance(model, peft.PeftModel)


# --- transformers' Trainer -----------------------------------------------------------------------


class Sentences(torch.utils.data.Dataset[Any]):
    """Random tokens, with a column that no model accepts."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = torch.randint(2, 96, (7,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens, "source": index}


def trainer(model: Any, out: Path, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(out),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=Sentences(), eval_dataset=Sentences()
    )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"label_smoothing_factor": 0.1},
        {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True},
    ],
    ids=str,
)
def test_the_trainer_trains_evaluates_saves_and_resumes_as_with_peft(
    options: dict[str, Any], tmp_path: Path
) -> None:
    ends: list[dict[str, Any]] = []
    names = ("theirs", "ours")
    for name, model in zip(names, wrapped_twice("llama", init_weights=True), strict=True):
        model.train()
        run = trainer(model, tmp_path / name, **options)
        loss = run.train().training_loss
        ends.append({"loss": loss, "eval": run.evaluate()["eval_loss"], "logits": output_of(model)})
        run.save_model()
    assert ends[1]["loss"] == pytest.approx(ends[0]["loss"], rel=1e-6)
    assert ends[1]["eval"] == pytest.approx(ends[0]["eval"], rel=1e-6)
    torch.testing.assert_close(ends[1]["logits"], ends[0]["logits"])
    for folder in ("", "checkpoint-2", "checkpoint-4"):
        one, other = (tmp_path / name / folder for name in names)
        files = {path.name for path in one.iterdir()} - {"README.md"}
        assert {path.name for path in other.iterdir()} == files
        assert config_of(one) == config_of(other)
    fresh = wrapped_twice("llama", init_weights=True)[1].train()
    trainer(fresh, tmp_path / "ours", **options).train(
        resume_from_checkpoint=str(tmp_path / "ours/checkpoint-2")
    )
    torch.testing.assert_close(output_of(fresh), ends[1]["logits"])
    loaded = VeraModel.from_pretrained(torchmodels.built("llama"), tmp_path / "ours")
    assert torch.equal(output_of(loaded), ends[1]["logits"])


def test_a_trainer_saves_beside_existing_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    llama(projection_prng_key=3).save_pretrained(out)
    (out / "optimizer.pt").write_bytes(b"precious")
    model = llama()
    model.save_pretrained(out, state_dict=None, is_main_process=False)
    assert json.loads((out / "adapter_config.json").read_bytes())["projection_prng_key"] == 3
    model.save_pretrained(out, state_dict=None, is_main_process=True)
    assert (out / "optimizer.pt").read_bytes() == b"precious"
    assert {path.name for path in out.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "optimizer.pt"),
    }
    loaded = VeraModel.from_pretrained(torchmodels.built("llama"), out)
    assert torch.equal(output_of(loaded), output_of(model))
    for options, message in (
        ({"state_dict": {}}, "whole model"),
        ({"safe_serialization": False}, "pickles"),
        ({"save_embedding_layers": True}, "embedding"),
        ({"nothing_known": 1}, "no argument nothing_known"),
    ):
        with pytest.raises(UsageError, match=message):
            model.save_pretrained(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


# --- the work of a merge -------------------------------------------------------------------------


def test_each_delta_of_a_merge_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []
    delta = VeraLinear.delta

    def counted(layer: VeraLinear, adapter: str) -> Any:
        computed.append(adapter)
        return delta(layer, adapter)

    monkeypatch.setattr(VeraLinear, "delta", counted)
    model = llama()
    model.merge()
    assert computed == ["default"] * 4


def test_a_merge_lists_the_names_of_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    asked: list[int] = []
    named = nn.Module.named_parameters

    def counted(*args: Any, **kwargs: Any) -> Any:
        asked.append(1)
        return named(*args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_parameters", counted)
    model.merge()
    assert len(asked) == 1


def test_inspect_shows_the_signatures_of_decorated_methods() -> None:
    assert "autocast_adapter_dtype" in inspect.signature(VeraModel.load_adapter).parameters
