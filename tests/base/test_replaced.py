"""Report, card and provenance name each tensor that an adapter replaces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import good_adapter
from merges import filled_base, merged_with, tensors_of

from vera_convert.assembly.addends import Numbers
from vera_convert.errors import CheckpointError
from vera_convert.formats.document import result_document
from vera_convert.formats.merge import merge_text
from vera_convert.merging.merge import Merge
from vera_convert.merging.report import ReplacedTensor

PREFIX = "base_model.model."
HEAD = "lm_head.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"


def replacing(folder: Path, values: dict[str, Any], **fields: Any) -> Path:
    tensors = {PREFIX + name: np.asarray(value, np.float32) for name, value in values.items()}
    return good_adapter(folder, tensors=tensors, **fields)


def codes(done: Merge) -> list[str]:
    return [finding.code for finding in done.findings]


def test_every_replaced_tensor_is_reported_with_the_size_of_its_change(tmp_path: Path) -> None:
    base = filled_base(tmp_path / "base")
    old = tensors_of(base)[HEAD].astype(np.float64)
    new = np.random.default_rng(5).normal(0, 0.3, (32, 16)).astype(np.float32)
    adapter = replacing(tmp_path / "a", {HEAD: new}, modules_to_save=["lm_head"])
    done = merged_with(adapter, base, tmp_path / "out")
    wanted = np.linalg.norm(new - old) / np.linalg.norm(old)
    (tensor,) = done.replaced
    assert (tensor.name, tensor.shape, tensor.base_shape) == (HEAD, (32, 16), (32, 16))
    assert "V574" not in codes(done)
    assert f"{HEAD}: changes by {wanted:.3g} times its norm" in merge_text(done)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| `{HEAD}` | changes by {wanted:.3g} times its norm |" in card
    record = json.loads((tmp_path / "out" / "merge-provenance.json").read_bytes())
    (found,) = [each for each in record["tensors"] if each["name"] == HEAD]
    assert found["kind"] == "replaced"
    assert found["relative_change"] == pytest.approx(wanted, rel=1e-3)
    document = json.loads(json.dumps(result_document(done)))
    (listed,) = document["replaced"]
    assert listed["relative_change"] == pytest.approx(wanted, rel=1e-3)
    # The numbers of the deltas do not include the replaced tensors.
    alone = merged_with(good_adapter(tmp_path / "b"), base, tmp_path / "alone")
    assert document["numbers"] == result_document(alone)["numbers"]


def test_a_replaced_tensor_of_zeros_has_no_relative_change() -> None:
    numbers = Numbers(values=2, changed=2, change=8.0)
    tensor = ReplacedTensor(HEAD, "adapter", (2,), (2,), numbers, None)
    assert tensor.change == "changes from zeros"


def test_a_report_without_replaced_tensors_does_not_mention_replacement(tmp_path: Path) -> None:
    adapter, base = good_adapter(tmp_path / "a"), filled_base(tmp_path / "base")
    done = merged_with(adapter, base, tmp_path / "out")
    assert done.replaced == ()
    assert not any(line.startswith("replaced") for line in merge_text(done).splitlines())
    assert "adapter's own" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_tensor_replaced_by_a_single_value_is_a_warning(tmp_path: Path, value: float) -> None:
    base = filled_base(tmp_path / "base")
    adapter = replacing(
        tmp_path / "a", {HEAD: np.full((32, 16), value)}, modules_to_save=["lm_head"]
    )
    done = merged_with(adapter, base, tmp_path / "out")
    (finding,) = [each for each in done.findings if each.code == "V574"]
    assert finding.place == HEAD
    assert f"are {value:g}" in finding.reason
    assert f"all values are {value:g}" in merge_text(done)


def test_biases_that_stayed_zero_are_no_warning(tmp_path: Path) -> None:
    shapes = {BIAS: (16,)}
    base = filled_base(tmp_path / "base", tensors=shapes)
    own = tensors_of(base)[BIAS]
    name = BIAS.replace(".bias", ".base_layer.bias")
    same = replacing(tmp_path / "same", {name: own}, bias="all")
    done = merged_with(same, base, tmp_path / "out")
    assert [each.change for each in done.replaced] == ["the base's own values"]
    assert codes(done) == []
    zero = replacing(tmp_path / "zero", {name: np.zeros(16)}, bias="all")
    assert "V574" in codes(merged_with(zero, base, tmp_path / "zeroed"))


def test_a_new_head_is_listed_as_new(tmp_path: Path) -> None:
    base = filled_base(tmp_path / "base")
    adapter = replacing(
        tmp_path / "a", {"score.weight": np.zeros((3, 16))}, modules_to_save=["score"]
    )
    done = merged_with(adapter, base, tmp_path / "out", dry_run=True)
    assert "score.weight: new: the base has no such tensor" in merge_text(done)
    assert "V574" in codes(done), "a head of zeros alone"


def test_large_tensors_are_compared_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = filled_base(tmp_path / "base", dtypes={"lm_head": "bfloat16"})
    values = np.zeros((32, 16), np.float32)
    values[-1, -1] = 1
    adapter = replacing(tmp_path / "a", {HEAD: values}, modules_to_save=["lm_head"])
    whole = merged_with(adapter, base, tmp_path / "whole").replaced[0]
    monkeypatch.setattr("vera_convert.assembly.input_files._BLOCK_VALUES", 7)
    blocks = merged_with(adapter, base, tmp_path / "blocks").replaced[0]
    assert blocks.numbers is not None
    assert whole.numbers is not None
    assert blocks.numbers.change == pytest.approx(whole.numbers.change)
    assert (blocks.numbers.values, blocks.constant) == (512, None)


def test_a_fully_trained_layer_of_the_body_does_not_change_the_labels(tmp_path: Path) -> None:
    config = {"architectures": ["HubertForSequenceClassification"], "model_type": "hubert"}
    base = filled_base(tmp_path / "base", tensors={"projector.weight": (8, 16)}, config=config)
    adapter = replacing(
        tmp_path / "a", {"projector.weight": np.ones((8, 16))}, modules_to_save=["projector"]
    )
    merged_with(adapter, base, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_bytes()) == config


def test_a_fully_trained_module_is_not_searched_in_fused_experts(
    tmp_path: Path,
) -> None:
    own, expert = "model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.experts.{}.gate_proj"
    experts = [f"{expert.format(n)}.weight" for n in range(2)]
    base = filled_base(tmp_path / "base", tensors=dict.fromkeys((own, *experts), (8, 16)))
    values = {own: np.eye(8, 16)}
    adapter = replacing(tmp_path / "a", values, modules_to_save=["gate_proj"])
    assert codes(merged_with(adapter, base, tmp_path / "out")) == []
    partly = {**values, experts[0]: np.eye(8, 16)}
    adapter = replacing(tmp_path / "b", partly, modules_to_save=["gate_proj"])
    with pytest.raises(CheckpointError, match=r"V222 model\.layers\.1\.mlp\.experts\.1"):
        merged_with(adapter, base, tmp_path / "partly")
