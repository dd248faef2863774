"""The model adds, combines, merges, saves, loads and refuses adapters."""

# mypy: allow-subclassing-any
from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import theirwarnings
import torch
import torchmodels
from safetensors.numpy import load_file, save_file
from torch import nn

from vera_convert import CheckpointError, Rounding, SurroundingsError, UsageError, Variant, strip
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.merging.options import Tied
from vera_convert.with_torch import VeraConfig, VeraLinear, VeraModel

LLAMA = VeraConfig(r=4, target_modules=("q_proj", "v_proj"), init_weights=False)
"""A config with b = 1 at the start, so that the adapter has an effect."""
WITH_HEAD = VeraConfig(r=4, target_modules=("query",), task_type="SEQ_CLS", init_weights=False)


LAST = VeraConfig(r=2, target_modules=("2",))


def llama(config: VeraConfig | None = LLAMA, dtype: str = "float32") -> VeraModel:
    return VeraModel(torchmodels.built("llama", dtype), config)


def bert(config: VeraConfig = WITH_HEAD) -> VeraModel:
    return VeraModel(torchmodels.built("bert"), config)


def output_of(model: Any, kind: str = "llama") -> Any:
    return torchmodels.logits(model, kind)


def names(parameters: Any) -> set[str]:
    return {name.rpartition("layers.")[2] for name, p in parameters if p.requires_grad}


# --- adapters ------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_until_it_is_trained() -> None:
    base = output_of(torchmodels.built("llama"))
    assert torch.equal(output_of(llama(replace(LLAMA, init_weights=True))), base)
    assert not torch.equal(output_of(llama()), base)


def test_layers_of_all_widths_share_one_pair() -> None:
    model = llama(replace(LLAMA, target_modules=("v_proj", "down_proj", "up_proj")))
    assert model.vera_A.default.shape == (4, 48)
    assert model.vera_B.default.shape == (48, 4)
    layers = [module for module in model.modules() if isinstance(module, VeraLinear)]
    assert len(layers) == 6
    assert all(layer._shared[0] is model.vera_A for layer in layers)


def test_only_active_adapters_are_trained() -> None:
    model = llama()
    model.add_adapter(replace(LLAMA, target_modules=("k_proj",)), adapter="other")
    assert {name.rpartition(".")[2] for name in names(model.named_parameters())} == {"default"}
    model.set_adapter("other")
    assert names(model.named_parameters()) == {
        f"{layer}.self_attn.k_proj.vera_lambda_{vector}.other"
        for layer in (0, 1)
        for vector in "bd"
    }
    assert len(model.trainable_parameters()) == 4
    model.set_adapter("default", "other", trainable=False)
    assert model.trainable_parameters() == []


def test_the_branches_of_several_adapters_are_summed() -> None:
    model = llama(replace(LLAMA, target_modules=("lm_head",)))
    model.add_adapter(replace(LLAMA, target_modules=("lm_head",), r=2), adapter="two")
    alone = output_of(model)
    model.set_adapter("two")
    other = output_of(model)
    model.set_adapter("two", "default", "two")
    assert model.active == ("two", "default")
    with model.disabled():
        base = output_of(model)
    torch.testing.assert_close(output_of(model), alone + other - base)


def test_each_adapter_has_the_same_matrices_as_alone() -> None:
    model = llama()
    wide = replace(LLAMA, target_modules=("down_proj",), r=8)
    model.add_adapter(wide, adapter="wide")
    alone = llama(wide)
    assert torch.equal(model.vera_A.wide, alone.vera_A.default)
    assert model.vera_A.wide.shape != model.vera_A.default.shape
    model.add_adapter(LLAMA, adapter="same")
    assert model.vera_B.same is model.vera_B.default


def test_the_variant_of_the_generator_can_be_chosen() -> None:
    usual = llama()
    other = VeraModel(torchmodels.built("llama"), LLAMA, variant=Variant.FLOAT32_SEPARATE)
    difference = (usual.vera_A.default - other.vera_A.default).abs().max()
    assert 0 < difference < 1e-6


