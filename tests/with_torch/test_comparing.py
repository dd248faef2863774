"""Compare whole models: right merges pass, wrong merges fail, hostile folders are safe."""

from __future__ import annotations

import gc
import json
import math
import shutil
import socket
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torchmodels
import transformers
from releases import needs
from safetensors.numpy import load_file, save_file
from torchmodels import configured, job, saved, trained

from vera_convert import (
    AdapterSpec,
    BaseOptions,
    CheckpointError,
    MergeOptions,
    SurroundingsError,
    Tied,
    UsageError,
    merge,
    strip,
)
from vera_convert.delta import delta, merged
from vera_convert.verification.model_comparison import ModelComparison
from vera_convert.verification.verify import text_lines
from vera_convert.with_torch import VeraConfig, VeraModel, build, compare, runs, samples
from vera_convert.with_torch.compare import compare_models

Tensors = dict[str, Any]
WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write `base`, `adapter` and `merged` of a kind in a dtype, which tests must not change."""
    root = tmp_path_factory.mktemp("shelf")

    def made(kind: str, dtype: str = "float32") -> Path:
        folder = root / f"{kind}-{dtype}"
        if not folder.exists():
            base = saved(torchmodels.built(kind, dtype), folder / "base")
            adapter = trained(base, folder / "adapter", kind)
            merge(adapter, folder / "merged", base=base)
        return folder

    return made


def compared(
    base: Path, found: Path, *adapters: Path | tuple[Path, float], **options: Any
) -> ModelComparison:
    return compare_models(job(base, found, *adapters, **options))


def changed(folder: Path, copy: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Copy a model, and change tensors of the copy."""
    shutil.copytree(folder, copy)
    save_file(change(load_file(folder / WEIGHTS)), copy / WEIGHTS, {"format": "pt"})
    return copy


# --- correct merges ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, "float32") for kind in torchmodels.KINDS),
        *((kind, "bfloat16") for kind in ("llama", "gpt2", "t5")),
        ("llama", "float64"),
        ("llama", "float16"),
        ("t5", "float16"),  # transformers keeps some layers of T5 in float32
    ],
)
def test_a_correct_merge_passes(kind: str, dtype: str, shelf: Callable[..., Path]) -> None:
    folder = shelf(kind, dtype)
    found = compared(folder / "base", folder / "merged", folder / "adapter")
    assert found.passed, found
    assert found.reason == ""
    assert found.model_class == type(torchmodels.built(kind)).__name__
    assert (found.dtype, found.samples) == (dtype, 4)
    assert found.tokens == (4 if kind in ("bert", "vit") else 48)
    assert found.remerged_difference < found.threshold_remerged / 4  # the documented margin
    assert found.effect > 10 * found.threshold_remerged
    assert found.kl is not None
    assert found.top1 is not None
    assert found.threshold_kl is not None
    assert found.kl < found.threshold_kl
    assert found.threshold_top1 is not None
    assert found.top1 >= found.threshold_top1
    # The limit must be near the rounding of this very model, not a guess for all models.
    noise = found.threshold_remerged
    assert found.largest_difference <= found.threshold_difference
    assert found.threshold_difference - noise <= 2 * found.largest_difference + noise


