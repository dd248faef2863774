"""The layer by itself: formula, dtypes, gradients, devices, and the layers that can be wrapped."""

# mypy: allow-subclassing-any
from __future__ import annotations

import copy
import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.ibert.quant_modules import QuantLinear
from transformers.pytorch_utils import Conv1D

from vera_convert import SurroundingsError, UsageError
from vera_convert.with_torch import SharedMatrix, VeraLinear
from vera_convert.with_torch.layer import linear_of

RANK, INPUTS, OUTPUTS = 4, 12, 10
WIDEST = 16
"""The columns of A and the rows of B, which belong to a wider layer of the model."""


class Quantized(nn.Module):
    """A linear layer with its own forward, and with integers in its own order as the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = INPUTS, OUTPUTS
        self.register_buffer("weight", torch.randint(-8, 8, (OUTPUTS * INPUTS,), dtype=torch.int8))

    def forward(self, x: torch.Tensor, *, times: int = 1) -> torch.Tensor:
        return x @ self.weight.reshape(OUTPUTS, INPUTS).to(x.dtype).T * times


def plain(dtype: Any = torch.float32) -> nn.Linear:
    return nn.Linear(INPUTS, OUTPUTS).to(dtype)


def conv1d() -> Conv1D:
    return Conv1D(OUTPUTS, INPUTS)


def wrapped(layer: nn.Module, *adapters: str, dropout: float = 0.0) -> VeraLinear:
    """Wrap a layer with random adapters, and activate all adapters."""
    A, B = SharedMatrix(), SharedMatrix()
    vera = VeraLinear(layer, A, B)
    for name in adapters or ("one",):
        A.put(name, torch.randn(RANK, WIDEST))
        B.put(name, torch.randn(WIDEST, RANK))
        vera.add(name, torch.randn(RANK), torch.randn(OUTPUTS), dropout=dropout)
    vera.active = adapters or ("one",)
    vera.eval()
    return vera


def formula(vera: VeraLinear, x: torch.Tensor, *adapters: str) -> torch.Tensor:
    """Return the layer's output by the paper's formula, in float64."""
    y = vera.base_layer(x).double()
    for name in adapters:
        A, B = (getattr(matrix, name).double() for matrix in vera._shared)
        d, b = vera.vera_lambda_d[name].double(), vera.vera_lambda_b[name].double()
        y = y + x.double() @ (b.diag() @ B[:OUTPUTS] @ d.diag() @ A[:, :INPUTS]).T
    return y


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the test's `Quantized` as the class of a quantizer's library."""
    library = SimpleNamespace(HQQLinear=Quantized)
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", library)


LAYERS = {"linear": plain, "conv1d": conv1d, "quantized": Quantized}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("adapters", [("one",), ("one", "two")], ids=len)
def test_forward_computes_the_formula(make: Any, adapters: tuple[str, ...]) -> None:
    vera = wrapped(make(), *adapters)
    x = torch.randn(2, 5, INPUTS)
    torch.testing.assert_close(vera(x).double(), formula(vera, x, *adapters), rtol=0, atol=1e-5)


def test_only_active_adapters_change_the_output() -> None:
    vera = wrapped(plain(), "one", "two")
    x = torch.randn(3, INPUTS)
    vera.active = ("two",)
    torch.testing.assert_close(vera(x).double(), formula(vera, x, "two"), rtol=0, atol=1e-5)
    vera.active = ()
    assert torch.equal(vera(x), vera.base_layer(x))


