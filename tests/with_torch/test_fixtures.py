"""Adapters of twelve PEFT versions: A and B, logits and merged weights."""

from __future__ import annotations

import hashlib
import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from releases import AS_STORED
from safetensors.torch import load_file

from vera_convert.conversion.projections import ProjectionSource
from vera_convert.with_torch import VeraModel

FIXTURES = Path(__file__).parent.parent / "data" / "fixtures"
EXPECTED = sorted(FIXTURES.glob("*/*/expected*.json"))
NATIVE_BFLOAT16 = ("0.11.0", "0.11.1")
"""PEFT versions that merged 16-bit bases in 16-bit arithmetic; we meet only their tolerance."""


@cache
def base(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text())
    return (
        getattr(transformers, config["architectures"][0])
        .from_pretrained(folder, **AS_STORED)
        .eval()
    )


def test_every_fixture_is_tested() -> None:
    assert len(EXPECTED) == 98


@pytest.mark.parametrize(
    "path", EXPECTED, ids=lambda p: str(p.relative_to(FIXTURES).with_suffix(""))
)
def test_an_adapter_gives_the_outputs_that_its_peft_recorded(path: Path) -> None:
    expected = json.loads(path.read_text())
    projections = ProjectionSource.AUTO if expected["default_semantics"] else ProjectionSource.KEY
    model = VeraModel.from_pretrained(
        deepcopy(base(FIXTURES / expected["base"])),
        FIXTURES / expected["adapter_dir"],
        projections=projections,
    )
    native = model.dtype == torch.bfloat16 and path.parts[-3] in NATIVE_BFLOAT16
    if not native:
        for name, matrix in (("vera_A", model.vera_A.default), ("vera_B", model.vera_B.default)):
            known = expected["projections_in_effect"][name]
            assert hashlib.sha256(matrix.numpy().tobytes()).hexdigest() == known["sha256"]
    tolerance = expected["tolerance"]["logits_max_abs"]
    ids, known = torch.tensor(expected["input_ids"]), torch.tensor(expected["logits_merged"])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits.float(), known, rtol=0, atol=tolerance)
        model.merge()
        torch.testing.assert_close(model(ids).logits.float(), known, rtol=0, atol=tolerance)
    merged = model.unload().state_dict()
    changed = load_file(FIXTURES / expected["merged_changed_tensors_file"])
    for name, tensor in changed.items():
        if tensor.dtype == torch.float32:
            torch.testing.assert_close(merged[name], tensor, rtol=0, atol=2e-7)
        elif not native:
            assert torch.equal(merged[name], tensor)
        else:
            torch.testing.assert_close(merged[name], tensor, rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize("form", ["save_projection_true", "save_projection_false"])
def test_the_trained_adapter_gives_its_probe_logits(
    form: str, minilm: Path, minilm_model: Path
) -> None:
    note = json.loads((minilm / "note.json").read_text())
    encoder = transformers.AutoModel.from_pretrained(minilm_model).eval()
    model = VeraModel.from_pretrained(encoder, minilm / form)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_model)
    batch = tokenizer(
        note["probe_texts"], padding=True, truncation=True, max_length=48, return_tensors="pt"
    )
    with np.load(minilm / "head.npz") as head, torch.no_grad():
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        logits = pooled @ torch.from_numpy(head["weight"]).T + torch.from_numpy(head["bias"])
    known = torch.tensor(note["probe_logits"])
    torch.testing.assert_close(logits, known, rtol=0, atol=1e-5)
