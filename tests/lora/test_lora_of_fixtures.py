"""The LoRA of each adapter of twelve PEFT versions gives the outputs of the VeRA adapter."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import theirwarnings
from releases import AS_STORED

from vera_convert.conversion.projections import ProjectionSource
from vera_convert.lora.conversion import to_lora
from vera_convert.lora.options import LoraOptions

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = theirwarnings.OF_PEFT

FIXTURES = Path(__file__).parent.parent / "data" / "fixtures"
EXPECTED = sorted(FIXTURES.glob("*/*/expected*.json"))


@cache
def base(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    return kind.from_pretrained(folder, **AS_STORED).eval()


@pytest.mark.parametrize(
    "path", EXPECTED, ids=lambda p: str(p.relative_to(FIXTURES).with_suffix(""))
)
def test_the_lora_of_an_adapter_gives_the_adapters_outputs(path: Path, tmp_path: Path) -> None:
    from vera_convert.with_torch import VeraModel

    expected = json.loads(path.read_text())
    source = ProjectionSource.AUTO if expected["default_semantics"] else ProjectionSource.KEY
    folder, adapter = FIXTURES / expected["base"], FIXTURES / expected["adapter_dir"]
    options = LoraOptions(projections=source)
    to_lora(adapter, tmp_path / "lora", base=folder, options=options)
    vera = VeraModel.from_pretrained(deepcopy(base(folder)), adapter, projections=source)
    lora = peft.PeftModel.from_pretrained(deepcopy(base(folder)), tmp_path / "lora")
    ids = torch.tensor(expected["input_ids"])
    with torch.no_grad():
        found, wanted = lora.eval()(ids).logits, vera.eval()(ids).logits
        assert (base(folder)(ids).logits - wanted).abs().max() > 1e-3
    if wanted.dtype == torch.float32:
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    else:
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("form", ["save_projection_true", "save_projection_false"])
def test_the_lora_of_a_trained_adapter_gives_the_adapter_s_outputs(
    form: str, minilm: Path, minilm_model: Path, tmp_path: Path
) -> None:
    to_lora(minilm / form, tmp_path / "lora", base=minilm_model)
    ids = torch.tensor([[101, 2023, 2003, 1037, 6251, 102]])
    outputs = []
    for adapter in (None, minilm / form, tmp_path / "lora"):
        model = transformers.AutoModel.from_pretrained(minilm_model)
        if adapter is not None:
            model = peft.PeftModel.from_pretrained(model, adapter)
        with torch.no_grad():
            outputs.append(model.eval()(ids).last_hidden_state)
    plain, vera, lora = outputs
    assert (vera - plain).abs().max() > 0.05
    torch.testing.assert_close(lora, vera, rtol=0, atol=1e-5)
