"""Read an adapter as a record: every tensor has a meaning, or the adapter is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from adapters import HIDDEN, RANK, good_adapter, good_tensors
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file

from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.opening import open_adapter
from vera_convert.adapter.saved_modules import SavedModules, replaced_name
from vera_convert.adapter.sorting import sort_tensors
from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.files.tensorfile import from_array
from vera_convert.rules import Severity
from vera_convert.validation.validate import validate

MODEL = "base_model.model."
ATTENTION = f"{MODEL}model.layers.0.self_attn."


def names(adapter: Adapter) -> list[str]:
    """Return the names of all tensors that have a meaning in the adapter."""
    lambdas = [
        tensor for layer in adapter.layers.values() for tensor in (layer.lambda_b, layer.lambda_d)
    ]
    pair = adapter.projections
    shared = [pair.A, pair.B] if pair else []
    return [t.name for t in (*lambdas, *shared, *adapter.repeated, *adapter.replacements)]


def zeros(*shape: int) -> NDArray[Any]:
    return np.zeros(shape, np.float32)


def test_adapters_of_every_peft_are_read(fixtures: Path) -> None:
    folders = sorted(path.parent for path in fixtures.glob("*/*/adapter_config.json"))
    assert len(folders) == 74
    for folder in folders:
        expected = json.loads((folder / "expected.json").read_bytes())
        stored = load_file(folder / "adapter_model.safetensors")
        with open_adapter(folder) as adapter:
            assert sorted(adapter.layers) == expected["adapted_modules"]
            assert sorted(names(adapter)) == sorted(stored)
            assert (adapter.projections is not None) == ("base_model.vera_A" in stored)
            assert (adapter.projections is not None) == adapter.config.save_projection
            heads = {MODEL + name for name in ("classifier.weight", "classifier.bias")}
            is_classifier = "bert" in folder.name
            assert {t.name for t in adapter.replacements} == (heads if is_classifier else set())
            assert adapter.weights_size == (folder / "adapter_model.safetensors").stat().st_size
            assert adapter.metadata == {"format": "pt"}
            assert adapter.findings == ()
            assert adapter.fingerprint is None


def test_the_trained_adapter_is_read(minilm: Path) -> None:
    with open_adapter(minilm / "save_projection_true") as adapter:
        assert adapter.projections is not None
        assert adapter.longest_b == adapter.projections.out_features == 1536
    with open_adapter(minilm / "save_projection_false") as adapter:
        assert adapter.projections is None


def test_an_adapter_has_the_dims_of_its_tensors(tmp_path: Path) -> None:
    with open_adapter(good_adapter(tmp_path / "adapter")) as adapter:
        assert adapter.projections is not None
        assert (adapter.projections.in_features, adapter.projections.out_features) == (16, 16)
        assert [layer.out_features for layer in adapter.layers.values()] == [16, 8, 16, 8]
        assert adapter.longest_b == 16


def test_each_tensor_keeps_its_own_dtype(tmp_path: Path) -> None:
    values = {
        f"{ATTENTION}q_proj.vera_lambda_b": np.linspace(-1, 1, 16).astype(ml_dtypes.bfloat16),
        f"{ATTENTION}q_proj.vera_lambda_d": np.linspace(-1, 1, RANK).astype(np.float32),
        "base_model.vera_A": np.ones((RANK, HIDDEN), np.float16),
        "base_model.vera_B": np.ones((16, RANK), np.float64),
    }
    with open_adapter(good_adapter(tmp_path / "adapter", tensors=values)) as adapter:
        by_name = {tensor.name: tensor for tensor in adapter.tensors}
        for name, array in values.items():
            assert by_name[name].array().dtype == array.dtype
            assert np.array_equal(by_name[name].array(), array)
        assert [finding.code for finding in adapter.findings] == ["V207"]


@pytest.mark.parametrize(
    ("config", "more"),
    [
        ({"modules_to_save": ["score"]}, ["score.weight"]),
        ({"modules_to_save": ["score"]}, ["model.score.dense.weight", "model.score.dense.bias"]),
        ({"modules_to_save": ["model.norm"]}, ["model.norm.weight"]),
        # PEFT compares the name with the end of the path, also inside an element of the path.
        ({"modules_to_save": ["_norm"]}, ["model.final_norm.weight"]),
        ({"task_type": "SEQ_CLS"}, ["classifier.weight", "classifier.bias"]),
        (
            {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]},
            ["classifier.dense.weight"],
        ),
        ({"task_type": "QUESTION_ANS", "modules_to_save": ["qa_outputs"]}, ["qa_outputs.weight"]),
        ({"bias": "vera_only"}, ["model.layers.0.self_attn.q_proj.base_layer.bias"]),
        (
            {"bias": "all"},
            ["model.layers.0.self_attn.q_proj.base_layer.bias", "model.layers.0.mlp.up_proj.bias"],
        ),
        ({}, ["model.embed_tokens.weight", "lm_head.weight"]),
        ({}, ["lm_head.base_layer.weight"]),
    ],
    ids=str,
)
def test_a_tensor_that_the_config_explains_is_a_replacement(
    tmp_path: Path, config: dict[str, Any], more: list[str]
) -> None:
    tensors = {MODEL + name: zeros(4, 4) for name in more}
    with open_adapter(good_adapter(tmp_path / "adapter", tensors=tensors, **config)) as adapter:
        assert sorted(t.name for t in adapter.replacements) == sorted(tensors)
        assert adapter.findings == ()


HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}
OF_CLASSES: dict[str, tuple[str, str, Severity | None]] = {
    "OPT": ("SEQ_CLS", "model.decoder.layers.0.self_attn.q_proj", Severity.ERROR),
    "Llama": ("SEQ_CLS", "model.layers.0.self_attn.q_proj", Severity.ERROR),
    "MPT": ("QUESTION_ANS", "transformer.blocks.0.attn.Wqkv", Severity.ERROR),
    "DistilBERT": ("SEQ_CLS", "distilbert.transformer.layer.0.ffn.lin1", Severity.ERROR),
    "BART or T5Gemma": ("SEQ_CLS", "model.encoder.layers.0.self_attn.q_proj", Severity.WARNING),
    "BART of questions": (
        *("QUESTION_ANS", "model.encoder.layers.0.self_attn.q_proj"),
        Severity.ERROR,
    ),
    "BART": ("SEQ_CLS", "model.decoder.layers.0.encoder_attn.q_proj", None),
    "BART's encoder": ("SEQ_CLS", "model.encoder.layers.0.fc1", None),
    "T5": ("SEQ_CLS", "transformer.encoder.block.0.layer.0.SelfAttention.q", None),
    "XLM": ("SEQ_CLS", "transformer.attentions.0.q_lin", None),
    "XLNet": ("SEQ_CLS", "transformer.layer.0.ff.layer_1", None),
    "ModernBERT of questions": ("QUESTION_ANS", "model.layers.0.attn.Wqkv", None),
    "Splinter": ("QUESTION_ANS", "splinter.encoder.layer.0.attention.self.query", None),
    "TAPAS": ("QUESTION_ANS", "tapas.encoder.layer.0.attention.self.query", None),
    "VisualBERT": ("QUESTION_ANS", "visual_bert.encoder.layer.0.attention.self.query", None),
    "XLNet of questions": ("QUESTION_ANS", "transformer.layer.0.ff.layer_1", Severity.WARNING),
    "BROS": ("TOKEN_CLS", "bros.encoder.layer.0.attention.self.query", Severity.WARNING),
    "tokens of BERT": ("TOKEN_CLS", "bert.encoder.layer.0.attention.self.query", Severity.ERROR),
}


@pytest.mark.parametrize(("task", "layer", "severity"), OF_CLASSES.values(), ids=OF_CLASSES)
def test_a_missing_head_is_an_error_where_peft_saves_the_head(
    tmp_path: Path, task: str, layer: str, severity: Severity | None
) -> None:
    tensors = {
        **dict.fromkeys(f"{MODEL}{name}" for name in _lambdas_of_good_adapter()),
        f"{MODEL}{layer}.vera_lambda_b": np.ones(16, "f4"),
        f"{MODEL}{layer}.vera_lambda_d": np.ones(RANK, "f4"),
    }
    folder = good_adapter(
        tmp_path / "a", tensors=tensors, task_type=task, modules_to_save=HEADS[task]
    )
    found = [each.severity for each in validate(folder).findings if each.code == "V222"]
    assert found == ([] if severity is None else [severity])


def _lambdas_of_good_adapter() -> Iterator[str]:
    names = (name.removeprefix(MODEL) for name in good_tensors())
    return (name for name in names if ".vera_lambda_" in name)


@pytest.mark.parametrize(
    ("module", "severity"),
    [
        ("v_head.summary", None),
        ("answer_head.0", None),
        ("model.norm", Severity.ERROR),
        ("pooler.dense", Severity.ERROR),
        ("model.embed_tokens", Severity.ERROR),
        ("model.layers.0.mlp", Severity.ERROR),
    ],
)
def test_another_saved_module_can_be_the_head(
    tmp_path: Path, module: str, severity: Severity | None
) -> None:
    tensors = {f"{MODEL}{module}.weight": zeros(4, 4)}
    saved = [module, *HEADS["SEQ_CLS"]]
    folder = good_adapter(
        tmp_path / "a", tensors=tensors, task_type="SEQ_CLS", modules_to_save=saved
    )
    found = [each.severity for each in validate(folder).findings if each.code == "V222"]
    assert found == ([] if severity is None else [severity])


def test_a_model_can_lack_some_of_the_modules_to_save(tmp_path: Path) -> None:
    """PEFT requires only one of the modules: a list can serve models of several types."""
    tensors = {f"{MODEL}lm_head.weight": zeros(4, 4)}
    folder = good_adapter(tmp_path / "a", tensors=tensors, modules_to_save=["lm_head", "wte"])
    (found,) = [each for each in validate(folder).findings if each.code == "V222"]
    assert (found.place, found.severity) == ("wte", Severity.WARNING)


@pytest.mark.parametrize(
    ("module", "severity"),
    [
        ("norm_out.norm", Severity.ERROR),
        ("act_fn", Severity.WARNING),
        ("mlp.dropout", Severity.WARNING),
        ("embed_tokens", Severity.ERROR),
        ("lm_head", Severity.ERROR),
        ("score", Severity.ERROR),
        ("reward_head", Severity.ERROR),
        ("pooler", Severity.ERROR),
    ],
)
def test_the_only_saved_module_may_have_no_parameters(
    module: str, severity: Severity, tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "a", modules_to_save=[module])
    (found,) = [each for each in validate(folder).findings if each.code == "V222"]
    assert (found.place, found.severity) == (module, severity)
    assert ("without parameters" in found.reason) == (severity is Severity.WARNING)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({}, "model.layers.0.self_attn.o_proj.weight"),
        ({}, "model.norm.weight"),
        ({}, "classifier.weight"),
        ({"modules_to_save": ["score"]}, "model.layers.0.mlp.up_proj.weight"),
        ({"modules_to_save": ["score"]}, "scores.weight"),
        ({"modules_to_save": [""]}, "model.norm.weight"),
        ({"bias": "vera_only"}, "model.layers.0.mlp.up_proj.bias"),
        ({"bias": "none"}, "model.layers.0.self_attn.q_proj.base_layer.bias"),
        ({"bias": "all"}, "model.layers.0.self_attn.q_proj.base_layer.weight"),
        ({"task_type": "CAUSAL_LM"}, "score.weight"),
    ],
    ids=str,
)
def test_a_tensor_that_the_config_does_not_explain_is_refused(
    tmp_path: Path, config: dict[str, Any], name: str
) -> None:
    folder = good_adapter(tmp_path / "adapter", tensors={MODEL + name: zeros(4, 4)}, **config)
    with pytest.raises(CheckpointError) as caught, open_adapter(folder):
        pass
    findings = {finding.code: finding for finding in caught.value.findings}
    assert name in findings["V221"].place


@pytest.mark.parametrize(
    ("name", "base_name"),
    [
        (f"{MODEL}classifier.weight", "classifier.weight"),
        (f"{MODEL}model.layers.0.q_proj.base_layer.bias", "model.layers.0.q_proj.bias"),
        (f"{MODEL}lm_head.base_layer.weight", "lm_head.weight"),
        (f"{MODEL}base_layer.base_layer.weight", "base_layer.weight"),
        (f"{MODEL}base_layer_norm.weight", "base_layer_norm.weight"),
        (f"{MODEL}model.layers.0.q_proj.weight", "model.layers.0.q_proj.weight"),
    ],
)
def test_a_replacement_has_a_name_in_the_base(name: str, base_name: str) -> None:
    assert replaced_name(name) == base_name


@pytest.mark.parametrize(
    ("module", "name", "saved"),
    [
        ("score", "score", True),
        ("model.score", "score", True),
        ("model.score.dense", "score", True),
        ("model.underscore", "score", True),
        ("scores", "score", False),
        ("model.score", "model.score", True),
        ("model.score", "", False),
    ],
)
def test_modules_to_save_is_matched_as_peft_does(module: str, name: str, *, saved: bool) -> None:
    assert SavedModules(VeraConfig(modules_to_save=(name, "other"))).of(module) == (
        {name} if saved else set()
    )


def test_defects_of_config_and_weights_are_reported_together(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter", r="4")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught, open_adapter(folder):
        pass
    assert [finding.code for finding in caught.value.findings] == ["V103", "V004"]


def test_a_layer_wider_than_b_is_named_with_both_sizes(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter", tensors={"base_model.vera_B": zeros(12, RANK)})
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj.* 16 .* 12 "):
        open_adapter(folder).__enter__()


def test_the_folder_of_a_named_adapter_is_found_in_its_parent(tmp_path: Path) -> None:
    named = good_adapter(tmp_path / "saved" / "vera")
    with open_adapter(named) as adapter:
        assert len(adapter.layers) == 4
    with pytest.raises(CheckpointError, match=r"V017 .*saved: .* in subfolders only \(vera\)"):
        open_adapter(named.parent).__enter__()


def test_the_refusal_of_pickled_weights_shows_a_conversion(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"V012 .*weights_only=True.*save_file"):
        open_adapter(folder).__enter__()


def test_a_missing_folder_is_no_fault_of_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SurroundingsError, match=r"no folder .*gone\\x1b"):
        open_adapter(tmp_path / "gone\x1b").__enter__()


def _appended(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def _touched(path: Path) -> None:
    stamp = path.stat().st_mtime_ns + 1_000_000_000
    os.utime(path, ns=(stamp, stamp))


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("change", [_appended, _touched, _cut])
def test_a_file_that_changes_while_it_is_read_is_noticed(
    tmp_path: Path, name: str, change: Callable[[Path], None]
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    with open_adapter(folder) as adapter:
        adapter.check_unchanged()
        change(folder / name)
        with pytest.raises(SurroundingsError, match="changed while it was read"):
            adapter.check_unchanged()


def test_values_of_a_file_that_changed_are_not_returned(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    with open_adapter(folder) as adapter:
        _touched(folder / "adapter_model.safetensors")
        with pytest.raises(SurroundingsError, match="changed while it was read"):
            adapter.tensors[0].array()


ELEMENTS = st.sampled_from(
    """
    base_model model layers 0 1 self_attn q_proj lm_head embed_tokens score base_layer weight bias
    vera_A vera_B vera_lambda_b vera_lambda_d vera_lambda_c vera_C lora_A default _orig_mod
    modules_to_save
    """.split()  # noqa: SIM905 -- words read best as a text
)
NAMES = st.lists(ELEMENTS, min_size=1, max_size=6).map(".".join) | st.builds(
    "base_model.model.model.layers.{}.{}.{}".format,
    st.integers(0, 2),
    st.sampled_from(["q_proj", "v_proj"]),
    st.sampled_from(["vera_lambda_b", "vera_lambda_d", "vera_A", "weight", "base_layer.bias"]),
)
SHAPES = st.sampled_from([(), (0,), (4,), (16,), (4, 16), (16, 4), (4, 1), (1, 4), (2, 2, 2)])
CONFIGS = st.builds(
    VeraConfig,
    r=st.just(4),
    save_projection=st.booleans(),
    bias=st.sampled_from(["none", "all", "vera_only"]),
    modules_to_save=st.none() | st.just(("score",)),
    task_type=st.sampled_from([None, "SEQ_CLS"]),
)


PAIR = {"base_model.vera_A": (4, 16), "base_model.vera_B": (16, 4)}


@given(st.dictionaries(NAMES, SHAPES, max_size=4), st.sampled_from([{}, PAIR]), CONFIGS)
def test_every_tensor_has_a_meaning_or_is_an_error(
    more: dict[str, tuple[int, ...]], pair: dict[str, tuple[int, ...]], config: VeraConfig
) -> None:
    layer = f"{ATTENTION}q_proj.vera_lambda_"
    shapes: dict[str, tuple[int, ...]] = {f"{layer}b": (16,), f"{layer}d": (4,)} | pair | more
    arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    found = sort_tensors([from_array(name, array) for name, array in arrays.items()], config)
    if any(finding.severity is Severity.ERROR for finding in found.findings):
        return
    lambdas = [t for layer in found.layers.values() for t in (layer.lambda_b, layer.lambda_d)]
    stored = [found.projections.A, found.projections.B] if found.projections else []
    others = (*found.repeated, *found.replacements, *found.unread)
    sorted_ones = [tensor.name for tensor in (*lambdas, *stored, *others)]
    assert sorted(sorted_ones) == sorted(shapes)
    assert found.layers
    for adapted in found.layers.values():
        assert adapted.lambda_d.shape == (4,)
        assert len(adapted.lambda_b.shape) == 1
    if found.projections:
        assert found.projections.A.shape[0] == found.projections.B.shape[1] == 4
        tallest = max(adapted.out_features for adapted in found.layers.values())
        assert found.projections.out_features >= tallest


RESIZED_HEAD = ("weight", "modules_to_save.weight", "original_module.weight")


def test_a_saved_head_of_a_resized_vocabulary_is_stored_three_times(tmp_path: Path) -> None:
    """PEFT reads the plain name; the other two tensors are copies."""
    head = {f"{MODEL}lm_head.{name}": zeros(40, 16) for name in RESIZED_HEAD}
    folder = good_adapter(tmp_path / "a", tensors=head, modules_to_save=["lm_head"])
    with open_adapter(folder) as adapter:
        assert [each.name for each in adapter.replacements] == [f"{MODEL}lm_head.weight"]
        assert head.keys() <= {tensor.name for tensor in adapter.tensors}
        assert adapter.findings == ()


@pytest.mark.parametrize("copy", RESIZED_HEAD[1:])
def test_a_copy_of_a_saved_head_without_the_plain_name_is_refused(
    tmp_path: Path, copy: str
) -> None:
    tensors = {f"{MODEL}lm_head.{copy}": zeros(40, 16)}
    folder = good_adapter(tmp_path / "a", tensors=tensors, modules_to_save=["lm_head"])
    with pytest.raises(CheckpointError, match="V220"), open_adapter(folder):
        pass


@pytest.mark.parametrize(
    ("inside", "copies"),
    [
        ("", ("modules_to_save.", "original_module.")),
        ("dense.", ("modules_to_save.default.dense.", "original_module.dense.")),
        ("0.default.", ("modules_to_save.mine.0.default.", "original_module.0.default.")),
    ],
)
def test_the_biases_of_a_saved_head_are_stored_three_times(
    tmp_path: Path, inside: str, copies: Sequence[str]
) -> None:
    """With bias "all" PEFT stores a saved head's bias three times; one of the three replaces the
    base's.
    """
    bias = np.zeros(2, np.float32)
    plain = (f"{inside}bias", f"{inside}weight")
    head = {
        f"base_model.model.classifier.{name}": bias
        for name in (*plain, *(f"{copy}bias" for copy in copies))
    }
    folder = good_adapter(
        tmp_path / "adapter", tensors=head, bias="all", modules_to_save=["classifier", "score"]
    )
    with open_adapter(folder) as adapter:
        replacing = {tensor.name.rpartition("classifier.")[2] for tensor in adapter.replacements}
        assert replacing == {*plain}
        assert head.keys() <= {tensor.name for tensor in adapter.tensors}
