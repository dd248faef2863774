"""The installed PEFT computes the same logits from converted adapters and from the originals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import theirwarnings
from adapterdefects import A, B, tensors
from folders import DATA
from numpy.typing import NDArray
from releases import AS_STORED
from safetensors.numpy import load_file

from vera_convert.base.facts import BaseOptions
from vera_convert.conversion.migration import Mode, migrate
from vera_convert.conversion.strip_embed import embed, strip

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = theirwarnings.OF_PEFT

FIXTURES = DATA / "fixtures"
MODEL_CLASS = {
    "llama": transformers.AutoModelForCausalLM,
    "gpt2": transformers.AutoModelForCausalLM,
    "bert": transformers.AutoModelForSequenceClassification,
}
Logits = Callable[[Path], NDArray[Any]]


def logits_on(base: Path, model_class: Any) -> Logits:
    """Return a function that computes the logits of the base with an adapter, in the base's
    dtype.
    """

    def logits(folder: Path) -> NDArray[Any]:
        model = model_class.from_pretrained(base, **AS_STORED)
        adapted = peft.PeftModel.from_pretrained(model, folder).eval()
        ids = torch.tensor([[1, 2, 3, 5, 8, 13, 21, 31]])
        with torch.no_grad():
            output = adapted(input_ids=ids)
        values = output.logits if hasattr(output, "logits") else output.last_hidden_state
        result: NDArray[Any] = values.float().numpy()
        return result

    return logits


def fixture(case: str) -> tuple[Path, BaseOptions, Logits]:
    folder = FIXTURES / case
    base = FIXTURES / json.loads((folder / "expected.json").read_bytes())["base"]
    return folder, BaseOptions(str(base)), logits_on(base, MODEL_CLASS[folder.name.split("_")[0]])


@pytest.mark.parametrize(
    "case",
    [
        "0.21.2/llama_fp32_proj",
        "0.21.2/llama_bf16_proj",
        "0.21.2/gpt2_fp32_proj",
        "0.21.2/bert_cls_fp32_proj",
        "0.14.0/llama_bf16_proj",
        "0.11.0/llama_bf16_proj",
    ],
)
def test_an_adapter_stripped_and_embedded_again_gives_the_same_logits(
    case: str, tmp_path: Path
) -> None:
    folder, base, logits = fixture(case)
    strip(folder, tmp_path / "stripped", base=base)
    embed(tmp_path / "stripped", tmp_path / "embedded", base=base)
    expected = logits(folder)
    assert np.array_equal(logits(tmp_path / "stripped"), expected)
    assert np.array_equal(logits(tmp_path / "embedded"), expected)


@pytest.mark.parametrize("case", ["0.21.2/llama_bf16_noproj", "0.12.0/llama_fp32_noproj"])
def test_an_adapter_that_peft_saved_without_projections_gives_the_same_logits_with_ours(
    case: str, tmp_path: Path
) -> None:
    folder, base, logits = fixture(case)
    embed(folder, tmp_path / "embedded", base=base)
    assert np.array_equal(logits(tmp_path / "embedded"), logits(folder))


def test_the_trained_adapter_gives_the_same_embeddings(
    minilm: Path, minilm_model: Path, tmp_path: Path
) -> None:
    logits = logits_on(minilm_model, transformers.AutoModel)
    source, base = minilm / "save_projection_true", BaseOptions(str(minilm_model))
    strip(source, tmp_path / "stripped", base=base)
    embed(tmp_path / "stripped", tmp_path / "embedded")
    expected = logits(source)
    assert np.array_equal(logits(tmp_path / "stripped"), expected)
    assert np.array_equal(logits(tmp_path / "embedded"), expected)


def test_an_adapter_whose_a_and_b_are_cut_loads_in_peft(tmp_path: Path) -> None:
    folder, base, logits = fixture("0.21.2/llama_fp32_proj")
    larger = tmp_path / "larger"
    larger.mkdir()
    for path in folder.iterdir():
        (larger / path.name).write_bytes(path.read_bytes())

    def grown(stored: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        wide, tall = np.ones((4, 96), np.float32), np.ones((64, 4), np.float32)
        wide[:, :80], tall[:48] = stored[A], stored[B]
        return {**stored, A: wide, B: tall}

    tensors(grown)(larger)
    with pytest.raises(RuntimeError, match="size mismatch"):
        logits(larger)
    done = migrate(larger, tmp_path / "cut", to=Mode.ASIS, base=base)
    assert done.changes == ("cut A from [4, 96] to [4, 80] and B from [64, 4] to [48, 4]",)
    assert np.array_equal(logits(tmp_path / "cut"), logits(folder))


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_a_repaired_adapter_has_an_effect_in_peft(tmp_path: Path) -> None:
    folder, base, logits = fixture("0.21.2/llama_fp32_noproj")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in folder.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    tensors(
        lambda stored: {
            f"_orig_mod.{name}.default": array[:, np.newaxis] for name, array in stored.items()
        }
    )(damaged)
    migrate(damaged, tmp_path / "mended", to=Mode.STRIPPED, base=base)
    assert load_file(tmp_path / "mended" / "adapter_model.safetensors").keys() == (
        load_file(folder / "adapter_model.safetensors").keys()
    )
    assert np.array_equal(logits(tmp_path / "mended"), logits(folder))
    assert not np.array_equal(logits(damaged), logits(folder))


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
@pytest.mark.parametrize(
    "damage",
    [
        lambda name: name.replace("base_model.model.", "base_model.model._fsdp_wrapped_module."),
        lambda name: name.replace("base_model.model.", "base_model.model.module."),
        lambda name: name.replace(".vera_lambda", ".default.vera_lambda"),
        lambda name: f"base_model.model.{name}",
    ],
)
def test_names_that_peft_ignores_are_repaired(damage: Callable[[str], str], tmp_path: Path) -> None:
    folder, _, logits = fixture("0.21.2/llama_fp32_noproj")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in folder.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    tensors(lambda stored: {damage(name): array for name, array in stored.items()})(damaged)
    assert not np.array_equal(logits(damaged), logits(folder))
    migrate(damaged, tmp_path / "mended", to=Mode.ASIS)
    assert np.array_equal(logits(tmp_path / "mended"), logits(folder))
