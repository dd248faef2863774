"""Compare the model with PEFT's: the same values, names, files, logits and training."""

# mypy: allow-subclassing-any
from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import theirwarnings
import torch
import torchmodels
from peftmodels import config_of, saved, weights, wrapped_twice
from torch import nn
from torchmodels import KINDS

from vera_convert import CheckpointError
from vera_convert.with_torch import VeraConfig, VeraModel

pytestmark = theirwarnings.OF_PEFT

DTYPES = ("float32", "bfloat16")
every_model = pytest.mark.parametrize(
    ("kind", "dtype"), [(kind, dtype) for kind in KINDS for dtype in DTYPES]
)


@every_model
@pytest.mark.parametrize("init_weights", [True, False])
def test_saved_files_are_byte_equal_to_peft_s(
    kind: str, dtype: str, init_weights: Any, tmp_path: Path
) -> None:
    theirs, ours = saved(*wrapped_twice(kind, dtype, init_weights=init_weights), tmp_path)
    assert weights(theirs) == weights(ours)
    assert config_of(theirs) == config_of(ours)


def test_a_config_without_sets_is_byte_equal_to_peft_s(tmp_path: Path) -> None:
    theirs, ours = saved(*wrapped_twice("gpt2", target_modules=["c_attn"]), tmp_path)
    name = "adapter_config.json"
    assert (theirs / name).read_bytes() == (ours / name).read_bytes()


@every_model
def test_parameter_names_equal_peft_s(kind: str, dtype: str) -> None:
    theirs, ours = wrapped_twice(kind, dtype)
    names = set(theirs.base_model.state_dict())
    copies = {name for name in names if ".vera_A." in name or ".vera_B." in name}
    assert set(ours.state_dict()) == names - copies
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == {
        name for name, p in theirs.base_model.named_parameters() if p.requires_grad
    }


@every_model
def test_peft_loads_our_files_and_we_load_peft_s(kind: str, dtype: str, tmp_path: Path) -> None:
    models = wrapped_twice(kind, dtype)
    expected, other = (torchmodels.logits(model, kind, dtype) for model in models)
    assert torch.equal(expected, other)
    theirs, ours = saved(*models, tmp_path)
    loaded = (
        VeraModel.from_pretrained(torchmodels.built(kind, dtype), theirs),
        peft.PeftModel.from_pretrained(torchmodels.built(kind, dtype), ours),
    )
    for model in loaded:
        assert torch.equal(torchmodels.logits(model, kind, dtype), expected)
    base = torchmodels.logits(torchmodels.built(kind, dtype), kind, dtype)
    assert not torch.equal(base, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "half"),
    [
        ("float32", torch.bfloat16),
        ("float32", torch.float16),
        ("bfloat16", torch.bfloat16),
    ],
    ids=str,
)
def test_autocast_gives_the_same_bits_as_peft(kind: str, dtype: str, half: Any) -> None:
    models = wrapped_twice(kind, dtype)
    with torch.autocast("cpu", half):
        expected, logits = (torchmodels.logits(model, kind, dtype) for model in models)
    assert logits.dtype == expected.dtype
    assert torch.equal(logits, expected)


@every_model
def test_merged_models_are_bit_equal_to_peft_s(kind: str, dtype: str) -> None:
    theirs, ours = wrapped_twice(kind, dtype)
    ours.merge()
    expected = theirs.merge_and_unload().state_dict()
    merged = ours.unload().state_dict()
    assert list(merged) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor), name


@pytest.mark.parametrize(
    ("kind", "dtype", "fields"),
    [
        ("llama", "float32", {}),
        ("llama", "bfloat16", {"vera_dropout": 0.1}),
        ("bert", "float32", {"vera_dropout": 0.1, "bias": "all"}),
        ("gpt2", "float32", {"bias": "vera_only"}),
    ],
)
def test_twenty_steps_of_training_agree_with_peft(
    kind: str, dtype: str, fields: dict[str, Any]
) -> None:
    losses, states = [], []
    for model in wrapped_twice(kind, dtype, init_weights=True, **fields):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        model.train()
        torch.manual_seed(3)
        losses.append([step(model, kind, dtype, optimizer) for _ in range(20)])
        states.append([parameter.detach() for parameter in trained])
    assert sum(losses[1][-5:]) < sum(losses[1][:5])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-6)


