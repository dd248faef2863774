"""Compare a LoRA in PEFT with the VeRA adapter: whole models of several kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torchmodels
from torchmodels import saved, trained

from vera_convert import LoraOptions, VerifyOptions, to_lora, verify
from vera_convert.errors import UsageError
from vera_convert.formats.document import result_document
from vera_convert.formats.verification import verification_text
from vera_convert.verification import model_comparison
from vera_convert.verification.model_comparison import ModelComparison, ModelJob
from vera_convert.with_torch.compare import compare_lora

pytest.importorskip("peft")


def compared(base: Path, adapter: Path, lora: Path) -> ModelComparison:
    """Compare in this process; `verify` does the same in a child process."""
    job = ModelJob(((adapter, 1.0),), base, lora, 1 << 20, samples=4, is_lora=True)
    return compare_lora(job, lambda _stage, _done, _of: None)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder with `base`, `adapter` and `lora`, which tests must not change."""
    folder = tmp_path_factory.mktemp("llama")
    base = saved(torchmodels.built("llama"), folder / "base")
    to_lora(trained(base, folder / "adapter", "llama"), folder / "lora", base=base)
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5", "vit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peft_computes_the_same_with_the_lora(kind: str, dtype: str, tmp_path: Path) -> None:
    base = saved(torchmodels.built(kind, dtype), tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter", kind)
    to_lora(adapter, tmp_path / "lora", base=base, options=LoraOptions(dtype=dtype))
    found = compared(base, adapter, tmp_path / "lora")
    assert found.passed, found.reason
    assert found.remerged_difference < 1e-5 * found.effect


def test_the_whole_comparison_runs_in_a_child(llama: Path, schema_errors: Any) -> None:
    options = VerifyOptions(samples=2)
    result = verify(llama / "adapter", lora=llama / "lora", base=llama / "base", options=options)
    assert result.passed
    assert result.lora is not None
    assert result.lora.model is not None
    assert result.lora.model.samples == 2
    assert result.lora.model.effect > 100 * result.lora.model.threshold_difference
    assert "without PEFT" in verification_text(result)
    assert schema_errors("verification", result_document(result)) == []


@pytest.mark.usefixtures("models_here")
def test_a_pattern_of_alphas_that_peft_reads_differently_fails(llama: Path, tmp_path: Path) -> None:
    changed = tmp_path / "lora"
    to_lora(llama / "adapter", changed, base=llama / "base")
    config = json.loads((changed / "adapter_config.json").read_text())
    config["alpha_pattern"] = {r"model\.layers\.0\..*": 2 * config["lora_alpha"]}
    (changed / "adapter_config.json").write_text(json.dumps(config))
    result = verify(llama / "adapter", lora=changed, base=llama / "base")
    assert {finding.code for finding in result.errors} == {"V727"}
    assert "The base with the LoRA in PEFT differs" in result.errors[0].reason


def test_ranks_that_peft_refuses_fail(llama: Path, tmp_path: Path) -> None:
    changed = tmp_path / "lora"
    to_lora(llama / "adapter", changed, base=llama / "base")
    config = json.loads((changed / "adapter_config.json").read_text())
    config["rank_pattern"] = {"q_proj": 2}
    (changed / "adapter_config.json").write_text(json.dumps(config))
    found = compared(llama / "base", llama / "adapter", changed)
    assert not found.passed
    assert "PEFT cannot load the adapter" in found.reason


def test_the_reason_why_a_lora_is_not_run_is_reported(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reason(**options: Any) -> str:
        result = verify(llama / "adapter", lora=llama / "lora", **options)
        assert result.passed
        assert result.lora is not None
        assert result.lora.model is None
        assert f"not run: {result.lora.run}" in verification_text(result)
        return str(result.lora.run)

    base = llama / "base"
    assert reason(base=base, options=VerifyOptions(layers_only=True)) == "--layers-only"
    monkeypatch.setattr(
        model_comparison, "find_spec", lambda name: None if name == "peft" else name
    )
    assert reason(base=base) == "install peft to run the LoRA in PEFT"


def test_options_of_runs_are_refused_without_a_model(llama: Path) -> None:
    with pytest.raises(UsageError, match=r"^samples: only for"):
        verify(llama / "adapter", other=llama / "adapter", options=VerifyOptions(samples=2))
    with pytest.raises(UsageError, match=r"^dtype: only for"):
        verify(llama / "adapter", lora=llama / "lora", options=VerifyOptions(dtype="float16"))
