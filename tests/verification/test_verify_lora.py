"""verify --lora compares every layer's delta with the adapter's, and names each defect."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import good_adapter, good_tensors
from bases import tiny_base
from commandline import Run
from folders import CONFIG_NAME, WEIGHTS, metadata, weights
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from vera_convert.errors import CheckpointError, SurroundingsError, UsageError
from vera_convert.lora.conversion import to_lora
from vera_convert.lora.engines import EngineName
from vera_convert.lora.gguf_form import GgufModel
from vera_convert.lora.options import LoraOptions
from vera_convert.rules import Severity
from vera_convert.verification.options import VerifyOptions
from vera_convert.verification.verify import Verification, verify

PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
KEYS = ["self_attn.q_proj", "self_attn.v_proj"]
Change = Callable[[dict[str, NDArray[Any]]], object]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    sizes = {"num_attention_heads": 2, "num_hidden_layers": 2}
    return tiny_base(tmp_path / "base", config={"model_type": "llama", **sizes})


@pytest.fixture
def lora(adapter: Path, base: Path, tmp_path: Path) -> Path:
    to_lora(adapter, tmp_path / "lora", base=base)
    return tmp_path / "lora"


def changed(lora: Path, change: Change, **config: object) -> Path:
    """Change a LoRA's tensors, and remove the record of the program that wrote the LoRA."""
    tensors = weights(lora)
    change(tensors)
    save_file(tensors, lora / WEIGHTS, {"format": "pt"})
    document = json.loads((lora / CONFIG_NAME).read_bytes()) | config
    (lora / CONFIG_NAME).write_text(json.dumps(document))
    return lora


def nothing(_tensors: dict[str, NDArray[Any]]) -> None:
    pass


def codes(result: Verification) -> set[str]:
    return {finding.code for finding in result.errors}


def test_a_conversion_passes_without_the_base(adapter: Path, lora: Path) -> None:
    result = verify(adapter, lora=lora)
    assert result.passed
    assert result.lora is not None
    assert len(result.lora.layers) == 4
    assert all(0 < layer.error < 1e-7 for layer in result.lora.layers)


