"""The dims of A and B on a base, and the outputs that overlap a base."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapterdefects import all_of, drawn, tensors
from adapters import RANK, good_adapter
from bases import LLAMA_SIZES, tiny_base
from folders import DATA, WEIGHTS, base_of, codes, refusal, weights

from vera_convert.base.facts import BaseOptions
from vera_convert.conversion.strip_embed import embed, strip
from vera_convert.errors import UsageError

FIXTURES = DATA / "fixtures"


# --- dims that the base decides ------------------------------------------------------------------


NAMES: Mapping[str, Callable[[str], str]] = {
    "prefix added": lambda name: name.replace("model.layers", "layers"),
    "prefix removed": lambda name: name.replace("model.layers", "transformer.model.layers"),
}


@pytest.mark.parametrize("rename", NAMES.values(), ids=NAMES)
def test_a_base_whose_names_have_another_prefix_decides_the_dims(
    rename: Callable[[str], str], tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    all_of(
        tensors(
            lambda stored: {
                "base_model.model." + rename(name.removeprefix("base_model.model."))
                if "layers" in name
                else name: array
                for name, array in stored.items()
            }
        )
    )(folder)
    base = BaseOptions(str(tiny_base(tmp_path / "base")))
    assert strip(folder, tmp_path / "out", base=base).findings == ()
    wider = tiny_base(
        tmp_path / "wider",
        config={"model_type": "llama", "num_hidden_layers": 3},
        tensors={"model.layers.2.self_attn.q_proj.weight": (16, 24)},
    )
    drawn(width=24)(folder)
    assert codes(strip(folder, tmp_path / "of-both", base=BaseOptions(str(wider)))) == {"V411"}


def test_a_tied_head_counts_with_the_embeddings_shape(tmp_path: Path) -> None:
    head = {
        "base_model.model.lm_head.vera_lambda_b": np.ones(32, np.float32),
        "base_model.model.lm_head.vera_lambda_d": np.ones(RANK, np.float32),
    }
    targets = ["q_proj", "v_proj", "lm_head"]
    folder = good_adapter(tmp_path / "adapter", tensors=head, target_modules=targets)
    drawn(height=32)(folder)
    base = tiny_base(tmp_path / "base", tensors={"lm_head.weight": None})
    assert strip(folder, tmp_path / "out", base=BaseOptions(str(base))).findings == ()


def test_biases_show_that_weights_are_stored_transposed(tmp_path: Path) -> None:
    base = BaseOptions(str(FIXTURES / "bases" / "gpt2-fp32"))
    folder = FIXTURES / "0.21.2" / "gpt2_fp32_proj"
    bare = tmp_path / "base"
    bare.mkdir()
    (bare / "model.safetensors").write_bytes(
        (Path(str(base.model)) / "model.safetensors").read_bytes()
    )
    for number, options in enumerate(
        (base, BaseOptions(str(bare)))
    ):  # with the base's config.json, and without it
        assert strip(folder, tmp_path / f"out{number}", base=options).findings == ()


def test_the_head_of_a_classifier_is_kept(tmp_path: Path) -> None:
    folder = FIXTURES / "0.21.2" / "bert_cls_fp32_proj"
    strip(folder, tmp_path / "out", base=base_of(folder))
    head = "base_model.model.classifier.weight"
    assert np.array_equal(weights(tmp_path / "out")[head], weights(folder)[head])


def test_another_model_is_refused(tmp_path: Path) -> None:
    folder = FIXTURES / "0.21.2" / "llama_fp32_proj"
    for base, code in (("gpt2-fp32", "V520"), ("bert-cls-fp32", "V520")):
        options = BaseOptions(str(FIXTURES / "bases" / base))
        assert refusal(partial(strip, folder, tmp_path / "out", base=options)) == code
    other = tiny_base(
        tmp_path / "base", tensors={"model.layers.0.self_attn.v_proj.weight": (12, 16)}
    )
    adapter = good_adapter(tmp_path / "adapter")
    assert refusal(lambda: strip(adapter, tmp_path / "out", base=BaseOptions(str(other)))) == "V522"


LLAMA: Mapping[str, Any] = {"model_type": "llama", **LLAMA_SIZES}


def test_a_base_of_a_known_type_needs_no_weights(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter", stripped=True)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(LLAMA))
    options = BaseOptions(str(base))
    with pytest.raises(UsageError, match="dtype"):
        embed(folder, tmp_path / "out", base=options)
    done = embed(folder, tmp_path / "out", base=BaseOptions(str(base), dtype="float32"))
    assert codes(done) == {"V410"}
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (
        good_adapter(tmp_path / "good") / WEIGHTS
    ).read_bytes()
    for change, code in (
        ({"num_hidden_layers": 1}, "V520"),
        ({"hidden_size": 32}, "V522"),
        ({"model_type": "unheard-of"}, "V560"),
    ):
        (base / "config.json").write_text(json.dumps({**LLAMA, **change}))
        act = lambda: embed(folder, tmp_path / "no", base=BaseOptions(str(base), dtype="float32"))  # noqa: E731
        assert refusal(act) == code


def test_an_output_inside_the_base_is_refused(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    base = tiny_base(tmp_path / "base")
    for model in (base, base / "deep"):
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(LLAMA))
        options = BaseOptions(str(model), dtype="float32")
        with pytest.raises(UsageError, match="input"):
            strip(folder, model / "out", base=options, force=True)