def test_disabled_adapters_give_the_outputs_of_the_base() -> None:
    model = bert()
    model.model.classifier.modules_to_save["default"].weight.data += 1
    base = output_of(torchmodels.built("bert"), "bert")
    adapted = output_of(model, "bert")
    with model.disabled():
        assert torch.equal(output_of(model, "bert"), base)
    assert torch.equal(output_of(model, "bert"), adapted)
    assert not torch.equal(adapted, base)


def test_attributes_of_the_model_are_available() -> None:
    model = llama()
    assert model.config is model.model.config
    tokens = model.generate(**torchmodels.inputs_of("llama"), max_new_tokens=3, do_sample=False)
    assert tokens.shape == (2, 10)
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = model.nothing_of_this_name


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: m.add_adapter(LLAMA), "already has an adapter default"),
        (lambda m: m.add_adapter(LLAMA, adapter="a.b"), "cannot name an adapter"),
        (lambda m: m.add_adapter(LLAMA, adapter="keys"), "cannot name an adapter"),
        (lambda m: m.add_adapter(LLAMA, adapter="put"), "cannot name an adapter"),
        (lambda m: m.set_adapter("none"), "has no adapter none"),
        (lambda m: VeraModel(m.model, LLAMA), "wrapped already"),
        (lambda _: VeraModel("my-model", LLAMA), r"model is not a torch\.nn\.Module: load"),
        (lambda m: m.load_adapter(None), "folder is None: give a text"),
        (
            lambda m: m.add_adapter(
                VeraConfig(r=4, target_modules=("up_proj",), modules_to_save=("self_attn",)),
                adapter="b",
            ),
            "another adapter adapts",
        ),
        (
            lambda m: m.add_adapter(replace(LLAMA, modules_to_save=("nope",)), adapter="b"),
            "no module's path ends with",
        ),
        (
            lambda m: m.add_adapter(replace(LLAMA, target_modules=("norm", "k_proj")), adapter="b"),
            r"a LlamaRMSNorm. VeRA adapts torch.nn.Linear, transformers' Conv1D",
        ),
    ],
)
def test_a_wrong_adapter_is_refused_and_changes_nothing(
    act: Callable[[VeraModel], None], message: str
) -> None:
    model = llama()
    before = output_of(model)
    with pytest.raises(UsageError, match=message):
        act(model)
    assert set(model.configs) == {"default"}
    assert torch.equal(output_of(model), before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(LLAMA, r=0), "r is 0"),
        (replace(LLAMA, projection_prng_key=2**64), "projection_prng_key"),
        (replace(LLAMA, target_modules=("nope",)), "matches none"),
        (replace(LLAMA, layers_pattern="layers"), "layers_to_transform is null"),
    ],
)
def test_a_config_object_is_checked_like_a_config_file(config: VeraConfig, message: str) -> None:
    base = torchmodels.built("llama")
    with pytest.raises(CheckpointError, match=message):
        VeraModel(base, config)
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_two_adapters_cannot_train_the_same_biases() -> None:
    model = bert(replace(WITH_HEAD, bias="vera_only"))
    with pytest.raises(UsageError, match="only one adapter of a model can train biases"):
        model.add_adapter(replace(WITH_HEAD, bias="all"), adapter="two")


def test_two_heads_cannot_both_be_active() -> None:
    model = bert()
    model.add_adapter(WITH_HEAD, adapter="two")
    with pytest.raises(UsageError, match="default and two each bring their own classifier"):
        model.set_adapter("default", "two")
    model.model.classifier.modules_to_save["two"].weight.data += 1
    first = output_of(model, "bert")
    model.set_adapter("two")
    assert not torch.equal(output_of(model, "bert"), first)


def test_a_model_without_values_is_refused() -> None:
    base = torchmodels.built("llama").to("meta")
    with pytest.raises(SurroundingsError, match=r"q_proj is on the meta device"):
        VeraModel(base, LLAMA)
    assert not any(isinstance(module, VeraLinear) for module in base.modules())
    with pytest.raises(SurroundingsError, match=r"lambda_b is on the meta device"):
        llama().to("meta").save_pretrained("nowhere")