def test_further_arguments_reach_the_frozen_layer() -> None:
    vera = wrapped(Quantized())
    x = torch.randn(3, INPUTS)
    twice = vera(x, times=2) - vera(x)
    torch.testing.assert_close(twice, vera.base_layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_layer_is_adapted_in_float32(dtype: Any) -> None:
    vera = wrapped(plain(dtype))
    x = torch.randn(3, INPUTS, dtype=dtype)
    y = vera(x)
    assert vera.vera_lambda_d.one.dtype == torch.float32
    assert y.dtype == dtype
    torch.testing.assert_close(y, formula(vera, x, "one").float().to(dtype))


def test_a_float64_layer_is_adapted_in_float64() -> None:
    vera = wrapped(plain(torch.float64))
    x = torch.randn(3, INPUTS, dtype=torch.float64)
    torch.testing.assert_close(vera(x), formula(vera, x, "one"))


def test_the_output_without_gradients_has_the_same_bits() -> None:
    vera = wrapped(plain())
    x = torch.randn(3, INPUTS)
    y = vera(x)
    with torch.no_grad():
        assert torch.equal(vera(x), y)


def test_autocast_does_not_depend_on_gradients() -> None:
    vera = wrapped(plain())
    x = torch.randn(3, INPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        y = vera(x)
        with torch.no_grad():
            assert torch.equal(vera(x), y)
    assert y.dtype == torch.float32  # the dtype of x, as in PEFT
    torch.testing.assert_close(y.double(), formula(vera, x, "one"), rtol=0.05, atol=0.2)


def test_gradients_equal_the_formula_s_and_reach_only_d_and_b() -> None:
    vera = wrapped(plain())
    vera.base_layer.requires_grad_(requires_grad=False)
    x = torch.randn(3, INPUTS, requires_grad=True)
    parameters = [x, vera.vera_lambda_d.one, vera.vera_lambda_b.one]
    weights = torch.randn(3, OUTPUTS)
    ours = torch.autograd.grad((vera(x) * weights).sum(), parameters)
    theirs = torch.autograd.grad((formula(vera, x, "one") * weights).sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    (vera(x) * weights).sum().backward()
    assert {name for name, p in vera.named_parameters() if p.grad is not None} == {
        "vera_lambda_d.one",
        "vera_lambda_b.one",
    }


def test_dropout_acts_only_in_training_and_only_on_the_branch() -> None:
    vera = wrapped(plain(), dropout=1.0)
    x = torch.randn(3, INPUTS)
    assert not torch.equal(vera(x), vera.base_layer(x))
    assert torch.equal(vera.train()(x), vera.base_layer(x))


# --- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [plain, conv1d])
def test_merged_weights_compute_the_same_as_the_branches(make: Any) -> None:
    vera = wrapped(make(), "one", "two")
    x = torch.randn(3, INPUTS)
    before, weight = vera(x), vera.weight.clone()
    vera.merge()
    torch.testing.assert_close(vera(x), before)
    torch.testing.assert_close(vera.base_layer(x), before)
    vera.unmerge()
    torch.testing.assert_close(vera.weight, weight)
    torch.testing.assert_close(vera(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merge_into_16_bits_rounds_once(dtype: Any) -> None:
    vera = wrapped(plain(dtype))
    delta = vera.delta("one")
    assert delta.dtype == torch.float32
    expected = (vera.weight.float() + delta).to(dtype)
    assert not torch.equal(expected, vera.weight + delta.to(dtype))
    vera.merge()
    assert torch.equal(vera.weight, expected)


def test_delta_is_float32_under_autocast_and_other_defaults() -> None:
    vera = wrapped(plain())
    expected = vera.delta("one")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vera.delta("one"), expected)
    half = copy.deepcopy(vera).to(torch.bfloat16).delta("one")
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0.1, atol=0.1)


def test_several_adapters_are_merged_one_after_the_other() -> None:
    vera = wrapped(plain(torch.bfloat16), "one", "two")
    first = (vera.weight.float() + vera.delta("one")).bfloat16()
    expected = (first.float() + vera.delta("two")).bfloat16()
    vera.merge()
    assert torch.equal(vera.weight, expected)


def test_a_second_merge_changes_nothing() -> None:
    vera = wrapped(plain())
    vera.merge()
    once = vera.weight.clone()
    vera.merge()
    assert torch.equal(vera.weight, once)
    assert vera.merged == ("one",)


def test_a_merge_that_would_not_be_finite_is_found_before_any_change() -> None:
    vera = wrapped(plain(torch.float16))
    assert vera.merges_finite()
    weight = vera.weight.clone()
    vera.vera_lambda_b.one.data[3] = 1e6  # finite in float32, infinite in float16
    assert not vera.merges_finite()
    assert torch.equal(vera.weight, weight)


def test_a_merge_into_a_quantized_layer_is_refused() -> None:
    with pytest.raises(UsageError, match="a Quantized layer has no float weight"):
        wrapped(Quantized()).merge()


# --- layers that can be wrapped ------------------------------------------------------------------


class Transposed(nn.Module):
    """A layer that is called like a linear layer, with a square weight that is stored (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 4
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


@pytest.mark.parametrize(
    "module",
    [
        Transposed(),
        QuantLinear(4, 4),
        nn.Embedding(4, 4),
        nn.LayerNorm(4),
        nn.Conv1d(4, 4, 1),
        nn.Bilinear(4, 4, 4),
        nn.Sequential(nn.Linear(4, 4)),
        nn.MultiheadAttention(4, 1).out_proj,
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_layer_that_is_not_linear_is_refused(module: nn.Module) -> None:
    assert linear_of(module) is None
    with pytest.raises(UsageError, match=type(module).__name__):
        VeraLinear(module, SharedMatrix(), SharedMatrix())


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_every_subclass_of_a_linear_layer_is_adapted(kind: Any) -> None:
    class Own(kind):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.norm = nn.LayerNorm(4)

    assert linear_of(Own(4, 6)) == linear_of(kind(4, 6)) is not None


def test_a_merge_into_a_weight_of_another_shape_is_refused() -> None:
    vera = wrapped(plain())
    vera.base_layer.weight = nn.Parameter(torch.zeros(INPUTS, OUTPUTS))
    with pytest.raises(UsageError, match=r"no float weight of shape \(10, 12\)"):
        vera.merge()


def test_a_wrapped_layer_cannot_be_wrapped_again() -> None:
    assert linear_of(wrapped(plain())) is None


def test_the_wrapper_has_the_weight_and_bias_of_the_frozen_layer() -> None:
    vera = wrapped(plain())
    assert vera.weight is vera.base_layer.weight
    assert vera.bias is vera.base_layer.bias
    assert wrapped(Quantized()).bias is None
    assert (vera.in_features, vera.out_features) == (INPUTS, OUTPUTS)
    assert "active=('one',)" in repr(vera)


# --- torch's own machinery -----------------------------------------------------------------------


def test_the_layer_compiles_into_one_graph() -> None:
    vera = wrapped(plain(), "one", "two")
    compiled = torch.compile(vera, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, INPUTS)
    torch.testing.assert_close(compiled(x), vera(x))
    compiled(x).sum().backward()
    assert vera.vera_lambda_d.two.grad is not None


def test_a_copy_and_a_pickle_compute_the_same() -> None:
    vera = wrapped(plain())
    x = torch.randn(3, INPUTS)
    file = io.BytesIO()
    torch.save(vera, file)
    file.seek(0)
    for other in (copy.deepcopy(vera), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), vera(x))
        assert other._shared[0].one is not vera._shared[0].one


def test_shared_matrices_are_no_part_of_a_layer() -> None:
    assert set(wrapped(plain()).state_dict()) == {
        "base_layer.weight",
        "base_layer.bias",
        "vera_lambda_d.one",
        "vera_lambda_b.one",
    }


def like(matrix: SharedMatrix, x: torch.Tensor) -> torch.Tensor:
    return matrix.like("one", x, None, None)


def test_shared_matrices_follow_the_input_and_every_change_of_their_values() -> None:
    A = SharedMatrix()
    A.put("one", torch.randn(2, 3))
    here, there = torch.empty(0), torch.empty(0, device="meta")
    wide = torch.empty(0, dtype=torch.float64)
    assert like(A, here).data_ptr() == A.one.data_ptr()
    assert like(A, there).is_meta
    assert torch.equal(like(A, wide), A.one.double())
    A.one.mul_(2)  # the values change in place
    assert torch.equal(like(A, wide), A.one.double())
    A.load_state_dict({"one": torch.ones(2, 3)})
    assert torch.equal(like(A, wide), torch.ones(2, 3).double())
    assert torch.equal(A.like("one", wide, 1, 2), torch.ones(1, 2).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_goes_on_after_inference_mode(dtype: Any) -> None:
    vera = wrapped(plain(dtype))
    vera._shared[0].to(torch.float16)  # so each use needs a converted copy
    x = torch.randn(3, INPUTS, dtype=dtype)
    with torch.inference_mode():
        y = vera(x)
    again = vera(x)
    assert torch.equal(again, y)
    again.sum().backward()
    assert vera.vera_lambda_d.one.grad is not None


def test_shared_matrices_are_used_on_the_device_of_the_layer() -> None:
    vera = wrapped(plain())
    there = vera.to("meta")  # only the layer moves: the shared matrices belong to the model
    assert not any(matrix.one.is_meta for matrix in vera._shared)
    assert there(torch.empty(3, INPUTS, device="meta")).is_meta
    assert not any(matrix.one.is_meta for matrix in vera._shared)


def test_a_matrix_on_the_meta_device_is_refused() -> None:
    vera = wrapped(plain())
    for matrix in vera._shared:
        matrix.to("meta")
    with pytest.raises(SurroundingsError, match=r"adapter one is on the meta device"):
        vera(torch.randn(3, INPUTS))
    with pytest.raises(SurroundingsError, match="meta device"):
        wrapped(plain()).to("meta").merge()


def test_adapters_with_equal_matrices_share_one_tensor() -> None:
    A = SharedMatrix()
    values = torch.randn(2, 3)
    A.put("one", values.clone())
    A.put("two", values.clone())
    A.put("other", torch.randn(2, 3))
    assert A.one is A.two
    assert A.other is not A.one
    A.double()
    assert A.one is A.two
    assert A.one.dtype == torch.float64


def test_loading_values_for_an_adapter_does_not_change_the_other_adapter() -> None:
    A = SharedMatrix()
    A.put("one", torch.ones(2, 3))
    A.put("two", torch.ones(2, 3))
    A.load_state_dict({"one": torch.zeros(2, 3), "two": torch.ones(2, 3)})
    assert torch.equal(A.one, torch.zeros(2, 3))
    assert torch.equal(A.two, torch.ones(2, 3))