def test_comparing_models_prints_nothing(
    shelf: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shelf("llama")
    capfd.readouterr()
    compared(folder / "base", folder / "merged", folder / "adapter")
    assert capfd.readouterr() == ("", "")


def test_a_merge_of_several_adapters_with_weights_passes(
    shelf: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shelf("llama", "bfloat16")
    base, one = folder / "base", folder / "adapter"
    two = trained(base, tmp_path / "two", "llama", target_modules=["k_proj", "q_proj"], r=8)
    options = MergeOptions(weight=0.5, add=[AdapterSpec(two, -0.75)])
    merge(one, tmp_path / "merged", base=base, options=options)
    assert compared(base, tmp_path / "merged", (one, 0.5), (two, -0.75)).passed
    for wrong in ([(one, 0.5)], [(one, 0.45), (two, -0.75)]):
        assert not compared(base, tmp_path / "merged", *wrong).passed


@pytest.mark.parametrize("tied", Tied)
def test_a_merge_with_a_tied_head_passes(
    tied: Tied, shelf: Callable[..., Path], tmp_path: Path
) -> None:
    base = shelf("gpt2") / "base"
    adapter = trained(base, tmp_path / "adapter", "gpt2", target_modules=["c_attn", "lm_head"])
    merge(adapter, tmp_path / "merged", base=base, options=MergeOptions(tied=tied))
    found = compared(base, tmp_path / "merged", adapter, tied=tied)
    assert (found.passed, found.wrapped) == (True, tied is Tied.UNTIE)
    other = next(each for each in Tied if each is not tied)
    assert not compared(base, tmp_path / "merged", adapter, tied=other).passed


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_a_merge_into_another_dtype_passes_the_run(
    dtype: str, shelf: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shelf("llama", "bfloat16")
    merge(
        folder / "adapter", tmp_path / "m", base=folder / "base", options=MergeOptions(dtype=dtype)
    )
    found = compared(folder / "base", tmp_path / "m", folder / "adapter", dtype=dtype)
    assert found.passed, found
    assert found.dtype == ("float16" if dtype == "float16" else "float32")


def test_drawn_projections_are_rounded_as_the_merge_rounded_them(
    shelf: Callable[..., Path], tmp_path: Path
) -> None:
    base = shelf("llama") / "base"
    adapter = trained(base, tmp_path / "adapter", "llama", save_projection=False, r=64)
    base_options = BaseOptions(str(base), dtype="bfloat16")
    merge(adapter, tmp_path / "merged", base=base_options)
    assert compared(base, tmp_path / "merged", adapter, base_dtype="bfloat16").passed
    assert not compared(base, tmp_path / "merged", adapter).passed


def test_a_merge_with_renamed_layers_passes(shelf: Callable[..., Path], tmp_path: Path) -> None:
    folder = shelf("llama")
    adapter = tmp_path / "adapter"
    shutil.copytree(folder / "adapter", adapter)
    tensors = load_file(adapter / ADAPTER)
    renamed = {name.replace(".model.layers.", ".my.layers."): t for name, t in tensors.items()}
    save_file(renamed, adapter / ADAPTER)
    pairs = (("nobody", "model"), ("my", "model"))
    base_options = BaseOptions(str(folder / "base"), key_map=pairs)
    merge(adapter, tmp_path / "merged", base=base_options)
    assert compared(folder / "base", tmp_path / "merged", adapter, key_map=pairs).passed
    with pytest.raises(CheckpointError, match="no linear layers"):
        compared(folder / "base", tmp_path / "merged", adapter)


def test_a_merge_with_a_head_that_the_base_lacks_passes(
    shelf: Callable[..., Path], tmp_path: Path
) -> None:
    """These adapters are trained on a class with a head, which the config cannot name."""
    classifier = shelf("bert")
    encoder = transformers.BertForMaskedLM.from_pretrained(classifier / "base")
    encoder.save_pretrained(tmp_path / "base")
    adapter = classifier / "adapter"
    merge(adapter, tmp_path / "merged", base=tmp_path / "base")
    found = compared(tmp_path / "base", tmp_path / "merged", adapter)
    assert found.passed, found
    assert found.model_class == "BertForSequenceClassification"


def test_a_merge_of_the_trained_adapter_passes(
    minilm: Path, minilm_model: Path, tmp_path: Path
) -> None:
    adapter = minilm / "save_projection_false"
    merge(adapter, tmp_path / "merged", base=minilm_model)
    text = tmp_path / "text"
    text.write_text("\n\nThe plot is not dull.\n \n" + "word " * 9999 + "\nIt is.\n")
    found = compared(minilm_model, tmp_path / "merged", adapter, text=text)
    assert found.passed, found
    assert (found.model_class, found.samples) == ("BertModel", 3)
    assert found.tokens == 8 + 1 + 64 + 1 + 5 + 1  # each output with its pooled state
    assert (found.kl, found.top1) == (None, None)
    assert (found.threshold_kl, found.threshold_top1) == (None, None)
    wrong = changed(tmp_path / "merged", tmp_path / "wrong", partial(left_out, minilm_model))
    assert not compared(minilm_model, wrong, adapter, text=text).passed


# --- wrong merges --------------------------------------------------------------------------------


def adapted(base: Tensors, adapter: Path) -> Mapping[str, tuple[Any, Any]]:
    """Return the vectors d and b of each adapted weight of a base."""
    stored = load_file(adapter / ADAPTER)
    return {
        name: (stored[f"{key}_d"], stored[f"{key}_b"])
        for name in base
        if (key := f"{PREFIX}{name.removesuffix('.weight')}.vera_lambda") + "_d" in stored
    }


def made_otherwise(
    base: Path, adapter: Path, found: Tensors, change: Callable[..., Any]
) -> Tensors:
    """Merge again, with deltas that `change` computes from A, B, d, b and the inputs."""
    stored, weights = load_file(adapter / ADAPTER), load_file(base / WEIGHTS)
    A, B = (stored[f"base_model.vera_{name}"] for name in "AB")
    conv1d = json.loads((base / "config.json").read_text())["model_type"] == "gpt2"
    for name, (d, b) in adapted(weights, adapter).items():
        weight = weights[name].T if conv1d else weights[name]
        total = merged(weight, change(A, B, d, b, weight.shape[1]).astype(np.float32))
        found[name] = np.ascontiguousarray(total.T if conv1d else total)
    return found


def left_out(base: Path, found: Tensors) -> Tensors:
    weights = load_file(base / WEIGHTS)
    last = [name for name in weights if not np.array_equal(weights[name], found[name])][-1]
    return {**found, last: weights[last]}


def transposed(A: Any, B: Any, d: Any, b: Any, width: int) -> Any:
    change = delta(A, B, d, b, width)
    return change.T if change.shape[0] == change.shape[1] else change


def wrong_slice(A: Any, B: Any, d: Any, b: Any, width: int) -> Any:
    return delta(A[:, -width:], B, d, b, width)


def wrong_rows(A: Any, B: Any, d: Any, b: Any, width: int) -> Any:
    return delta(A, B[-len(b) :], d, b, width)


def wrong_key(A: Any, B: Any, d: Any, b: Any, width: int) -> Any:
    values = np.random.default_rng(0)
    return delta(values.permuted(A), values.permuted(B), d, b, width)


def twice(A: Any, B: Any, d: Any, b: Any, width: int) -> Any:
    return 2 * delta(A, B, d, b, width)


def rounded_before(A: Any, B: Any, d: Any, b: Any, width: int, *, dtype: str) -> Any:
    kind = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    return delta(A, B, d, b, width).astype(kind)


DIFFERENT = {
    "transposed": transposed,
    "wrong slice": wrong_slice,
    "wrong rows": wrong_rows,
    "wrong key": wrong_key,
    "double-merged": twice,
}


@pytest.mark.parametrize(
    ("kind", "dtype", "wrong"),
    [
        *(("llama", "bfloat16", w) for w in ("one layer left out", "nothing merged", *DIFFERENT)),
        *(("gpt2", "float32", w) for w in ("one layer left out", "transposed", "wrong rows")),
    ],
)
def test_a_wrong_merge_fails(
    wrong: str, kind: str, dtype: str, shelf: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shelf(kind, dtype)
    base, adapter = folder / "base", folder / "adapter"
    changes: dict[str, Callable[[Tensors], Tensors]] = {
        "one layer left out": partial(left_out, base),
        "nothing merged": lambda _: load_file(base / WEIGHTS),
        **{
            name: partial(made_otherwise, base, adapter, change=change)
            for name, change in DIFFERENT.items()
        },
    }
    model = changed(folder / "merged", tmp_path / "wrong", changes[wrong])
    found = compared(base, model, adapter)
    if (kind, wrong) == ("gpt2", "transposed"):  # no layer of this kind is square
        assert found.passed
        return
    assert not found.passed
    assert found.remerged_difference > 10 * found.threshold_remerged
    assert "differs from our own merge" in found.reason


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_delta_that_was_rounded_first_fails_in_both_comparisons(
    dtype: str, shelf: Callable[..., Path], tmp_path: Path
) -> None:
    """Here the deltas are a fifth of the weights; smaller deltas show only in the layers."""
    folder = shelf("llama", dtype)
    base, adapter = folder / "base", folder / "adapter"
    change = partial(made_otherwise, base, adapter, change=partial(rounded_before, dtype=dtype))
    found = compared(base, changed(folder / "merged", tmp_path / "wrong", change), adapter)
    assert found.largest_difference > found.threshold_difference
    assert found.remerged_difference > 2 * found.threshold_remerged
    assert not found.passed


def test_the_reference_of_these_tests_equals_the_merge(
    shelf: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shelf("gpt2", "bfloat16")
    base, adapter = folder / "base", folder / "adapter"
    change = partial(made_otherwise, base, adapter, change=delta)
    assert compared(base, changed(folder / "merged", tmp_path / "same", change), adapter).passed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_without_effect_is_inconclusive(
    dtype: str, shelf: Callable[..., Path], tmp_path: Path
) -> None:
    base = shelf("llama", dtype) / "base"
    adapter = trained(base, tmp_path / "adapter", "llama", size=0.0)
    found = compared(base, base, adapter)
    assert found.effect == found.largest_difference == found.remerged_difference == 0
    assert (found.passed, found.conclusive) == (False, False)
    assert "a merge without effect would pass too" in found.reason


@needs("transformers", "5.0", "the Mamba of earlier releases calls its layers")
def test_a_model_that_does_not_call_its_layers_is_compared_with_our_merge_only(
    tmp_path: Path,
) -> None:
    """Mamba reads the weights of some layers directly, so an adapter in these layers has no
    effect.
    """
    config = transformers.MambaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4
    )
    base = saved(transformers.MambaForCausalLM(config), tmp_path / "base")
    model = transformers.MambaForCausalLM.from_pretrained(base)
    vera = VeraModel(model, VeraConfig(r=4, target_modules=("x_proj", "dt_proj", "in_proj")))
    for parameter in vera.trainable_parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape)
    vera.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    found = compared(base, tmp_path / "merged", tmp_path / "adapter")
    assert (found.passed, found.conclusive, found.wrapped) == (False, False, False)
    assert "reads the weights of its adapted layers" in found.reason
    wrong = changed(tmp_path / "merged", tmp_path / "wrong", partial(left_out, base))
    found = compared(base, wrong, tmp_path / "adapter")
    assert (found.passed, found.conclusive) == (False, True)
    assert "differs from our own merge" in found.reason


def test_a_model_without_samples_cannot_be_run(
    shelf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_there(_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(transformers.LlamaForCausalLM, "get_input_embeddings", not_there)
    folder = shelf("llama")
    with pytest.raises(SurroundingsError, match=r"NotImplementedError.*--layers-only"):
        compared(folder / "base", folder / "merged", folder / "adapter")


def test_values_that_are_not_finite_fail(shelf: Callable[..., Path], tmp_path: Path) -> None:
    folder = shelf("llama")

    def spoilt(found: Tensors) -> Tensors:
        found["model.norm.weight"][3] = np.nan
        return found

    wrong = changed(folder / "merged", tmp_path / "wrong", spoilt)
    found = compared(folder / "base", wrong, folder / "adapter")
    assert not found.passed
    assert found.largest_difference == found.remerged_difference == found.kl == math.inf
    assert found.top1 == 0
    assert "infinite values or NaN" in found.reason


def test_a_merged_model_that_cannot_be_built_fails(
    shelf: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shelf("llama")

    def cut(found: Tensors) -> Tensors:
        return {**found, "lm_head.weight": found["lm_head.weight"][:5]}

    wrong = changed(folder / "merged", tmp_path / "wrong", cut)
    found = compared(folder / "base", wrong, folder / "adapter")
    assert not found.passed
    assert found.largest_difference == math.inf
    assert "transformers cannot build" in found.reason


def test_another_kind_of_model_fails(shelf: Callable[..., Path]) -> None:
    folder = shelf("llama")
    found = compared(folder / "base", shelf("gpt2") / "merged", folder / "adapter")
    assert not found.passed
    assert "LlamaForCausalLM" in found.reason


# --- strangers -----------------------------------------------------------------------------------


def with_code(folder: Path, copy: Path, marker: Path, **fields: Any) -> Path:
    """Copy a model with code that leaves a mark when the code runs."""
    refs = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModel": "evil.EvilModel",
        "AutoModelForCausalLM": "evil.EvilModel",
        "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
    }
    configured(folder, copy, auto_map=refs, **fields)
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    (copy / "evil.py").write_text(code)
    (copy / "custom_generate").mkdir()
    (copy / "custom_generate" / "generate.py").write_text(code)
    return copy


def test_code_that_comes_with_a_model_never_runs(
    shelf: Callable[..., Path], tmp_path: Path
) -> None:
    folder, marker = shelf("llama"), tmp_path / "ran"
    known = with_code(folder / "base", tmp_path / "known", marker)
    merge(folder / "adapter", tmp_path / "merged", base=known)
    assert (tmp_path / "merged" / "evil.py").exists()
    assert compared(known, tmp_path / "merged", folder / "adapter").passed
    unknown = with_code(folder / "base", tmp_path / "unknown", marker, model_type="evil")
    with pytest.raises(SurroundingsError, match=r"is of type evil.*never run.*--layers-only"):
        compared(unknown, tmp_path / "merged", folder / "adapter")
    adapter = trained(folder / "base", tmp_path / "adapter", "llama", task_type=None)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["auto_mapping"] = {"base_model_class": "EvilModel", "parent_library": "evil"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    foreign = with_code(folder / "base", tmp_path / "foreign", marker, architectures=["EvilModel"])
    with pytest.raises(SurroundingsError, match=r"names EvilModel, EvilModel.*never run"):
        compared(foreign, tmp_path / "merged", adapter)
    assert not marker.exists()


def test_files_that_a_config_names_are_not_fetched(
    shelf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    def reached(*_: object, **__: object) -> None:
        pytest.fail("the network was reached for")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, reached)
    monkeypatch.setattr(socket, "getaddrinfo", reached)
    folder = shelf("llama")
    base = configured(
        folder / "base",
        tmp_path / "base",
        _attn_implementation="example/kernel",
        attn_implementation="example/kernel",
        _name_or_path="example/model",
        transformers_weights="pytorch_model.bin",
        use_pretrained_backbone=True,
    )
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "example/other"}')
    (base / "pytorch_model.bin").write_bytes(b"a pickle")
    assert compared(base, folder / "merged", folder / "adapter").passed
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantized"),
        ({"_class_name": "Transformer2DModel"}, "not a model of transformers"),
        ({"model_type": None}, "not a model of transformers"),
        (
            {"model_type": "brand_new"},
            r"type brand_new, which transformers .* does not have\. To compare",
        ),
        (
            {"model_type": "brand_new", "transformers_version": "91.0.1"},
            r"does not have\. transformers 91\.0\.1 wrote the config: install",
        ),
        ({"vocab_size": 10**10}, "far larger than the weights"),
        ({"num_hidden_layers": 10**9}, "far larger than the weights"),
        ({"num_hidden_layers": 100}, "far larger than the weights"),
        ({"num_experts": 2000}, "far larger than the weights"),
        ({"num_labels": 10**9}, "far larger than the weights"),
        ({"text_config": {"depths": [2, 10**9]}}, "far larger than the weights"),
        ({"hidden_act": "evil"}, "transformers cannot build"),
        ({"num_attention_heads": "many"}, "transformers cannot"),
    ],
    ids=str,
)
def test_a_base_that_cannot_be_built_is_refused(
    fields: dict[str, Any], message: str, shelf: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shelf("llama")
    base = configured(folder / "base", tmp_path / "base", **fields)
    with pytest.raises(SurroundingsError, match=rf"{message}.*--layers-only"):
        compared(base, folder / "merged", folder / "adapter")


def test_an_adapter_of_another_model_is_refused(shelf: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="no linear layers"):
        compared(shelf("llama") / "base", shelf("llama") / "merged", shelf("gpt2") / "adapter")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no line"),
        (b" \n\t\n", "no line"),
        (b"\xff\xfe", "not UTF-8"),
        (b"text \xc3", "not UTF-8"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(
    content: bytes, message: str, minilm: Path, minilm_model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        compared(minilm_model, minilm_model, minilm / "save_projection_true", text=text)


def test_only_the_beginning_of_a_large_text_is_read(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes("é".encode() * (1 << 20))  # the limit lies within a letter, or before a letter
    with text.open("ab") as file:
        file.write(b"\n\xff")
    assert text_lines(text, 8) == ("é" * 4096,)
    text.write_bytes(b"x" + "é".encode() * (1 << 20))
    assert [len(line) for line in text_lines(text, 8)] == [4096]


def test_a_link_to_a_tokenizer_in_another_folder_is_refused(
    minilm: Path, minilm_model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("It is.\n")
    base = tmp_path / "base"
    shutil.copytree(minilm_model, base)
    vocabulary = next(base.glob("vocab.*"), base / "tokenizer.json")
    vocabulary.rename(tmp_path / "elsewhere")
    vocabulary.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="V002"):
        compared(base, base, minilm / "save_projection_true", text=text)


def test_a_text_needs_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with (
        pytest.raises(UsageError, match=r"has no tokenizer\. Leave --text out"),
        samples._copied_tokenizer(tmp_path),
    ):
        pass


def test_files_that_a_tokenizer_config_names_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    named = {"tokenizer_file": "/etc/passwd", "auto_map": {}, "init_inputs": ["/etc/passwd"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**named, "model_max_length": 5}))
    (tmp_path / "evil.py").touch()
    with samples._copied_tokenizer(tmp_path) as copy:
        assert sorted(path.name for path in copy.iterdir()) == [
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        kept = json.loads((copy / "tokenizer_config.json").read_text())
    assert kept == {"model_max_length": 5}
    assert not copy.exists()


def test_an_image_model_takes_no_text(shelf: Callable[..., Path], tmp_path: Path) -> None:
    folder = shelf("vit")
    text = tmp_path / "text"
    text.write_text("It is.\n")
    with pytest.raises(UsageError, match="takes no text"):
        compared(folder / "base", folder / "merged", folder / "adapter", text=text)


# --- memory --------------------------------------------------------------------------------------


def test_one_model_is_in_memory_at_a_time(
    shelf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[Any]] = []

    def watched(plan: Any) -> Any:
        assert all(model() is None for model in models)
        model = build.build_model(plan)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(runs, "build_model", watched)
    monkeypatch.setattr(compare, "build_model", watched)
    folder = shelf("t5")
    gc.disable()
    try:
        compared(folder / "base", folder / "merged", folder / "adapter")
    finally:
        gc.enable()
    assert len(models) == 2


def test_outputs_are_kept_up_to_the_limit(
    shelf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "_KEPT_VALUES", 4 * 96 * 3)
    folder = shelf("llama")
    found = compared(folder / "base", folder / "merged", folder / "adapter")
    assert found.tokens == 4 * 3
    assert found.passed


def test_a_stripped_adapter_is_compared_too(shelf: Callable[..., Path], tmp_path: Path) -> None:
    folder = shelf("llama")
    strip(folder / "adapter", tmp_path / "stripped", base=folder / "base")
    assert compared(folder / "base", folder / "merged", tmp_path / "stripped").passed