def step(model: Any, kind: str, dtype: str, optimizer: Any) -> float:
    answers = model(**torchmodels.inputs_of(kind, dtype)).logits.float().flatten(0, -2)
    labels = torch.arange(len(answers)) % answers.shape[1]
    loss = nn.functional.cross_entropy(answers, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize(
    "fields",
    [
        {"save_projection": False, "projection_prng_key": -3},
        {"target_modules": None},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.1\..*(k|down)_proj"},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        {"modules_to_save": ["embed_tokens", "norm"]},
        {"d_initial": 0.3, "init_weights": True, "r": 7},
    ],
    ids=str,
)
def test_every_config_field_has_the_same_meaning_as_in_peft(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    models = wrapped_twice("llama", "bfloat16", **fields)
    theirs, ours = saved(*models, tmp_path)
    assert weights(theirs) == weights(ours)
    assert config_of(theirs) == config_of(ours)
    loaded = VeraModel.from_pretrained(torchmodels.built("llama", "bfloat16"), theirs)
    expected = torchmodels.logits(models[0], "llama", "bfloat16")
    assert torch.equal(torchmodels.logits(loaded, "llama", "bfloat16"), expected)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("bias", ["all", "vera_only"])
def test_trained_biases_are_saved_and_loaded(kind: str, bias: str, tmp_path: Path) -> None:
    models = wrapped_twice(kind, bias=bias, task_type=None)
    for model in models:
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data += 0.5 if parameter.requires_grad else 0
    theirs, ours = saved(*models, tmp_path)
    assert weights(theirs) == weights(ours)
    loaded = VeraModel.from_pretrained(torchmodels.built(kind), theirs)
    expected = torchmodels.logits(models[0], kind)
    assert torch.equal(torchmodels.logits(loaded, kind), expected)
    loaded.merge()
    merged = torchmodels.logits(loaded.unload(), kind)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)


def test_two_adapters_add_up_as_in_peft(tmp_path: Path) -> None:
    theirs, ours = wrapped_twice("llama")
    fields = {"r": 4, "init_weights": False, **KINDS["llama"].config}
    theirs.add_adapter("two", peft.VeraConfig(**fields))
    ours.add_adapter(VeraConfig(**fields), adapter="two")
    ours.load_state_dict(theirs.base_model.state_dict(), strict=False)
    theirs.base_model.set_adapter(["default", "two"])
    ours.set_adapter("default", "two")
    expected = torchmodels.logits(theirs, "llama")
    assert torch.equal(torchmodels.logits(ours, "llama"), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    for folder in ("", "two"):
        assert weights(tmp_path / "theirs" / folder) == weights(tmp_path / "ours" / folder)
    theirs.merge_adapter()
    ours.merge()
    assert torch.equal(torchmodels.logits(ours, "llama"), torchmodels.logits(theirs, "llama"))


def test_a_file_without_the_copy_of_an_adapted_head_loads(tmp_path: Path) -> None:
    models = wrapped_twice("llama", target_modules=["lm_head"])
    expected = torchmodels.logits(models[0], "llama")
    theirs, ours = saved(*models, tmp_path)
    assert len(weights(ours)) < len(weights(theirs)) - 4 * 96 * 32
    loaded = VeraModel.from_pretrained(torchmodels.built("llama"), theirs)
    assert torch.equal(torchmodels.logits(loaded, "llama"), expected)
    again = peft.PeftModel.from_pretrained(torchmodels.built("llama"), ours)
    assert torch.equal(torchmodels.logits(again, "llama"), expected)
    other = torchmodels.built("llama")
    other.lm_head.weight.data[5, 7] += 1
    with pytest.raises(CheckpointError, match="differ from the model's"):
        VeraModel.from_pretrained(other, theirs)


class Mixed(nn.Module):
    """Layers of several dtypes, one after another."""

    def __init__(self, *dtypes: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8).to(getattr(torch, name)) for name in dtypes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype))
        return x


@pytest.mark.parametrize(
    "dtypes",
    [
        ("float16", "bfloat16"),
        ("bfloat16", "float16"),
        ("float32", "bfloat16"),
        ("float64", "float64"),
        ("float32", "float64"),
        ("float64", "bfloat16"),
    ],
    ids="-".join,
)
def test_a_base_of_several_dtypes_rounds_once_for_each_dtype(
    dtypes: tuple[str, ...], tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"r": 4, "target_modules": r"layers\.\d"}
    theirs = peft.get_peft_model(Mixed(*dtypes), peft.VeraConfig(**fields))
    ours = VeraModel(Mixed(*dtypes), VeraConfig(**fields))
    one, other = saved(theirs, ours, tmp_path)
    assert weights(one) == weights(other)