class Quantized(nn.Module):
    """A linear layer whose weight is of no class that torch knows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("packed", torch.arange(inputs * outputs, dtype=torch.uint8) % 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.packed.reshape(self.in_features, self.out_features).to(x.dtype)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_quantized_layers_are_adapted_and_not_merged(
    bias: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = SimpleNamespace(BaseQuantLinear=Quantized)
    monkeypatch.setitem(sys.modules, "gptqmodel.nn_modules.qlinear", library)

    def base() -> nn.Module:
        return nn.Sequential(Quantized(8, 6), nn.ReLU(), Quantized(6, 8))

    config = VeraConfig(r=2, target_modules=("0", "2"), bias=bias, init_weights=False)
    model, x = VeraModel(base(), config), torch.randn(3, 8)
    assert model.vera_A.default.shape == (2, 8)
    model.save_pretrained(tmp_path / "out")
    loaded = VeraModel.from_pretrained(base(), tmp_path / "out")
    assert torch.equal(loaded(x), model(x))
    assert not torch.equal(base()(x), model(x))
    with pytest.raises(UsageError, match="quantized"):
        model.merge(check=False)


def test_a_layer_of_another_kind_is_refused_by_its_class(tmp_path: Path) -> None:
    def base() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), Quantized(6, 8))

    with pytest.raises(UsageError, match="target_modules matches 2, a Quantized"):
        VeraModel(base(), VeraConfig(r=2, target_modules=("2",)))
    VeraModel(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)), LAST).save_pretrained(
        tmp_path / "out"
    )
    with pytest.raises(CheckpointError, match=r'"2" \(a Quantized\), are no linear layers'):
        VeraModel.from_pretrained(base(), tmp_path / "out")


# --- merging -------------------------------------------------------------------------------------


def test_merge_and_unmerge() -> None:
    model = llama()
    adapted = output_of(model)
    model.merge()
    torch.testing.assert_close(output_of(model), adapted)
    merged = r"default is merged: call unmerge\(\)"
    model.merge()
    torch.testing.assert_close(output_of(model), adapted)
    with pytest.raises(UsageError, match=merged):
        model.set_adapter("default")
    with pytest.raises(UsageError, match=merged), model.disabled():
        pass
    model.unmerge()
    torch.testing.assert_close(output_of(model), adapted)
    with model.disabled():
        torch.testing.assert_close(output_of(model), output_of(torchmodels.built("llama")))


def test_unload_gives_back_the_model_that_was_wrapped() -> None:
    base = torchmodels.built("bert")
    expected = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = VeraModel(base, WITH_HEAD)
    trained = model.model.classifier.modules_to_save["default"]
    assert model.unload() is base
    assert base.classifier is trained
    assert base.state_dict().keys() == expected.keys()
    assert all(torch.equal(base.state_dict()[name], expected[name]) for name in expected)


def test_no_layer_is_merged_if_a_value_would_not_be_finite() -> None:
    model = llama()
    expected = output_of(model)
    model.model.model.layers[1].self_attn.v_proj.vera_lambda_b.default.data[0] = torch.inf
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.v_proj"):
        model.merge()
    model.model.model.layers[1].self_attn.v_proj.vera_lambda_b.default.data[0] = 1.0
    assert torch.equal(output_of(model), expected)
    model.model.model.layers[1].self_attn.v_proj.vera_lambda_b.default.data[0] = torch.inf
    model.merge(check=False)
    assert not output_of(model).isfinite().all()


def test_a_tied_head_is_merged_by_the_user_s_choice() -> None:
    def tied() -> VeraModel:
        return VeraModel(torchmodels.built("gpt2"), replace(LLAMA, target_modules=("lm_head",)))

    model = tied()
    adapted = output_of(model, "gpt2")
    with pytest.raises(UsageError, match=r"transformer\.wte\.weight and lm_head\.weight are one"):
        model.merge()
    assert torch.equal(output_of(model, "gpt2"), adapted)
    model.merge(tied=Tied.UNTIE)
    torch.testing.assert_close(output_of(model, "gpt2"), adapted)
    merged = model.unload()
    assert merged.config.tie_word_embeddings is False
    assert not torch.equal(merged.lm_head.weight, merged.transformer.wte.weight)
    model = tied()
    model.merge(tied=Tied.ADD)
    changed = model.unload()
    assert changed.lm_head.weight is changed.transformer.wte.weight
    assert torch.equal(changed.lm_head.weight, merged.lm_head.weight)
    assert not torch.equal(output_of(changed, "gpt2"), adapted)


# --- torch's own machinery -----------------------------------------------------------------------


def test_a_state_dict_can_be_loaded_again() -> None:
    model, other = bert(), bert(replace(WITH_HEAD, projection_prng_key=1))
    for parameter in model.trainable_parameters():
        parameter.data.normal_()
    assert not torch.equal(output_of(model, "bert"), output_of(other, "bert"))
    other.load_state_dict(model.state_dict())
    assert torch.equal(output_of(model, "bert"), output_of(other, "bert"))
    assert torch.equal(output_of(copy.deepcopy(model), "bert"), output_of(other, "bert"))


@theirwarnings.OF_TORCH
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: Any) -> None:
    def gradients(model: VeraModel) -> list[Any]:
        model.train()
        model(**torchmodels.inputs_of("llama")).logits.square().sum().backward()
        return [parameter.grad for parameter in model.trainable_parameters()]

    expected = gradients(llama())
    model = llama()
    # transformers 5.24 renamed the method
    newer = getattr(model.model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.testing.assert_close(gradients(model), expected)


def test_the_model_compiles() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.one(x).relu())

    config = VeraConfig(r=2, target_modules=("one",), modules_to_save=("head",), init_weights=False)
    model = VeraModel(Two(), config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 8)
    torch.testing.assert_close(compiled(x), model(x))


def test_the_model_can_be_moved_to_another_device() -> None:
    model = llama().double()
    assert model.vera_A.default.dtype == torch.float64
    torch.testing.assert_close(output_of(model).float(), output_of(llama()))


# --- saving and loading --------------------------------------------------------------------------


def test_a_model_without_adapters_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no adapter to save"):
        llama(None).save_pretrained(tmp_path / "out")


def test_a_saved_adapter_gives_the_same_outputs(tmp_path: Path) -> None:
    model = bert()
    for parameter in model.trainable_parameters():
        parameter.data.normal_()
    model.save_pretrained(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded = VeraModel.from_pretrained(torchmodels.built("bert"), tmp_path / "out")
    assert torch.equal(output_of(loaded, "bert"), output_of(model, "bert"))
    assert loaded.trainable_parameters() == []
    loaded.set_adapter("default")
    assert names(loaded.named_parameters()) == names(model.named_parameters())
    loaded.save_pretrained(tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_named_adapter_gets_its_own_folder(tmp_path: Path) -> None:
    model = llama()
    model.add_adapter(replace(LLAMA, projection_prng_key=9), adapter="nine")
    model.save_pretrained(tmp_path / "out")
    loaded = VeraModel.from_pretrained(torchmodels.built("llama"), tmp_path / "out")
    loaded.load_adapter(tmp_path / "out" / "nine", adapter="ninth")
    assert loaded.configs["ninth"].projection_prng_key == 9
    for ours, theirs in (("default", "default"), ("nine", "ninth")):
        model.set_adapter(ours)
        loaded.set_adapter(theirs)
        assert torch.equal(output_of(loaded), output_of(model))


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = llama()
    model.add_adapter(LLAMA, adapter="two")
    model.save_pretrained(out)
    with pytest.raises(UsageError):
        model.save_pretrained(out)
    model.save_pretrained(out, force=True)
    (out / "optimizer.pt").write_bytes(b"precious")
    with pytest.raises(UsageError):
        model.save_pretrained(out, force=True)
    assert (out / "optimizer.pt").read_bytes() == b"precious"


def test_a_stripped_adapter_loads_with_the_same_values(tmp_path: Path) -> None:
    model = llama(dtype="bfloat16")
    model.save_pretrained(tmp_path / "whole")
    strip(tmp_path / "whole", tmp_path / "stripped", accept_change=True)
    loaded = VeraModel.from_pretrained(torchmodels.built("llama"), tmp_path / "stripped")
    assert torch.equal(loaded.vera_A.default, model.vera_A.default)  # rounded, on a float32 base


def test_the_key_can_be_used_instead_of_stored_matrices(tmp_path: Path) -> None:
    llama(dtype="bfloat16").save_pretrained(tmp_path / "out")
    by_key = VeraModel.from_pretrained(
        torchmodels.built("llama"), tmp_path / "out", projections=ProjectionSource.KEY
    )
    assert torch.equal(by_key.vera_A.default, llama().vera_A.default)


def test_drawn_projections_can_be_rounded_as_for_another_dtype(tmp_path: Path) -> None:
    llama(replace(LLAMA, save_projection=False)).save_pretrained(tmp_path / "out")
    base = torchmodels.built("llama")
    loaded = VeraModel.from_pretrained(base, tmp_path / "out", rounding=Rounding.BF16)
    assert torch.equal(loaded.vera_A.default, llama(dtype="bfloat16").vera_A.default)


def test_a_key_map_renames_paths_to_the_model_s_paths(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "adapter_model.safetensors"
    embedding = {"base_model.model.model.embed_tokens.weight": np.ones((96, 32), np.float32)}
    stored = {**load_file(path), **embedding}
    moved = {name.replace(".model.model.", ".model.my.model."): stored[name] for name in stored}
    save_file(moved, path)
    with pytest.raises(CheckpointError, match="no linear layers"):
        VeraModel.from_pretrained(torchmodels.built("llama"), tmp_path / "out")
    pairs = (("my", "your"), ("my", ""))
    loaded = VeraModel.from_pretrained(torchmodels.built("llama"), tmp_path / "out", key_map=pairs)
    assert (loaded.model.model.embed_tokens.weight == 1).all()
    model.model.model.embed_tokens.weight.fill_(1)
    assert torch.equal(output_of(loaded), output_of(model))


def edited(folder: Path, tensors: Mapping[str, Any], **config: object) -> Path:
    """Change tensors of a saved adapter; None removes the tensor."""
    path = folder / "adapter_model.safetensors"
    stored = {**load_file(path), **tensors}
    save_file({name: array for name, array in stored.items() if array is not None}, path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("kind", "tensors", "message"),
    [
        ("gpt2", {}, r"4 of 4 layers, such as .*q_proj.*, are no linear layers of the model"),
        (
            "llama",
            {f"{LAYER}.vera_lambda_b": np.ones(30, np.float32)},
            "lambda_b has 30 values, the layer 32 outputs",
        ),
        (
            "llama",
            {"base_model.vera_A": np.ones((4, 31), np.float32)},
            "31 columns, a layer of LlamaForCausalLM 32 inputs",
        ),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    kind: str, tensors: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path / "out")
    base = torchmodels.built(kind)
    expected = output_of(base, kind)
    with pytest.raises(CheckpointError, match=message):
        VeraModel.from_pretrained(base, edited(tmp_path / "out", tensors))
    assert torch.equal(output_of(base, kind), expected)


def test_layers_that_the_file_lacks_are_not_adapted_and_reported(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "out")
    gone = {f"{LAYER}.vera_lambda_{vector}": None for vector in "bd"}
    loaded = VeraModel.from_pretrained(torchmodels.built("llama"), edited(tmp_path / "out", gone))
    assert not isinstance(loaded.model.model.layers[0].self_attn.q_proj, VeraLinear)
    assert any("V411" in str(finding.rule.code) for finding in loaded.findings["default"])


def test_embeddings_that_come_with_an_adapter_are_kept(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "out")
    name = "base_model.model.model.embed_tokens.weight"
    values = np.random.default_rng(0).normal(size=(96, 32)).astype(np.float32)
    loaded = VeraModel.from_pretrained(
        torchmodels.built("llama"), edited(tmp_path / "out", {name: values})
    )
    assert np.array_equal(loaded.model.model.embed_tokens.weight.numpy(), values)
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert np.array_equal(again[name], values)
