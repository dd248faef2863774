"""to-lora writes the same delta as the adapter's, or refuses before any write."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from adapters import HIDDEN, OUTPUTS, RANK, good_adapter, good_tensors
from bases import LLAMA_SIZES, TENSORS, tiny_base
from commandline import Run
from folders import CONFIG_NAME, WEIGHTS, bytes_by_name, metadata, weights
from numpy.typing import NDArray

from vera_convert.adapter.lora_record import RECORD_KEY
from vera_convert.base.facts import BaseOptions
from vera_convert.errors import CheckpointError, SurroundingsError, UsageError
from vera_convert.hub.lookup import Location
from vera_convert.hub.repo_name import RepoName, parse_repo_name
from vera_convert.lora.conversion import LoraConversion, to_lora
from vera_convert.lora.engines import EngineName, engines
from vera_convert.lora.options import LoraOptions
from vera_convert.lora.record import lora_card

PREFIX = "base_model.model."
LLAMA = {"model_type": "llama", "num_attention_heads": 2, "num_hidden_layers": 2}
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_base(tmp_path / "base")


def converted(adapter: Path, base: Path | None, out: Path, **options: Any) -> LoraConversion:
    return to_lora(adapter, out, base=base, options=LoraOptions(**options))


def config_of(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_bytes())
    return document


def delta(tensors: dict[str, NDArray[Any]], module: str, width: int) -> NDArray[np.float64]:
    """Return the dense delta of VeRA in float64."""
    b, d = (tensors[f"{PREFIX}{module}.vera_lambda_{which}"].astype(np.float64) for which in "bd")
    A, B = (tensors[f"base_model.vera_{which}"].astype(np.float64) for which in "AB")
    product: NDArray[np.float64] = np.diag(b) @ B[: len(b)] @ np.diag(d) @ A[:, :width]
    return product


def product(folder: Path, module: str) -> NDArray[np.float64]:
    """Return the dense delta of a LoRA with a scaling of 1."""
    assert config_of(folder)["lora_alpha"] == config_of(folder)["r"]
    tensors = weights(folder)
    lora_A, lora_B = (
        tensors[f"{PREFIX}{module}.lora_{which}.weight"].astype(np.float64) for which in "AB"
    )
    assert lora_A.shape[0] == lora_B.shape[1] == config_of(folder)["r"]
    found: NDArray[np.float64] = lora_B @ lora_A
    return found


def modules() -> list[str]:
    return [f"model.layers.{n}.self_attn.{target}" for n in range(2) for target in OUTPUTS]


def errors(folder: Path, tensors: dict[str, NDArray[Any]]) -> list[float]:
    found = []
    for module in modules():
        expected = delta(tensors, module, HIDDEN)
        found.append(
            float(np.linalg.norm(product(folder, module) - expected) / np.linalg.norm(expected))
        )
    return found


# --- exact ---------------------------------------------------------------------------------------


def test_the_factors_equal_the_formula_bit_by_bit(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    converted(adapter, base, tmp_path / "out", check=True)
    own, found = weights(adapter), weights(tmp_path / "out")
    assert len(found) == 2 * len(modules())
    for module in modules():
        b, d = (own[f"{PREFIX}{module}.vera_lambda_{which}"].astype(np.float64) for which in "bd")
        B = own["base_model.vera_B"][: len(b)].astype(np.float64)
        lora_B = ((B * d) * b[:, None]).astype(np.float32)
        assert np.array_equal(found[f"{PREFIX}{module}.lora_B.weight"], lora_B)
        lora_A = found[f"{PREFIX}{module}.lora_A.weight"]
        assert lora_A.tobytes() == own["base_model.vera_A"][:, :HIDDEN].tobytes()


def test_the_delta_equals_the_adapter_s(adapter: Path, base: Path, tmp_path: Path) -> None:
    result = converted(adapter, base, tmp_path / "out")
    assert max(errors(tmp_path / "out", good_tensors())) < 1e-7
    assert result.measured.worst == pytest.approx(
        max(errors(tmp_path / "out", good_tensors())), rel=0.2
    )


def test_every_engine_can_read_the_config(adapter: Path, base: Path, tmp_path: Path) -> None:
    converted(adapter, base, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == RANK
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == "example/tiny-llama"
    assert config["task_type"] == "CAUSAL_LM"
    assert (config["bias"], config["rank_pattern"], config["alpha_pattern"]) == ("none", {}, {})
    assert config["use_rslora"] is config["use_dora"] is config["fan_in_fan_out"] is False


def test_the_same_input_gives_the_same_bytes(adapter: Path, base: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        converted(adapter, base, tmp_path / name)
    assert bytes_by_name(tmp_path / "one") == bytes_by_name(tmp_path / "two")


def test_a_stripped_adapter_gives_the_same_factors(tmp_path: Path) -> None:
    for name, stripped in (("embedded", False), ("stripped", True)):
        adapter = good_adapter(tmp_path / f"{name}-adapter", stripped=stripped)
        wide = {
            "model.layers.0.mlp.up_proj.weight": None,
            "model.layers.1.mlp.up_proj.weight": None,
        }
        small = tiny_base(tmp_path / f"{name}-base", tensors=wide)
        converted(adapter, small, tmp_path / name)
    one, other = weights(tmp_path / "embedded"), weights(tmp_path / "stripped")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_projections_of_16_bits_are_widened_first(base: Path, tmp_path: Path) -> None:
    narrow = {
        name: tensor.astype(ml_dtypes.bfloat16)
        for name, tensor in good_tensors().items()
        if "vera_A" in name or "vera_B" in name
    }
    adapter = good_adapter(tmp_path / "narrow", tensors=narrow)
    converted(adapter, base, tmp_path / "out")
    assert max(errors(tmp_path / "out", {**good_tensors(), **narrow})) < 1e-7


def test_a_row_that_every_layer_multiplies_by_zero_is_left_out(base: Path, tmp_path: Path) -> None:
    tensors = good_tensors()
    for name, tensor in tensors.items():
        if name.endswith("lambda_d"):
            tensor[1] = 0
    tensors[f"{PREFIX}{Q}.vera_lambda_d"][2] = 0
    adapter = good_adapter(tmp_path / "zeros", tensors=tensors)
    result = converted(adapter, base, tmp_path / "out")
    assert result.plan.rank == RANK - 1
    assert not result.plan.reduced
    assert max(errors(tmp_path / "out", tensors)) < 1e-7
    lora_A = {weights(tmp_path / "out")[f"{PREFIX}{m}.lora_A.weight"].tobytes() for m in modules()}
    assert len(lora_A) == 1


def test_an_untrained_adapter_becomes_a_lora_of_zeros(base: Path, tmp_path: Path) -> None:
    zeros = {n: t * 0 for n, t in good_tensors().items() if n.endswith("lambda_b")}
    result = converted(good_adapter(tmp_path / "new", tensors=zeros), base, tmp_path / "out")
    assert result.measured.worst == 0
    assert not product(tmp_path / "out", Q).any()


def test_the_sizes_of_a_known_model_are_taken_from_its_config_alone(
    adapter: Path, tmp_path: Path
) -> None:
    config = {"model_type": "llama", **LLAMA_SIZES}
    (tmp_path / "config-alone").mkdir()
    (tmp_path / "config-alone" / CONFIG_NAME.replace("adapter_", "")).write_text(json.dumps(config))
    converted(adapter, tmp_path / "config-alone", tmp_path / "out")
    assert max(errors(tmp_path / "out", good_tensors())) < 1e-7
    assert config_of(tmp_path / "out")["target_modules"] == ["q_proj", "v_proj"]


def test_without_a_base_the_refusal_asks_for_the_base(adapter: Path, tmp_path: Path) -> None:
    missing = r"tiny-llama@main is not in the local cache .*\. Pass the base with --base\.$"
    with pytest.raises(SurroundingsError, match=missing):
        converted(adapter, None, tmp_path / "out")
    nameless = good_adapter(tmp_path / "nameless", base_model_name_or_path=None)
    with pytest.raises(UsageError, match=r"config names no base\. Pass the base with --base\.$"):
        converted(nameless, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "limit"), [("bf16", 4e-3), ("float16", 6e-4)])
def test_a_16_bit_lora_has_the_reported_error(
    dtype: str, limit: float, adapter: Path, base: Path, tmp_path: Path
) -> None:
    result = converted(adapter, base, tmp_path / "out", dtype=dtype)
    found = errors(tmp_path / "out", good_tensors())
    assert 0 < max(found) < limit
    measured = [result.measured.errors[module] for module in modules()]
    assert measured == pytest.approx(found, rel=0.02)
    assert {tensor.dtype.itemsize for tensor in weights(tmp_path / "out").values()} == {2}


def test_float16_is_balanced_so_that_a_small_b_keeps_its_digits(base: Path, tmp_path: Path) -> None:
    small = {n: t * 1e-5 for n, t in good_tensors().items() if n.endswith("lambda_b")}
    result = converted(
        good_adapter(tmp_path / "new", tensors=small), base, tmp_path / "out", dtype="float16"
    )
    assert max(errors(tmp_path / "out", {**good_tensors(), **small})) < 6e-4
    assert "V711" not in {finding.code for finding in result.findings}


def test_values_that_float16_rounds_to_zero_are_reported(base: Path, tmp_path: Path) -> None:
    uneven = {n: t.copy() for n, t in good_tensors().items() if n.endswith("lambda_b")}
    for tensor in uneven.values():
        tensor[1:] *= 1e-9
    result = converted(
        good_adapter(tmp_path / "new", tensors=uneven), base, tmp_path / "out", dtype="float16"
    )
    assert "V711" in {finding.code for finding in result.findings}


def test_a_value_too_large_for_the_dtype_is_refused(base: Path, tmp_path: Path) -> None:
    tensors = good_tensors()
    tensors[f"{PREFIX}{V}.vera_lambda_b"] *= np.float32(1e12)
    adapter = good_adapter(tmp_path / "large", tensors=tensors)
    with pytest.raises(CheckpointError, match=r"V706 .*layers.1.self_attn.v_proj"):
        converted(adapter, base, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    converted(adapter, base, tmp_path / "out")
    assert max(errors(tmp_path / "out", tensors)) < 1e-7


# --- a lower rank --------------------------------------------------------------------------------


def test_a_lower_rank_is_the_best_approximation_and_reports_its_errors(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    result = converted(adapter, base, tmp_path / "out", rank=3)
    found = errors(tmp_path / "out", good_tensors())
    assert [result.measured.errors[m] for m in modules()] == pytest.approx(found, rel=1e-6)
    for name, tensor in weights(tmp_path / "out").items():
        if name.endswith("lora_A.weight"):  # the sign of a singular vector is arbitrary
            assert (tensor[range(3), np.abs(tensor).argmax(axis=1)] > 0).all()
    for module, error in zip(modules(), found, strict=True):
        values = np.linalg.svd(delta(good_tensors(), module, HIDDEN), compute_uv=False)
        best = np.sqrt(np.square(values[3:]).sum() / np.square(values).sum())
        assert error == pytest.approx(best, abs=1e-6)


def test_a_layer_that_uses_few_rows_keeps_these_rows_exactly(base: Path, tmp_path: Path) -> None:
    tensors = good_tensors()
    tensors[f"{PREFIX}{Q}.vera_lambda_d"][[0, 2]] = 0
    adapter = good_adapter(tmp_path / "few", tensors=tensors)
    converted(adapter, base, tmp_path / "out", rank=3)
    found = dict(zip(modules(), errors(tmp_path / "out", tensors), strict=True))
    assert found[Q] < 1e-7
    assert found[V] > 1e-3
    own = weights(adapter)["base_model.vera_A"][[1, 3], :HIDDEN]
    lora_A = weights(tmp_path / "out")[f"{PREFIX}{Q}.lora_A.weight"]
    assert np.array_equal(lora_A[:2], own)
    assert not lora_A[2].any()


def test_the_adapter_s_rank_or_a_higher_rank_gives_the_exact_lora(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    converted(adapter, base, tmp_path / "exact")
    for rank in (RANK, 64):
        result = converted(adapter, base, tmp_path / str(rank), rank=rank)
        assert result.plan.rank == RANK
        assert (tmp_path / str(rank) / WEIGHTS).read_bytes()[-500:] == (
            tmp_path / "exact" / WEIGHTS
        ).read_bytes()[-500:]


@pytest.mark.parametrize("wanted", [0.0, 0.05, 0.3, 0.6])
def test_max_error_holds_for_every_layer_with_the_smallest_rank(
    wanted: float, adapter: Path, base: Path, tmp_path: Path
) -> None:
    result = converted(adapter, base, tmp_path / "out", max_error=wanted, accept_error=True)
    assert max(errors(tmp_path / "out", good_tensors())) <= wanted + 1e-6
    if result.plan.rank > 1:
        rank = result.plan.rank - 1
        lower = converted(adapter, base, tmp_path / "low", rank=rank, accept_error=True)
        assert lower.measured.worst > wanted


def test_a_large_error_is_refused_unless_it_is_accepted(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"V707 .*at rank 1 the relative error is 0"):
        converted(adapter, base, tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()
    assert converted(adapter, base, tmp_path / "out", rank=1, accept_error=True).written


def test_rank_and_max_error_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        LoraOptions(rank=2, max_error=0.1)


# --- engines -------------------------------------------------------------------------------------


def test_the_table_has_every_engine() -> None:
    assert [*engines()] == [*EngineName]


def high_rank(folder: Path, rank: int, **config: Any) -> Path:
    """Write an adapter with a higher rank than every side of its layers."""
    values = np.random.default_rng(3)
    tensors = good_tensors()
    for name in tensors:
        if name.endswith("lambda_d"):
            tensors[name] = values.normal(size=rank).astype(np.float32)
    tensors["base_model.vera_A"] = values.normal(size=(rank, 16)).astype(np.float32)
    tensors["base_model.vera_B"] = values.normal(size=(16, rank)).astype(np.float32)
    return good_adapter(folder, tensors=tensors, r=rank, **config)


def test_a_rank_above_both_sides_of_a_layer_is_converted(base: Path, tmp_path: Path) -> None:
    adapter = high_rank(tmp_path / "adapter", 24)
    converted(adapter, base, tmp_path / "out")
    assert max(errors(tmp_path / "out", weights(adapter))) < 1e-7
    converted(adapter, base, tmp_path / "cut", rank=16)
    assert max(errors(tmp_path / "cut", weights(adapter))) < 1e-6


def test_a_rank_that_vllm_does_not_serve_is_refused_with_an_exact_remedy(
    base: Path, tmp_path: Path
) -> None:
    adapter = high_rank(tmp_path / "adapter", 600)
    with pytest.raises(CheckpointError, match=r"V701 .*600.*512.*--rank 16 is exact") as caught:
        converted(adapter, base, tmp_path / "out", engine="vllm")
    assert [finding.code for finding in caught.value.findings] == ["V701"]
    result = converted(adapter, base, tmp_path / "out", engine="vllm", rank=16)
    assert max(errors(tmp_path / "out", weights(adapter))) < 1e-6
    assert "--max-lora-rank 16 " in result.server_arguments


def test_without_an_exact_remedy_the_highest_rank_and_its_error_are_proposed(
    tmp_path: Path,
) -> None:
    side, rank, target = 640, 600, "model.layers.0.self_attn.q_proj"
    values = np.random.default_rng(4)
    tensors: dict[str, Any] = dict.fromkeys(good_tensors())
    for name, shape in {
        f"{PREFIX}{target}.vera_lambda_b": (side,),
        f"{PREFIX}{target}.vera_lambda_d": (rank,),
        "base_model.vera_A": (rank, side),
        "base_model.vera_B": (side, rank),
    }.items():
        tensors[name] = values.normal(size=shape).astype(np.float32)
    adapter = good_adapter(tmp_path / "adapter", tensors=tensors, r=rank, target_modules=["q_proj"])
    shapes: dict[str, Any] = {**dict.fromkeys(TENSORS), f"{target}.weight": (side, side)}
    base = tiny_base(tmp_path / "base", tensors=shapes)
    with pytest.raises(CheckpointError, match=r"V701 .*600.*512.* --rank 512 --dry-run"):
        converted(adapter, base, tmp_path / "out", engine="vllm")
    low = converted(adapter, base, tmp_path / "out", engine="vllm", rank=512, dry_run=True)
    assert 0 < low.measured.worst < 0.5
    assert "--max-lora-rank 512 " in low.server_arguments


@pytest.mark.parametrize(("rank", "served"), [(4, 8), (8, 8), (40, 64), (257, 320), (512, 512)])
def test_the_proposed_max_lora_rank_is_a_value_that_vllm_allows(rank: int, served: int) -> None:
    assert engines()[EngineName.VLLM].server_rank(rank) == served


def test_a_rank_above_the_fast_kernels_of_tgi_is_a_note(base: Path, tmp_path: Path) -> None:
    adapter = high_rank(tmp_path / "adapter", 160)
    result = converted(adapter, base, tmp_path / "out", engine="tgi")
    assert {finding.code for finding in result.findings} == {"V710"}


def test_tgi_needs_every_layer_of_a_kind_and_zeros_fill_the_gap(base: Path, tmp_path: Path) -> None:
    first = {n: None for n in good_tensors() if "layers.0." in n}
    adapter = good_adapter(tmp_path / "half", tensors=first, layers_to_transform=[1])
    with pytest.raises(CheckpointError, match=r"V704 model\.layers\.0\.self_attn\.q_proj"):
        converted(adapter, base, tmp_path / "out", engine="tgi")
    result = converted(adapter, base, tmp_path / "out", engine="tgi", fill_layers=True)
    assert result.plan.filled == 2
    assert not product(tmp_path / "out", Q).any()
    expected = delta(good_tensors(), V, HIDDEN)
    assert np.allclose(product(tmp_path / "out", V), expected, atol=1e-6)
    config = config_of(tmp_path / "out")
    assert config["layers_to_transform"] is None
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert weights(tmp_path / "out")[f"{PREFIX}{Q}.lora_A.weight"].shape == (RANK, HIDDEN)


def test_sglang_needs_q_and_v_together_and_zeros_fill_the_gap(base: Path, tmp_path: Path) -> None:
    without = {n: None for n in good_tensors() if "v_proj" in n}
    adapter = good_adapter(tmp_path / "q", tensors=without, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"V704 model\.layers\.0\.self_attn\.v_proj"):
        converted(adapter, base, tmp_path / "out", engine="sglang")
    converted(adapter, base, tmp_path / "out", engine="sglang", fill_layers=True)
    assert weights(tmp_path / "out")[f"{PREFIX}{V}.lora_B.weight"].shape == (8, RANK)
    assert not product(tmp_path / "out", V).any()
    assert converted(adapter, base, tmp_path / "peft").written


def test_a_layer_that_the_engine_does_not_look_up_is_refused(tmp_path: Path) -> None:
    def renamed(name: str) -> str:
        return name.replace("model.layers", "transformer.h")

    tensors: dict[str, Any] = dict.fromkeys(good_tensors())
    tensors |= {renamed(name): tensor for name, tensor in good_tensors().items()}
    adapter = good_adapter(tmp_path / "other", tensors=tensors)
    shapes: dict[str, Any] = dict.fromkeys(TENSORS)
    shapes |= {renamed(name): shape for name, shape in TENSORS.items()}
    base = tiny_base(tmp_path / "base", tensors=shapes, config={"model_type": "other"})
    for engine in ("sglang", "tgi"):
        with pytest.raises(CheckpointError, match=r"V705 transformer\.h\.0\.self_attn\.q_proj"):
            converted(adapter, base, tmp_path / "out", engine=engine)
    assert converted(adapter, base, tmp_path / "out", engine="vllm").written


def with_head(folder: Path, head: str = "score", **more: NDArray[Any]) -> Path:
    tensors = {f"{PREFIX}{head}.weight": np.ones((3, HIDDEN), np.float32)}
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in more.items()}
    saved = [head.partition(".")[0]] if head else None
    return good_adapter(folder, tensors=tensors, modules_to_save=saved, task_type=None)


def test_a_trained_head_is_kept_for_peft_with_a_warning(base: Path, tmp_path: Path) -> None:
    bias = {"classifier.out_proj.bias": np.ones(3, np.float32)}
    adapter = with_head(tmp_path / "head", "classifier.dense", **bias)
    result = converted(adapter, base, tmp_path / "out")
    assert "V709" in {finding.code for finding in result.findings}
    found = weights(tmp_path / "out")
    for name in ("classifier.dense.weight", "classifier.out_proj.bias"):
        assert np.array_equal(found[PREFIX + name], weights(adapter)[PREFIX + name])
    assert config_of(tmp_path / "out")["modules_to_save"] == ["classifier"]


@pytest.mark.parametrize("engine", ["sglang", "tgi"])
def test_a_head_that_the_engine_drops_is_refused_or_left_out(
    engine: str, base: Path, tmp_path: Path
) -> None:
    adapter = with_head(tmp_path / "head")
    with pytest.raises(CheckpointError, match=r"V702 score: .* --drop-head"):
        converted(adapter, base, tmp_path / "out", engine=engine)
    result = converted(adapter, base, tmp_path / "out", engine=engine, drop_head=True)
    assert "V708" in {finding.code for finding in result.findings}
    assert not [name for name in weights(tmp_path / "out") if "score" in name]
    assert config_of(tmp_path / "out")["modules_to_save"] is None


def test_vllm_takes_a_plain_classifier_and_refuses_a_nested_one(base: Path, tmp_path: Path) -> None:
    assert converted(with_head(tmp_path / "h"), base, tmp_path / "plain", engine="vllm").written
    nested = with_head(tmp_path / "nested", "classifier.dense")
    with pytest.raises(CheckpointError, match=r"V702"):
        converted(nested, base, tmp_path / "out", engine="vllm")


def test_trained_biases_are_kept_for_peft_and_refused_by_servers(tmp_path: Path) -> None:
    name = f"{Q}.base_layer.bias"
    adapter = good_adapter(
        tmp_path / "bias", tensors={PREFIX + name: np.ones(16, np.float32)}, bias="vera_only"
    )
    base = tiny_base(tmp_path / "base", tensors={f"{Q}.bias": (16,)})
    converted(adapter, base, tmp_path / "out")
    assert config_of(tmp_path / "out")["bias"] == "lora_only"
    assert PREFIX + name in weights(tmp_path / "out")
    for engine in ("vllm", "sglang", "tgi"):
        with pytest.raises(CheckpointError, match=r"V703"):
            converted(adapter, base, tmp_path / engine, engine=engine)
    converted(adapter, base, tmp_path / "less", engine="vllm", drop_head=True)
    assert config_of(tmp_path / "less")["bias"] == "none"


# --- files ---------------------------------------------------------------------------------------


def test_other_files_of_the_adapter_are_copied_and_the_card_is_new(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    (adapter / "README.md").write_text("of the VeRA adapter")
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    (adapter / "optimizer.pt").write_bytes(b"state")
    converted(adapter, base, tmp_path / "out", rank=3)
    assert {*bytes_by_name(tmp_path / "out")} == {
        "README.md",
        CONFIG_NAME,
        WEIGHTS,
        "chat_template.jinja",
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "vera-convert to-lora adapter OUT --base MODEL --rank 3\n" in card
    assert "an approximation of\nthe VeRA adapter" in card
    assert str(tmp_path) not in card


def test_the_command_of_the_card_names_repos_by_commit_and_subfolder() -> None:
    adapter = SimpleNamespace(config=SimpleNamespace(base_model_name_or_path="org/base", r=4))
    found: Any = SimpleNamespace(
        location=Location("org/vera", None, "org/vera", "a" * 40, "one"),
        adapter=adapter,
        options=LoraOptions(rank=3),
        base=BaseOptions("org/base", revision="main", key_map=[("a", "b")]),
    )
    plan: Any = SimpleNamespace(rank=3, reduced=True)
    base = Location("org/base", None, "org/base", "b" * 40)
    command = (
        f"vera-convert to-lora org/vera@{'a' * 40}/one OUT --base org/base@{'b' * 40} --rank 3 "
        "--key-map a=b\n"
    )
    assert command in lora_card(found, plan, WEIGHTS, base=base)
    named = parse_repo_name(f"org/vera@{'a' * 40}/one", bare=False)
    assert named == RepoName("org/vera", "a" * 40, "one")


@pytest.mark.parametrize(("engine", "name"), [("vllm", WEIGHTS), ("mlx", "adapters.safetensors")])
def test_the_card_names_the_file_and_the_library_of_the_format(
    engine: str, name: str, adapter: Path, base: Path, tmp_path: Path
) -> None:
    converted(adapter, base, tmp_path / "out", engine=engine, rank=99, projections="file")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"library_name: {'mlx' if engine == 'mlx' else 'peft'}\n" in card
    assert f"The metadata of `{name}`" in card
    assert f"--for {engine} --rank 99 --projections file\n" in card
    assert "the same change of the weights as" in card


def test_other_files_of_the_adapter_count_as_needed_space(
    adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (adapter / "notes.txt").write_bytes(bytes(1_000_000))
    usage = SimpleNamespace(free=900_000)
    monkeypatch.setattr("vera_convert.lora.writing.shutil.disk_usage", lambda _: usage)
    with pytest.raises(SurroundingsError, match="900,000 are free"):
        converted(adapter, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    usage.free = 1_100_000
    assert converted(adapter, base, tmp_path / "out").written


def test_the_weights_record_the_adapter(adapter: Path, base: Path, tmp_path: Path) -> None:
    converted(adapter, base, tmp_path / "out", dtype="bfloat16")
    record = json.loads(metadata(tmp_path / "out")[RECORD_KEY])
    assert record["source"] == {"folder": "adapter"}
    assert len(record["source_sha256"]) == 64
    assert record["options"]["dtype"] == "bfloat16"
    assert 1e-4 < float(record["relative_error"]) < 1e-2
    assert str(tmp_path) not in metadata(tmp_path / "out")[RECORD_KEY]


def test_a_dry_run_measures_and_writes_nothing(adapter: Path, base: Path, tmp_path: Path) -> None:
    result = converted(adapter, base, tmp_path / "out", rank=3, dry_run=True)
    assert not (tmp_path / "out").exists()
    assert result.measured.errors.keys() == {*modules()}
    real = converted(adapter, base, tmp_path / "out", rank=3)
    assert real.measured.errors == result.measured.errors


@pytest.mark.parametrize(
    ("engine", "name"),
    [("peft", WEIGHTS), ("mlx", "adapters.safetensors"), ("gguf", "adapter.gguf")],
)
def test_a_dry_run_states_the_size_of_the_file(
    engine: str, name: str, adapter: Path, tmp_path: Path
) -> None:
    if engine == "gguf":
        pytest.importorskip("gguf")
    base = tiny_base(tmp_path / "base", config=LLAMA)
    result = converted(adapter, base, tmp_path / "out", engine=engine, dry_run=True)
    real = converted(adapter, base, tmp_path / "out", engine=engine, check=True)
    assert result.size == real.size == (tmp_path / "out" / name).stat().st_size


def test_the_report_uses_the_layer_names_of_the_file(
    run: Run, adapter: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    base = tiny_base(tmp_path / "base", config=LLAMA)
    arguments = ("to-lora", adapter, tmp_path / "out", "--base", base, "--for")
    ended = run(*arguments, "gguf", "--dry-run")
    assert f"named as in llama.cpp: blk.0.attn_q for {Q}" in " ".join(ended.out.split())
    document = json.loads(run(*arguments, "gguf", "--dry-run", "--json").out)
    assert {layer["name"] for layer in document["layers"]} == {
        f"blk.{number}.attn_{kind}" for number in range(2) for kind in "qv"
    }
    assert "named as in the base's files\n" in run(*arguments, "vllm", "--dry-run").out


def test_a_gguf_that_reads_back_with_other_bytes_is_not_published(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf")
    base = tiny_base(tmp_path / "base", config=LLAMA)
    write = gguf.GGUFWriter.write_tensor_data
    spoilt = lambda writer, values: write(writer, values ^ values.dtype.type(1))  # noqa: E731
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", spoilt)
    with pytest.raises(SurroundingsError, match=r"adapter\.gguf"):
        converted(adapter, base, tmp_path / "out", engine="gguf", check=True)
    assert not (tmp_path / "out").exists()


def test_force_replaces_only_a_lora_of_this_command(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    converted(adapter, base, tmp_path / "out")
    with pytest.raises(UsageError, match="exists"):
        converted(adapter, base, tmp_path / "out")
    converted(adapter, base, tmp_path / "out", rank=3, force=True)
    assert config_of(tmp_path / "out")["r"] == 3
    converted(adapter, base, tmp_path / "out", engine="mlx", force=True)
    assert "adapters.safetensors" in bytes_by_name(tmp_path / "out")
    assert WEIGHTS not in bytes_by_name(tmp_path / "out")
    (tmp_path / "out" / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes())
    with pytest.raises(UsageError, match=f"does not write.* {WEIGHTS}"):
        converted(adapter, base, tmp_path / "out", force=True)
    other = good_adapter(tmp_path / "other")
    with pytest.raises(UsageError, match="is no output of this command"):
        converted(adapter, base, other, force=True)


def test_layers_to_transform_of_the_config_is_kept(base: Path, tmp_path: Path) -> None:
    first = {n: None for n in good_tensors() if "layers.0." in n}
    adapter = good_adapter(tmp_path / "half", tensors=first, layers_to_transform=[1])
    converted(adapter, base, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["layers_to_transform"] == [1]
    assert config["target_modules"] == ["q_proj", "v_proj"]


def test_each_adapter_in_a_folder_becomes_a_lora_with_its_own_fields(
    base: Path, tmp_path: Path
) -> None:
    (tmp_path / "many").mkdir()
    for name, size in (("first", 1.0), ("second", 2.0)):
        tensors = {
            key: tensor * np.float32(size)
            for key, tensor in good_tensors().items()
            if key.endswith("lambda_b")
        }
        fields: dict[str, Any] = {"revision": f"v-{name}", "task_type": "CAUSAL_LM"}
        adapter = good_adapter(tmp_path / "many" / name, tensors=tensors, **fields)
        converted(adapter, base, tmp_path / name)
        assert fields.items() <= config_of(tmp_path / name).items()
        assert max(errors(tmp_path / name, {**good_tensors(), **tensors})) < 1e-7


@pytest.mark.parametrize("targets", [r".*\.(q|v)_proj", None], ids=["regex", "null"])
def test_targets_that_are_no_list_become_the_shortest_list(
    targets: str | None, base: Path, tmp_path: Path
) -> None:
    adapter = good_adapter(tmp_path / "regex", target_modules=targets)
    converted(adapter, base, tmp_path / "out")
    assert config_of(tmp_path / "out")["target_modules"] == ["q_proj", "v_proj"]


# --- the command ---------------------------------------------------------------------------------


def test_the_command_reports_the_written_lora(
    run: Run, adapter: Path, base: Path, tmp_path: Path, schema_errors: Any
) -> None:
    ended = run("to-lora", adapter, tmp_path / "out", "--base", base, "--for", "vllm")
    assert ended.status == 0, ended.err
    assert re.search(r"^rank +4, exact$", ended.out, re.MULTILINE)
    assert f"--enable-lora --max-lora-rank 8 --lora-modules vera={tmp_path / 'out'}" in ended.out
    ended = run(
        *("to-lora", adapter, tmp_path / "low", "--base", base),
        *("--rank", 3, "--dtype", "bf16", "--json", "--dry-run"),
    )
    document = json.loads(ended.out)
    assert schema_errors("lora", document) == []
    assert (document["rank"], document["exact"], document["dtype"]) == (3, False, "bfloat16")


def test_a_base_that_is_not_found_is_reported_as_by_merge(
    run: Run, adapter: Path, tmp_path: Path
) -> None:
    ended = run("to-lora", adapter, tmp_path / "out", "--offline")
    assert ended.status == 3
    assert ended.err.endswith("Pass the base with --base.\n")
    assert run("merge", adapter, tmp_path / "out", "--offline") == ended
