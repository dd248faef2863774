"""A and B are regenerated or dropped although a fact is missing, or file, flag and key disagree."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from adapterdefects import A, B, all_of, drawn, fields, tensors
from adapters import CONFIG, KEY, good_adapter
from bases import tiny_base
from draws import STORED, as_peft_stored
from folders import CONFIG_NAME, WEIGHTS, bytes_by_name, codes, refusal, weights
from safetensors.numpy import load_file

from vera_convert.base.facts import BaseOptions
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.conversion.regeneration import regenerate_for
from vera_convert.conversion.strip_embed import embed, strip
from vera_convert.draws.generator import Rounding, Variant
from vera_convert.draws.recognition import recognize
from vera_convert.errors import SurroundingsError, UsageError

# --- missing facts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (BaseOptions(), "cannot be drawn from the adapter alone"),
        (BaseOptions(dtype="float32"), "cannot be drawn from the adapter alone"),
        (BaseOptions(in_features=16), "in_features and out_features belong together: give both"),
        (BaseOptions(out_features=16, dtype="float32"), "give both"),
        (BaseOptions(in_features=16, out_features=16), "dtype"),
        (
            BaseOptions(model="base", in_features=16, out_features=16),
            "base or in_features and out_features, not both",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", [None, "/data/llama", "C:\\models\\llama"])
def test_embed_asks_for_missing_facts(
    options: BaseOptions, said: str, name: str | None, tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter", stripped=True, base_model_name_or_path=name)
    with pytest.raises(UsageError, match=said):
        embed(folder, tmp_path / "out", base=options)
    assert not (tmp_path / "out").exists()


def test_embed_needs_the_base_that_the_config_names(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter", stripped=True)
    with pytest.raises(SurroundingsError, match="example/tiny-llama"):
        embed(folder, tmp_path / "out")


def test_embed_reports_the_draw_if_no_fingerprint_proves_the_draw(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter", stripped=True)
    options = BaseOptions(in_features=16, out_features=16, dtype="float32")
    done = embed(folder, tmp_path / "out", base=options)
    assert codes(done) == {"V410"}
    assert "float32-fused draw of key 7 for r = 4, 16 inputs, 16 outputs" in done.changes[0]
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (
        good_adapter(tmp_path / "good") / WEIGHTS
    ).read_bytes()


@pytest.mark.parametrize(
    ("lambdas", "dtype", "stored"),
    [
        (np.float32, "float32", "F32"),
        (np.float32, "bfloat16", "F32"),
        (np.float64, "float64", "F64"),
        (np.float64, "float32", "F64"),
        (ml_dtypes.bfloat16, "bfloat16", "BF16"),
        (np.float16, "float16", "F16"),
        # If the lambdas' dtype cannot hold every value, A and B are stored in float32.
        (ml_dtypes.bfloat16, "float32", "F32"),
        (ml_dtypes.bfloat16, "float16", "F32"),
        # bfloat16 has fewer digits than float16, and float16 holds all but its smallest values.
        (np.float16, "bfloat16", "F16"),
    ],
)
def test_projections_are_stored_in_the_dtype_of_the_lambdas_if_that_is_exact(
    lambdas: Any, dtype: str, stored: str, tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter", stripped=True)
    tensors(lambda all_: {name: array.astype(lambdas) for name, array in all_.items()})(folder)
    embed(folder, tmp_path / "out", base=BaseOptions(in_features=16, out_features=16, dtype=dtype))
    pair = weights(tmp_path / "out")
    assert pair[A].dtype == pair[B].dtype == STORED[stored]
    found = recognize(pair[A], pair[B], key=KEY).draw
    assert found is not None
    assert found.variant is Variant.FLOAT32_FUSED


@pytest.mark.parametrize("variant", Variant)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_an_option_chooses_the_generator(variant: Variant, dtype: str, tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter", stripped=True)
    if dtype == "float64":
        tensors(lambda all_: {name: array.astype("f8") for name, array in all_.items()})(folder)
    options = BaseOptions(in_features=16, out_features=16, dtype=dtype)
    done = embed(folder, tmp_path / "out", base=options, generator=variant)
    expected = as_peft_stored(variant, dtype, "F64")
    stored = weights(tmp_path / "out")
    assert expected is not None
    assert np.array_equal(stored[A].astype(np.float64), expected[A])
    assert np.array_equal(stored[B].astype(np.float64), expected[B])
    assert done.draw is not None
    assert done.draw.variant is variant
    again = done.draw.matrices()
    assert np.array_equal(again[0].astype(np.float64), expected[A])


def test_strip_without_a_base_names_the_base_dtypes_that_restore_a_and_b(tmp_path: Path) -> None:
    for rounding, dtype in ((Rounding.NONE, "float32"), (Rounding.BF16, "bfloat16")):
        folder = good_adapter(tmp_path / f"adapter-{dtype}")
        drawn(rounding=rounding)(folder)
        done = strip(folder, tmp_path / f"out-{dtype}")
        (finding,) = done.findings
        assert finding.code == "V404"
        assert f"on a base loaded in {dtype}" in finding.reason
        assert "the width of A (16) and the rounding" in finding.reason
        assert "example/tiny-llama" in finding.reason


def test_an_option_for_the_dtype_proves_the_rounding_but_not_the_width(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    done = strip(folder, tmp_path / "out", base=BaseOptions(dtype="float32"))
    assert [finding.reason.count("rounding") for finding in done.findings] == [0]
    assert "the width of A" in done.findings[0].reason


def test_a_stripped_pair_is_restored_although_the_base_would_round_differently(
    tmp_path: Path,
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    options = BaseOptions(str(tiny_base(tmp_path / "base", dtype="bfloat16")))
    strip(folder, tmp_path / "stripped", base=options, accept_change=True)
    for number, each in enumerate((None, options, BaseOptions(dtype="bfloat16"))):
        embed(tmp_path / "stripped", tmp_path / f"back{number}", base=each)
        assert bytes_by_name(tmp_path / f"back{number}") == bytes_by_name(folder)


def test_a_generator_that_contradicts_the_fingerprint_is_refused(tmp_path: Path) -> None:
    strip(good_adapter(tmp_path / "adapter"), tmp_path / "stripped")
    embed(tmp_path / "stripped", tmp_path / "a", generator=Variant.FLOAT32_FUSED)
    with pytest.raises(UsageError, match=r"drawn as float32-fused.* float64-fused out"):
        embed(tmp_path / "stripped", tmp_path / "b", generator=Variant.FLOAT64_FUSED)


# --- where flag, file and key disagree -----------------------------------------------------------

OTHERS = drawn(key=KEY + 1)
BF16 = drawn(rounding=Rounding.BF16)
DENIED = fields({"save_projection": False})


@pytest.mark.parametrize(
    ("spoil", "projections", "outcome"),
    [
        # the flag is true: the stored A and B are used, unless the option asks for the key's
        (all_of(), "auto", "same"),
        (all_of(), "file", "same"),
        (all_of(), "key", "same"),
        (OTHERS, "auto", "V402"),
        (OTHERS, "file", "V402"),
        (OTHERS, "key", "replaced"),
        (BF16, "auto", "V403"),
        (BF16, "key", "replaced"),
        # the flag is false: an option decides between different pairs
        (DENIED, "auto", "same"),
        (DENIED, "file", "same"),
        (DENIED, "key", "same"),
        (all_of(OTHERS, DENIED), "auto", "V406"),
        (all_of(OTHERS, DENIED), "file", "V402"),
        (all_of(OTHERS, DENIED), "key", "replaced"),
        (all_of(BF16, DENIED), "auto", "V406"),
        (all_of(BF16, DENIED), "file", "V403"),
        (all_of(BF16, DENIED), "key", "replaced"),
    ],
)
def test_strip_uses_the_right_projections(
    spoil: Callable[[Path], None], projections: str, outcome: str, tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    good = weights(folder)
    spoil(folder)
    options = BaseOptions(str(tiny_base(tmp_path / "base")))
    act = partial(
        strip,
        folder,
        tmp_path / "out",
        base=options,
        projections=ProjectionSource(projections),
    )
    if outcome.startswith("V"):
        assert refusal(act) == outcome
        assert not (tmp_path / "out").exists()
        return
    done = act()
    assert codes(done) == set()
    assert ("replaced A and B" in done.changes[0]) is (outcome == "replaced")
    assert json.loads((tmp_path / "out" / CONFIG_NAME).read_bytes()) == {
        **CONFIG,
        "save_projection": False,
    }
    embed(tmp_path / "out", tmp_path / "back")
    assert np.array_equal(weights(tmp_path / "back")[A], good[A])
    assert np.array_equal(weights(tmp_path / "back")[B], good[B])


@pytest.mark.parametrize(
    ("spoil", "projections", "outcome"),
    [
        (all_of(), "auto", "copied"),
        (all_of(), "file", "copied"),
        (all_of(), "key", "copied"),
        (OTHERS, "auto", "copied"),
        (OTHERS, "key", "key"),
        (BF16, "key", "key"),
        (DENIED, "auto", "file"),
        (DENIED, "key", "file"),
        (all_of(OTHERS, DENIED), "auto", "V406"),
        (all_of(OTHERS, DENIED), "file", "file"),
        (all_of(OTHERS, DENIED), "key", "key"),
        (all_of(BF16, DENIED), "auto", "V406"),
        (all_of(BF16, DENIED), "file", "file"),
    ],
)
def test_embed_uses_the_right_projections(
    spoil: Callable[[Path], None], projections: str, outcome: str, tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    good = weights(folder)
    spoil(folder)
    stored = weights(folder)
    options = BaseOptions(str(tiny_base(tmp_path / "base")))
    act = partial(
        embed,
        folder,
        tmp_path / "out",
        base=options,
        projections=ProjectionSource(projections),
    )
    if outcome.startswith("V"):
        assert refusal(act) == outcome
        assert not (tmp_path / "out").exists()
        return
    done = act()
    assert (done.changes == ()) is (outcome == "copied")
    assert done.embedded
    assert json.loads((tmp_path / "out" / CONFIG_NAME).read_bytes())["save_projection"] is True
    expected = good if outcome == "key" else stored
    assert np.array_equal(weights(tmp_path / "out")[A], expected[A])
    assert np.array_equal(weights(tmp_path / "out")[B], expected[B])


def test_the_key_s_projections_need_a_dtype(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter", base_model_name_or_path=None)
    OTHERS(folder)
    for act in (strip, embed):
        with pytest.raises(UsageError, match="--base-dtype"):
            act(folder, tmp_path / "out", projections=ProjectionSource.KEY)
        options = BaseOptions(dtype="bfloat16")
        done = act(folder, tmp_path / act.__name__, projections=ProjectionSource.KEY, base=options)
        assert "replaced A and B by the draw of the config's key" in done.changes[0]


def test_the_option_key_takes_precedence_over_a_fingerprint(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    drawn(variant=Variant.FLOAT32_SEPARATE)(folder)
    options = BaseOptions(dtype="float32")
    strip(folder, tmp_path / "stripped", base=options, accept_change=True)
    found = embed(
        tmp_path / "stripped", tmp_path / "out", base=options, projections=ProjectionSource.KEY
    ).draw
    assert found is not None
    assert found.variant is Variant.FLOAT32_FUSED
    restored = embed(tmp_path / "stripped", tmp_path / "restored").draw
    assert restored is not None
    assert restored.variant is Variant.FLOAT32_SEPARATE


def test_a_float64_draw_is_not_rounded_in_a_separate_file(tmp_path: Path) -> None:
    """The dtype of the lambdas does not matter; the report names the stored dtype."""
    folder = good_adapter(tmp_path / "adapter", stripped=True)
    options = BaseOptions(dtype="float64", in_features=16, out_features=16)
    done = embed(folder, tmp_path / "out", base=options, generator=Variant.FLOAT64_FUSED)
    assert done.draw is not None
    assert done.draw.rounding is Rounding.FP32
    base = BaseOptions(str(tiny_base(tmp_path / "base")), dtype="float64")
    found = regenerate_for(
        folder, tmp_path / "pair.safetensors", base=base, generator=Variant.FLOAT64_FUSED
    )
    assert found.draw.rounding is Rounding.NONE
    A, _ = found.draw.matrices()
    assert np.array_equal(load_file(tmp_path / "pair.safetensors")["vera_A"], A)