@pytest.mark.parametrize("engine", ["peft", "vllm", "sglang", "tgi", "mlx", "gguf"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_conversion_passes(
    engine: Any, dtype: str, adapter: Path, base: Path, tmp_path: Path
) -> None:
    if engine == "gguf":
        pytest.importorskip("gguf")
    options = LoraOptions(engine=engine, dtype=dtype)
    done = to_lora(adapter, tmp_path / "other", base=base, options=options)
    weights_alone = VerifyOptions(layers_only=True)
    result = verify(adapter, lora=tmp_path / "other", base=base, options=weights_alone)
    assert result.passed
    assert result.lora is not None
    for layer in result.lora.layers:
        assert layer.error == pytest.approx(done.measured.errors[layer.module], rel=0.1)


def test_a_lower_rank_passes_with_the_recorded_error(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    done = to_lora(adapter, tmp_path / "low", base=base, options=LoraOptions(rank=3))
    result = verify(adapter, lora=tmp_path / "low")
    assert result.passed
    assert result.lora is not None
    assert result.lora.worst is not None
    assert result.lora.worst.error == pytest.approx(done.measured.worst, rel=1e-4)
    assert codes(verify(adapter, lora=changed(tmp_path / "low", nothing))) == {"V721"}


def test_a_lora_of_another_adapter_fails(lora: Path, tmp_path: Path) -> None:
    other = {n: t[::-1].copy() for n, t in good_tensors().items() if n.endswith("lambda_b")}
    result = verify(good_adapter(tmp_path / "other", tensors=other), lora=lora)
    assert codes(result) == {"V721"}
    assert result.wrong == 4


def cancelling() -> dict[str, NDArray[Any]]:
    """Return tensors whose first two terms cancel down to a thousandth of their size."""
    tensors = good_tensors()
    A, B = tensors["base_model.vera_A"], tensors["base_model.vera_B"]
    A[1], B[:, 1] = A[0], B[:, 0]
    for name in tensors:
        if name.endswith("lambda_d"):
            tensors[name][:] = 0
            tensors[name][:2] = 0.1, -0.0999
    return tensors


def test_the_limit_for_rounding_allows_for_terms_that_cancel(base: Path, tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "cancelling", tensors=cancelling())
    to_lora(adapter, tmp_path / "lora", base=base)
    result = verify(adapter, lora=tmp_path / "lora")
    assert result.passed
    assert result.lora is not None
    assert result.lora.worst is not None
    assert 1e-5 < result.lora.worst.error < result.lora.worst.limit < 1e-2
    other = changed(tmp_path / "lora", scaled(f"{Q}.lora_B.weight", 1.02))
    assert codes(verify(adapter, lora=other)) == {"V721"}


def scaled(name: str, factor: float) -> Change:
    def change(tensors: dict[str, NDArray[Any]]) -> None:
        tensors[PREFIX + name] = tensors[PREFIX + name] * np.float32(factor)

    return change


def without(name: str) -> Change:
    def change(tensors: dict[str, NDArray[Any]]) -> None:
        for part in "AB":
            del tensors[f"{PREFIX}{name}.lora_{part}.weight"]

    return change


def added(name: str, factor: float) -> Change:
    def change(tensors: dict[str, NDArray[Any]]) -> None:
        tensors[f"{PREFIX}{name}.lora_A.weight"] = np.ones((4, 16), np.float32)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = np.full((16, 4), factor, np.float32)

    return change


WRONG: dict[str, tuple[Change, dict[str, object], str]] = {
    "b is off in one layer": (scaled(f"{Q}.lora_B.weight", 1.001), {}, "V721"),
    "a value is infinite": (scaled(f"{Q}.lora_A.weight", np.inf), {}, "V721"),
    "alpha is not the rank": (nothing, {"lora_alpha": 8}, "V721"),
    "the scaling is another": (nothing, {"use_rslora": True}, "V721"),
    "one layer is scaled otherwise": (nothing, {"alpha_pattern": {Q: 2}}, "V721"),
    "no target matches": (nothing, {"target_modules": ["fc1"]}, "V726"),
    "a pattern misses a layer": (nothing, {"target_modules": r".*\.0\..*_proj"}, "V726"),
    "no target is named": (nothing, {"target_modules": None}, "V726"),
    "bias has no known value": (nothing, {"bias": "some"}, "V726"),
    "one layer is transformed": (nothing, {"layers_to_transform": 0}, "V726"),
    "a target is excluded": (nothing, {"exclude_modules": ["q_proj"]}, "V726"),
    "r is another": (nothing, {"r": 8}, "V726"),
    "the task is another": (nothing, {"task_type": "SEQ_CLS"}, "V726"),
    "a layer is missing": (without(Q), {}, "V722"),
    "another layer is changed": (added("model.layers.0.self_attn.o_proj", 1.0), {}, "V723"),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_defect_of_a_lora_is_named(case: str, adapter: Path, lora: Path) -> None:
    change, config, code = WRONG[case]
    with np.errstate(invalid="ignore"):
        assert codes(verify(adapter, lora=changed(lora, change, **config))) == {code}


@pytest.mark.parametrize("config", [{"target_modules": ["fc1"]}, {"r": 8}], ids=str)
def test_each_layer_that_peft_does_not_load_is_named(
    config: dict[str, Any], adapter: Path, lora: Path
) -> None:
    result = verify(adapter, lora=changed(lora, nothing, **config))
    places = [each.place for each in result.errors if each.code == "V726"]
    assert result.lora is not None
    assert places == [layer.name for layer in result.lora.layers]


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({}, None),
        ({"num_layers": 0}, None),  # 0 means all layers in MLX-LM
        ({"num_layers": 1}, "V726"),
        ({"keys": ["self_attn.q_proj"]}, "V726"),
        ({"keys": [*KEYS, f"model.layers.0.{KEYS[0]}"], "num_layers": 1}, "V726"),
        ({"keys": [f"model.layers.{n}.{key}" for n in range(2) for key in KEYS]}, None),
        ({"keys": None}, None),
        ({"rank": 8}, "V726"),
    ],
    ids=str,
)
def test_layers_that_mlx_leaves_out_are_reported(
    config: dict[str, Any], code: str | None, adapter: Path, base: Path, tmp_path: Path
) -> None:
    lora = tmp_path / "mlx"
    to_lora(adapter, lora, base=base, options=LoraOptions(engine=EngineName.MLX))
    document = json.loads((lora / CONFIG_NAME).read_bytes())
    document |= {name: config[name] for name in config.keys() & {"num_layers"}}
    document["lora_parameters"] |= {name: config[name] for name in config.keys() & {"keys", "rank"}}
    (lora / CONFIG_NAME).write_text(json.dumps(document))
    assert codes(verify(adapter, lora=lora)) == ({code} if code else set())


def test_diffusers_metadata_without_a_target_is_reported(adapter: Path, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "c", config={"_class_name": "FluxTransformer2DModel"})
    (base / "model.safetensors").rename(base / "diffusion_pytorch_model.safetensors")
    lora = tmp_path / "diffusers"
    to_lora(adapter, lora, base=base, options=LoraOptions(engine=EngineName.DIFFUSERS))
    assert verify(adapter, lora=lora).passed
    path = lora / "pytorch_lora_weights.safetensors"
    own = {"transformer.target_modules": ["q_proj"], "transformer.r": 4}
    text = json.dumps({**own, "transformer.lora_alpha": 4})
    save_file(load_file(path), path, {"format": "pt", "lora_adapter_metadata": text})
    assert codes(verify(adapter, lora=lora)) == {"V726"}


@pytest.mark.parametrize(
    ("engine", "model_type", "code"),
    [("peft", "afmoe", "V714"), ("peft", "llama", None), ("vllm", "afmoe", None)],
)
def test_a_layer_that_peft_reads_as_an_expert_is_reported(
    engine: Any, model_type: str, code: str | None, tmp_path: Path
) -> None:
    def renamed(name: str) -> str:
        return name.replace("self_attn.v_proj", "mlp.down_proj")

    tensors: dict[str, Any] = dict.fromkeys(good_tensors())
    tensors |= {renamed(name): tensor for name, tensor in good_tensors().items()}
    adapter = good_adapter(
        tmp_path / "down", tensors=tensors, target_modules=["q_proj", "down_proj"]
    )
    base = tiny_base(
        tmp_path / "b",
        tensors={f"model.layers.{n}.mlp.down_proj.weight": (8, 16) for n in range(2)},
        config={"model_type": "llama"},
    )
    to_lora(adapter, tmp_path / "lora", base=base, options=LoraOptions(engine=engine))
    (base / "config.json").write_text(json.dumps({"model_type": model_type}))
    result = verify(adapter, lora=tmp_path / "lora", base=base)
    assert codes(result) == ({code} if code else set())
    if model_type == "afmoe" and importlib.util.find_spec("peft"):
        assert result.lora is not None
        assert result.lora.run == "PEFT does not load every layer of this LoRA"


def test_a_further_layer_of_zeros_passes(adapter: Path, lora: Path) -> None:
    result = verify(adapter, lora=changed(lora, added("model.layers.0.self_attn.o_proj", 0.0)))
    assert result.passed
    assert result.lora is not None
    assert result.lora.zeros == 1


def test_a_scaling_that_gives_the_same_delta_passes(adapter: Path, lora: Path) -> None:
    def halved(tensors: dict[str, NDArray[Any]]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensors[name] = tensor * np.float32(0.5)

    assert verify(adapter, lora=changed(lora, halved, lora_alpha=8)).passed


def test_heads_are_compared_byte_by_byte(base: Path, tmp_path: Path) -> None:
    head = {f"{PREFIX}score.weight": np.ones((3, 16), np.float32)}
    adapter = good_adapter(tmp_path / "head", tensors=head, modules_to_save=["score"])
    to_lora(adapter, tmp_path / "lora", base=base)
    assert verify(adapter, lora=tmp_path / "lora").passed
    wrong = changed(tmp_path / "lora", scaled("score.weight", 2))
    assert codes(verify(adapter, lora=wrong)) == {"V724"}
    options = LoraOptions(drop_head=True)
    to_lora(adapter, tmp_path / "dropped", base=base, options=options)
    assert verify(adapter, lora=tmp_path / "dropped").passed


def test_a_tensor_that_only_the_lora_has_is_reported(adapter: Path, lora: Path) -> None:
    bias = {f"{PREFIX}{Q}.lora_B.bias": np.ones(16, np.float32)}
    wrong = changed(lora, lambda tensors: tensors.update(bias), bias="all")
    assert codes(verify(adapter, lora=wrong)) == {"V724"}


def test_another_adapter_than_the_recorded_adapter_is_a_warning(adapter: Path, lora: Path) -> None:
    assert not verify(adapter, lora=lora).findings
    save_file(weights(adapter), adapter / WEIGHTS, {"format": "pt", "by": "another hand"})
    result = verify(adapter, lora=lora)
    assert result.passed
    assert [(finding.code, finding.severity) for finding in result.findings] == [
        ("V725", Severity.WARNING)
    ]


def test_a_record_does_not_excuse_a_larger_error_than_the_rank_explains(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    low = tmp_path / "low"
    to_lora(adapter, low, base=base, options=LoraOptions(rank=3, accept_error=True))
    boast = json.dumps({"relative_error": "5.00e+01"})
    tensors = weights(low)
    save_file(tensors, low / WEIGHTS, {"format": "pt", "vera_convert.lora": boast})
    assert verify(adapter, lora=low).passed
    tensors = {name: tensor * np.float32(1.5) for name, tensor in tensors.items()}
    save_file(tensors, low / WEIGHTS, {"format": "pt", "vera_convert.lora": boast})
    assert codes(verify(adapter, lora=low)) == {"V721"}


@pytest.fixture
def gguf_lora(adapter: Path, base: Path, tmp_path: Path) -> Path:
    pytest.importorskip("gguf")
    to_lora(adapter, tmp_path / "gguf", base=base, options=LoraOptions(engine=EngineName.GGUF))
    return tmp_path / "gguf" / "adapter.gguf"


def test_rows_in_transformers_order_are_wrong_in_gguf(
    adapter: Path, base: Path, gguf_lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GgufModel, "stored_B", lambda _model, _layer, matrix: matrix)
    options = LoraOptions(engine=EngineName.GGUF, force=True)
    to_lora(adapter, gguf_lora.parent, base=base, options=options)
    result = verify(adapter, lora=gguf_lora.parent, base=base)
    assert codes(result) == {"V721"}
    assert {f.place for f in result.errors} == {
        f"model.layers.{number}.self_attn.q_proj" for number in (0, 1)
    }


def test_the_heads_of_a_gguf_must_be_known(adapter: Path, gguf_lora: Path) -> None:
    with pytest.raises(UsageError, match=r"Pass the base with --base\."):
        verify(adapter, lora=gguf_lora.parent)


GGUF_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _data: b"",
    "another magic": lambda data: b"GGUX" + data[4:],
    "another version": lambda data: data[:4] + b"\x09" + data[5:],
    "a cut header": lambda data: data[:200],
    "cut data": lambda data: data[:-64],
    "a count beyond the file": lambda data: data[:8] + b"\xff" * 8 + data[16:],
    "metadata beyond the file": lambda data: data[:16] + b"\xff" * 8 + data[24:],
    "no adapter": lambda data: data.replace(b"adapter.type", b"adapter.typo"),
    "a type that no LoRA has": lambda data: data.replace(
        struct.pack("<IQQI", 2, 16, 4, 0), struct.pack("<IQQI", 2, 16, 4, 2)
    ),
    "one name twice": lambda data: data.replace(b"attn_v.weight", b"attn_q.weight"),
}


@pytest.mark.parametrize("case", GGUF_DAMAGE)
def test_a_damaged_gguf_is_refused_or_wrong(
    case: str, adapter: Path, base: Path, gguf_lora: Path
) -> None:
    before = gguf_lora.read_bytes()
    gguf_lora.write_bytes(GGUF_DAMAGE[case](before))
    assert gguf_lora.read_bytes() != before
    with pytest.raises(CheckpointError, match="V720"):
        verify(adapter, lora=gguf_lora.parent, base=base)


UNREADABLE: dict[str, tuple[Change, dict[str, object]]] = {
    "no LoRA": (nothing, {"peft_type": "LOHA"}),
    "DoRA": (nothing, {"use_dora": True}),
    "repeated layers": (nothing, {"layer_replication": [[0, 2]]}),
    "targets are numbers": (nothing, {"target_modules": [1]}),
    "layers are texts": (nothing, {"layers_to_transform": ["0"]}),
    "alpha is a text": (nothing, {"lora_alpha": "16"}),
    "a pattern is a list": (nothing, {"alpha_pattern": [1]}),
    "half a layer": (lambda t: t.pop(f"{PREFIX}{Q}.lora_A.weight"), {}),
    "ranks disagree": (
        lambda t: t.update({f"{PREFIX}{Q}.lora_A.weight": np.ones((3, 16), np.float32)}),
        {},
    ),
    "a vector": (lambda t: t.update({f"{PREFIX}{Q}.lora_A.weight": np.ones(4, np.float32)}), {}),
    "whole numbers": (
        lambda t: t.update({f"{PREFIX}{Q}.lora_A.weight": np.ones((4, 16), np.int32)}),
        {},
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_folder_without_a_lora_is_refused(case: str, adapter: Path, lora: Path) -> None:
    change, config = UNREADABLE[case]
    with pytest.raises(CheckpointError, match="V720"):
        verify(adapter, lora=changed(lora, change, **config))


def test_a_malformed_record_is_ignored(adapter: Path, lora: Path) -> None:
    for text in ("{", "[]", '{"relative_error": "nan"}', '{"relative_error": 1e9}', "[" * 5000):
        save_file(weights(lora), lora / WEIGHTS, {"format": "pt", "vera_convert.lora": text})
        assert verify(adapter, lora=lora).passed
        assert metadata(lora)["vera_convert.lora"] == text


def test_a_needed_base_that_is_not_found_is_no_fault_of_the_lora(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    bare = dict.fromkeys(name for name in good_tensors() if "vera_A" in name or "vera_B" in name)
    stripped = good_adapter(tmp_path / "bare", tensors=bare, save_projection=False)
    with pytest.raises(SurroundingsError, match=r"local cache .*\. Pass the base with --base"):
        verify(stripped, lora=lora)


def test_verify_without_a_result_is_a_usage_error(adapter: Path) -> None:
    with pytest.raises(UsageError, match="--lora LORA"):
        verify(adapter)


def test_the_command_reports_the_worst_layer(
    run: Run, adapter: Path, lora: Path, schema_errors: Any
) -> None:
    ended = run("verify", adapter, "--lora", lora)
    assert ended.status == 0, ended.err
    assert "4 of 4 layers have the adapter's delta" in ended.out
    changed(lora, scaled(f"{Q}.lora_B.weight", 1.1))
    ended = run("verify", adapter, "--lora", lora, "--json")
    assert ended.status == 1
    assert "V721" in ended.err
    document = json.loads(ended.out)
    assert schema_errors("verification", document) == []
    assert [layer["passed"] for layer in document["lora"]["layers"]].count(False) == 1
    changed(lora, without(Q))
    assert "3 of 4 layers have the adapter's delta" in run("verify", adapter, "--lora", lora).out
