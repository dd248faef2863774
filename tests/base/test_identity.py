"""A base that differs from the config's base, or whose own config describes another model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from adapters import good_adapter
from bases import tiny_base

from vera_convert.base.identity import MORE_ROWS
from vera_convert.conversion.strip_embed import embed, strip
from vera_convert.merging.merge import merge
from vera_convert.rules import Severity
from vera_convert.summary import info
from vera_convert.validation.validate import validate

SIZES = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 32}
OF_LLAMA = {
    "base_model_class": "LlamaModel",
    "parent_library": "transformers.models.llama.modeling_llama",
}


def base_codes(adapter: Path, base: Path) -> list[str]:
    """Return the codes of all findings about the base, with repeated codes."""
    (checked,) = validate([adapter], base=base, select=["V558", "V559"]).adapters
    assert all(finding.severity is Severity.WARNING for finding in checked.findings)
    return [finding.code for finding in checked.findings]


NAMES: Mapping[str, tuple[str, str, dict[str, object], bool]] = {
    "a copy under another name": ("org/tiny-llama", "base", {}, False),
    "a path": ("/models/llama", "models--org--other/snapshots/abc", {}, False),
    "no name": ("", "models--org--other/snapshots/abc", {}, False),
    "a mirror": ("org/Tiny", "models--mirror--tiny/snapshots/abc", {}, False),
    "a tuned copy that names its parent": ("org/tuned", "base", {"_name_or_path": "o/p"}, False),
    "the cache's copy": ("org/tiny", "models--org--tiny/snapshots/abc", {}, False),
    "the cache's copy of another": ("org/tiny", "models--org--other/snapshots/abc", {}, True),
}


@pytest.mark.parametrize(("named", "folder", "config", "differs"), NAMES.values(), ids=NAMES)
def test_another_model_s_name_is_reported_once(
    named: str, folder: str, config: dict[str, object], differs: bool, tmp_path: Path
) -> None:
    adapter = good_adapter(tmp_path / "adapter", base_model_name_or_path=named or None)
    base = tiny_base(tmp_path / folder, config={**SIZES, **config})
    assert base_codes(adapter, base) == ["V558"] * differs


CARDS: Mapping[str, tuple[str, bool]] = {
    "tuned": ("---\nbase_model: Org/Tiny\nbase_model_relation: finetune\n---\n", True),
    "merged": (
        '---\nbase_model:\n  - "org/tiny"\nbase_model_relation: merge\n---',
        True,
    ),
    "a list": ("---\nbase_model_relation: 'finetune'\nbase_model:\n- o/p\n- org/tiny\n---", True),
    "quantized": ("---\nbase_model: org/tiny\nbase_model_relation: quantized\n---\n", False),
    "a mirror": ("---\nbase_model: org/tiny\n---\n", False),
    "of another": ("---\nbase_model: org/other\nbase_model_relation: finetune\n---\n", False),
    "in the text": ("base_model: org/tiny\nbase_model_relation: finetune\n", False),
    "below": ("---\nx: y\n---\nbase_model: org/tiny\nbase_model_relation: finetune\n", False),
    "empty": ("", False),
}


@pytest.mark.parametrize(("card", "differs"), CARDS.values(), ids=CARDS)
def test_a_folder_whose_card_says_that_it_was_tuned_is_not_the_named_model(
    card: str, differs: bool, tmp_path: Path
) -> None:
    adapter = good_adapter(tmp_path / "adapter", base_model_name_or_path="org/tiny")
    base = tiny_base(tmp_path / "base", config=SIZES)
    (base / "README.md").write_text(card, encoding="utf-8")
    assert base_codes(adapter, base) == ["V558"] * differs


@pytest.mark.parametrize(
    ("mapping", "config", "differs"),
    [
        (OF_LLAMA, {}, False),
        (OF_LLAMA, {"model_type": "mistral"}, True),
        (OF_LLAMA, {"model_type": "mistral", "architectures": ["LlamaModel"]}, False),
        (OF_LLAMA, {"model_type": "llama4_text"}, False),
        (OF_LLAMA, {"model_type": "x", "text_config": {"model_type": "llama"}}, False),
        ({**OF_LLAMA, "parent_library": "__main__"}, {"model_type": "mistral"}, False),
        ({**OF_LLAMA, "parent_library": "transformers_modules.a.b"}, {"model_type": "x"}, False),
        (None, {"model_type": "mistral"}, False),
    ],
    ids=str,
)
def test_another_class_is_reported_once(
    mapping: dict[str, str] | None, config: dict[str, object], differs: bool, tmp_path: Path
) -> None:
    adapter = good_adapter(tmp_path / "adapter", task_type=None, auto_mapping=mapping)
    base = tiny_base(tmp_path / "base", config={**SIZES, **config})
    assert base_codes(adapter, base) == ["V558"] * differs


@pytest.mark.parametrize(
    ("config", "differs"),
    [
        ({}, False),
        ({"num_hidden_layers": 3}, False),
        ({"num_hidden_layers": 1}, True),
        ({"hidden_size": 64}, True),
        ({"hidden_size": 64, "embedding_size": 16}, False),
        ({"vocab_size": 64}, True),
        ({"hidden_size": 64, "vocab_size": 64, "num_hidden_layers": 1}, True),
        ({"hidden_size": "16"}, False),
    ],
    ids=str,
)
def test_other_sizes_that_still_fit_are_reported_once(
    config: dict[str, object], differs: bool, tmp_path: Path
) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    assert base_codes(adapter, tiny_base(tmp_path / "base", config={**SIZES, **config})) == (
        ["V559"] * differs
    )
    nested = {"model_type": "x", "text_config": {**SIZES, **config}}
    assert base_codes(adapter, tiny_base(tmp_path / "nested", config=nested)) == ["V559"] * differs


@pytest.mark.parametrize("kind", sorted(MORE_ROWS))
def test_an_embedding_with_more_rows_than_tokens_is_not_reported(kind: str, tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    config = {**SIZES, "vocab_size": 64}
    assert (
        base_codes(adapter, tiny_base(tmp_path / "a", config={**config, "model_type": kind})) == []
    )
    nested = {"model_type": "x", "text_config": {**config, "model_type": kind}}
    assert base_codes(adapter, tiny_base(tmp_path / "b", config=nested)) == []


@pytest.mark.parametrize("stripped", [True, False])
def test_every_command_that_reads_a_base_reports_another_model(
    stripped: bool, tmp_path: Path
) -> None:
    adapter = good_adapter(tmp_path / "adapter", stripped=stripped)
    config: dict[str, Any] = {**SIZES, "num_hidden_layers": 1}
    base = tiny_base(tmp_path / "models--org--other" / "snapshots" / "abc", config=config)
    results: list[Any] = [info(adapter, base=base), merge(adapter, tmp_path / "merged", base=base)]
    act = embed if stripped else strip
    results.append(act(adapter, tmp_path / "out", base=base))
    for result in results:
        codes = [finding.code for finding in result.findings]
        assert codes.count("V558") == codes.count("V559") == 1


@pytest.mark.parametrize(
    ("fields", "differs"),
    [
        ({}, True),
        ({"num_mel_attn_blocks": 2}, False),
        ({"num_mel_attn_blocks": 3}, True),
        ({"vision_config": {"deepstack_visual_indexes": [5, 11]}}, False),
        ({"vision_config": {"depths": [2, 2, 6]}}, True),
        ({"num_attention_heads": 2, "num_key_value_heads": 2, "eos_token_id": 2}, True),
    ],
    ids=str,
)
def test_a_stack_as_long_as_a_number_in_the_config_is_complete(
    fields: dict[str, object], differs: bool, tmp_path: Path
) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    config = {**SIZES, "num_hidden_layers": 1, **fields}
    assert base_codes(adapter, tiny_base(tmp_path / "base", config=config)) == ["V559"] * differs


def test_a_config_that_counts_only_other_stacks_is_not_reported(tmp_path: Path) -> None:
    # Funnel counts only the layers of its decoder; a list of sizes describes the encoder.
    adapter = good_adapter(tmp_path / "adapter")
    config = {"model_type": "funnel", "block_sizes": [4, 4], "num_decoder_layers": 1}
    assert base_codes(adapter, tiny_base(tmp_path / "base", config=config)) == []
