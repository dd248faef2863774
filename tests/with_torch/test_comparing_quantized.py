"""Compare a dequantized merge with the quantized base that has the adapter in PEFT."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import DATA
from releases import of_transformers

from vera_convert import MergeOptions, VerifyOptions, merge, verify
from vera_convert.formats.document import result_document
from vera_convert.formats.verification import verification_text
from vera_convert.verification import model_comparison
from vera_convert.verification import verify as verifying
from vera_convert.verification.model_comparison import ModelJob, QuantizedComparison, Stage
from vera_convert.verification.provenance import MergeSettings
from vera_convert.verification.verify import Verification
from vera_convert.with_torch import compare_quantized as comparing
from vera_convert.with_torch.build import Blueprint, UnfitError, build_model
from vera_convert.with_torch.compare import compare_models
from vera_convert.with_torch.runs import wrapped_model

FIXTURES = DATA / "quantized"
PACKAGES = {
    "bnb": "bitsandbytes",
    "ct": "compressed-tensors",
    "torchao": "torchao",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
}
RUN = [path.name for path in sorted(FIXTURES.iterdir()) if path.name.partition("-")[0] in PACKAGES]


def quiet(_stage: Stage, _done: int, _of: int) -> None:
    pass


def dequantized(name: str, out: Path) -> Path:
    base = str(FIXTURES / name / "base")
    merge(FIXTURES / name / "adapter", out, base=base, options=MergeOptions(dequantize=True))
    return out


def compared(name: str, out: Path, package: str) -> QuantizedComparison:
    job = ModelJob(
        ((FIXTURES / name / "adapter", 1.0),),
        FIXTURES / name / "base",
        dequantized(name, out),
        weights=1 << 20,
        samples=4,
        settings=MergeSettings(dequantize=True, base_dtype="bfloat16"),
        quantizer=package,
    )
    found = compare_models(job, quiet)
    assert found.passed, found.reason
    assert found.quantized is not None
    return found.quantized


@pytest.mark.parametrize("name", RUN)
def test_the_quantized_base_gives_the_outputs_of_the_merged_model(
    name: str, tmp_path: Path
) -> None:
    package = PACKAGES[name.partition("-")[0]]
    pytest.importorskip(package.replace("-", "_"))
    result = verified(name, tmp_path)
    assert result.passed
    assert result.model is not None
    assert (found := result.model.quantized) is not None
    assert not found.not_compared
    assert found.libraries.startswith(package)
    assert found.difference <= found.threshold < found.effect


def in_its_place(plan: Blueprint, job: ModelJob, *, adapted: bool) -> Any:
    """Return the dequantized base in bfloat16 with or without the adapter, as a stand-in for a
    quantizer.
    """
    model = build_model(plan).to(torch.bfloat16)
    return wrapped_model(model, job) if adapted else model


@pytest.mark.parametrize("adapted", [True, False])
def test_a_quantized_base_without_the_effect_of_the_adapter_fails(
    adapted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        comparing, "_real", lambda plan, _packed, job: in_its_place(plan, job, adapted=adapted)
    )
    monkeypatch.setattr(comparing, "version", lambda _package: "1.0")
    found = compared("bnb-nf4", tmp_path / "out", "bitsandbytes")
    assert found.libraries == "bitsandbytes 1.0, PEFT 1.0"
    assert found.dtype == "bfloat16"
    assert found.passed is adapted
    assert found.threshold < found.effect


def test_a_quantized_base_that_cannot_be_run_does_not_stop_the_other_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_given: Any) -> Any:
        raise UnfitError("bitsandbytes cannot do this.")

    monkeypatch.setattr(comparing, "_real", refuses)
    monkeypatch.setattr(comparing, "version", lambda _package: "1.0")
    found = compared("bnb-nf4", tmp_path / "out", "bitsandbytes")
    assert found.passed
    assert found.not_compared == "bitsandbytes cannot do this."


class _State:
    shape, blocksize = (4, 96), 64


class _Weight:
    quant_state = _State()


def test_layers_with_shapes_that_a_kernel_computes_wrongly_are_not_compared() -> None:
    with pytest.raises(UnfitError, match="blocks"):
        comparing._refuse_known_errors(_Weight())


def test_rounding_to_int8_keeps_seven_bits_of_the_largest_value() -> None:
    x = torch.tensor([[1.0, -0.5, 0.003], [0.0, 0.0, 0.0]])
    (found,) = comparing._int8_inputs(torch.nn.Identity(), (x,))
    assert found[1].tolist() == [0.0, 0.0, 0.0]
    assert (found - x).abs().max() <= 0.5 / 127 + 1e-6
    assert found[0, 2] == 0.0


# --- the decision --------------------------------------------------------------------------------


def verified(name: str, tmp_path: Path, **options: Any) -> Verification:
    out = dequantized(name, tmp_path / "out")
    base = str(FIXTURES / name / "base")
    return verify(
        FIXTURES / name / "adapter",
        merged=out,
        base=base,
        options=VerifyOptions(samples=2, **options),
    )


@pytest.mark.usefixtures("models_here")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mxfp4-gpt-oss-noproj", "the kernels of mxfp4 are not run"),
        ("bnb-nf4", "bitsandbytes not installed"),
        ("gptq-8bit", "gptqmodel and optimum not installed"),
    ],
)
def test_the_report_says_why_the_quantized_base_is_not_run(
    name: str, reason: str, tmp_path: Path, schema_errors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(package: str) -> Any:
        absent = ("bitsandbytes", "gptqmodel", "optimum")
        return None if package in absent else find_spec(package)

    if "gpt-oss" in name:
        of_transformers("GptOssConfig")
    monkeypatch.setattr(model_comparison, "find_spec", found)
    result = verified(name, tmp_path)
    assert result.passed
    assert result.model is not None
    assert result.model.quantized is not None
    assert reason in result.model.quantized.not_compared
    assert "not compared, only the dequantized base was" in verification_text(result)
    assert schema_errors("verification", result_document(result)) == []


def test_a_difference_from_the_quantized_base_is_an_error(
    tmp_path: Path, schema_errors: Any, monkeypatch: pytest.MonkeyPatch, models_here: Any
) -> None:
    differs = QuantizedComparison("bitsandbytes 1, PEFT 1", "bfloat16", 0.5, 0.25, 2.0)

    def differing(job: ModelJob, **options: Any) -> Any:
        assert job.quantizer == "bitsandbytes"
        found = models_here(replace(job, quantizer=""), **options)
        return replace(found, quantized=differs)

    monkeypatch.setattr(verifying, "run_models", differing)
    monkeypatch.setattr(model_comparison, "find_spec", lambda package: package)
    result = verified("bnb-nf4", tmp_path)
    assert [finding.code for finding in result.errors] == ["V611"]
    assert "the quantized base with the adapter in PEFT by 5.0e-01" in result.errors[0].reason
    assert "RMS difference 0.5 (limit 0.25" in verification_text(result)
    assert schema_errors("verification", result_document(result)) == []
