"""Compare the target rules with the installed PEFT, and with the behavior of older versions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from vera_convert.adapter.config import VeraConfig, parse_config, peft_release
from vera_convert.arguments import NEWEST_PEFT
from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.targets import patterns
from vera_convert.targets.linear import Linear, ModelLayers, layers_from_shapes
from vera_convert.targets.matching import (
    Version,
    adapted,
    default_targets,
    matching,
    resolve,
)
from vera_convert.targets.patterns import Pattern, search

# --- whole models, compared with PEFT ------------------------------------------------------------

_CAUSAL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {**_CAUSAL, "num_hidden_layers": 3},
    "LlamaModel": {**_CAUSAL, "num_hidden_layers": 2},
    "LlamaForSequenceClassification": {**_CAUSAL, "num_hidden_layers": 2},
    "Qwen2ForCausalLM": {**_CAUSAL, "num_hidden_layers": 2},
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 96},
    "BertModel": {**_ENCODER, "vocab_size": 96},
    "BertForMaskedLM": {**_ENCODER, "vocab_size": 96},
    "BertForSequenceClassification": {**_ENCODER, "vocab_size": 96},
    "BertForTokenClassification": {**_ENCODER, "vocab_size": 96},
    "BertForQuestionAnswering": {**_ENCODER, "vocab_size": 96},
    "RobertaForSequenceClassification": {**_ENCODER, "vocab_size": 96},
    "T5ForConditionalGeneration": {
        "d_model": 32,
        "d_ff": 56,
        "d_kv": 6,
        "num_heads": 3,
        "num_layers": 2,
        "vocab_size": 96,
    },
    "ViTForImageClassification": {**_ENCODER, "image_size": 8, "patch_size": 4},
}

CASES: list[tuple[str, dict[str, Any]]] = [
    # null: the default of the type
    ("LlamaForCausalLM", {}),
    ("GPT2LMHeadModel", {}),
    ("BertModel", {}),
    ("T5ForConditionalGeneration", {}),
    # lists
    ("LlamaForCausalLM", {"target_modules": ["q_proj", "down_proj"]}),
    ("LlamaForCausalLM", {"target_modules": ["self_attn.k_proj", "model.layers.1.mlp.up_proj"]}),
    ("LlamaForCausalLM", {"target_modules": ["lm_head", "q_proj", "nothing"]}),
    ("LlamaModel", {"target_modules": ["layers.0.self_attn.q_proj", "v_proj"]}),
    ("GPT2LMHeadModel", {"target_modules": ["c_attn", "mlp.c_proj"]}),
    ("T5ForConditionalGeneration", {"target_modules": ["q", "wo"]}),
    ("BertForSequenceClassification", {"target_modules": ["query", "classifier"]}),
    # regular expressions
    ("LlamaForCausalLM", {"target_modules": r".*\.[02]\..*\.(q|v)_proj"}),
    ("Qwen2ForCausalLM", {"target_modules": r"model\.layers\.1\.mlp\.\w+_proj|lm_head"}),
    ("T5ForConditionalGeneration", {"target_modules": r"decoder.*\.EncDecAttention\.[qv]"}),
    ("ViTForImageClassification", {"target_modules": r".*attention.*\.(q_proj|query)"}),
    ("LlamaForCausalLM", {"target_modules": r".*q_proj", "layers_to_transform": [0]}),
    # all-linear
    ("LlamaForCausalLM", {"target_modules": "all-linear"}),
    ("LlamaModel", {"target_modules": "All-Linear"}),
    ("GPT2LMHeadModel", {"target_modules": "all-linear"}),
    ("BertForMaskedLM", {"target_modules": "all-linear"}),
    ("BertForSequenceClassification", {"target_modules": "all-linear"}),
    ("T5ForConditionalGeneration", {"target_modules": "all-linear"}),
    ("ViTForImageClassification", {"target_modules": "ALL-LINEAR"}),
    # all-linear with a task, which saves the heads whole
    ("BertForSequenceClassification", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("RobertaForSequenceClassification", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("LlamaForSequenceClassification", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    (
        "BertForTokenClassification",
        {
            "target_modules": "all-linear",
            "task_type": "TOKEN_CLS",
            "modules_to_save": ["classifier", "score"],
        },
    ),
    (
        "BertForQuestionAnswering",
        {
            "target_modules": "all-linear",
            "task_type": "QUESTION_ANS",
            "modules_to_save": ["qa_outputs"],
        },
    ),
    # layers_to_transform acts on suffixes, and on all-linear only from 20 layers on
    ("LlamaForCausalLM", {"layers_to_transform": 1}),
    ("LlamaForCausalLM", {"layers_to_transform": [0, 2]}),
    ("LlamaForCausalLM", {"layers_to_transform": []}),
    (
        "LlamaForCausalLM",
        {"target_modules": ["q_proj", "model.layers.2.mlp.up_proj"], "layers_to_transform": [0]},
    ),
    ("LlamaForCausalLM", {"target_modules": "all-linear", "layers_to_transform": [1]}),
    ("LlamaModel", {"target_modules": "all-linear", "layers_to_transform": [1]}),
    (
        "ViTForImageClassification",
        {"target_modules": "all-linear", "layers_to_transform": [1]},
    ),
    (
        "T5ForConditionalGeneration",
        {"target_modules": "all-linear", "layers_to_transform": [1]},
    ),
    # layers_pattern
    ("LlamaForCausalLM", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    ("LlamaModel", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    ("GPT2LMHeadModel", {"layers_to_transform": [1], "layers_pattern": ["layers", "h"]}),
    ("T5ForConditionalGeneration", {"layers_to_transform": [1], "layers_pattern": "block"}),
    ("T5ForConditionalGeneration", {"layers_to_transform": [0], "layers_pattern": "layer"}),
    ("LlamaForCausalLM", {"layers_to_transform": [1], "layers_pattern": "(h|layers)"}),
    ("LlamaForCausalLM", {"layers_to_transform": [1], "layers_pattern": ["blocks", "lay.*"]}),
    # modules_to_save
    ("LlamaForCausalLM", {"target_modules": "all-linear", "modules_to_save": ["up_proj"]}),
    (
        "LlamaForCausalLM",
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["layers.1.self_attn.q_proj"]},
    ),
    (
        "RobertaForSequenceClassification",
        {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"]},
    ),
]


@pytest.fixture(scope="module")
def build() -> Callable[[str], Any]:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")

    def make(class_name: str) -> Any:
        model_class = getattr(transformers, class_name)
        torch.manual_seed(0)
        return model_class(model_class.config_class(**MODELS[class_name]))

    return make


def _layers_of(model: Any) -> ModelLayers:
    """Return the facts about a model in memory that the rules need."""
    torch = pytest.importorskip("torch")
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    linear = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            linear[name] = Linear(*module.weight.shape)
        elif isinstance(module, conv1d):
            rows, columns = module.weight.shape
            linear[name] = Linear(columns, rows, conv1d=True)
    head = model.get_output_embeddings()
    heads = frozenset(name for name, module in model.named_modules() if module is head)
    return ModelLayers(type(model).__name__, model.config.model_type, linear, heads)


def _ours(**fields: Any) -> VeraConfig:
    """Build our config from the arguments of PEFT's config."""
    frozen: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    return VeraConfig(**frozen)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("class_name", "fields"), CASES)
def test_the_installed_peft_adapts_the_same_layers(
    class_name: str, fields: dict[str, Any], build: Callable[[str], Any]
) -> None:
    peft = pytest.importorskip("peft")
    base = build(class_name)
    ours = adapted(_layers_of(base), _ours(**fields))

    wrapped = peft.get_peft_model(base, peft.VeraConfig(r=2, **fields))

    theirs = {
        name.removeprefix("base_model.model.")
        for name, module in wrapped.named_modules()
        if hasattr(module, "vera_lambda_b")
    }
    assert set(ours.layers) == theirs
    assert wrapped.base_model.vera_A["default"].shape == (2, ours.max_in)
    assert wrapped.base_model.vera_B["default"].shape == (ours.max_out, 2)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("class_name", "fields"),
    [
        ("LlamaForCausalLM", {"target_modules": ["q"]}),
        ("LlamaForCausalLM", {"target_modules": []}),
        ("LlamaForCausalLM", {"target_modules": "q_proj"}),
        ("LlamaModel", {"layers_to_transform": [1]}),
        ("BertForSequenceClassification", {"layers_to_transform": [7]}),
        ("ViTForImageClassification", {}),
    ],
)
def test_a_config_without_a_matching_layer_is_refused_as_by_peft(
    class_name: str, fields: dict[str, Any], build: Callable[[str], Any]
) -> None:
    peft = pytest.importorskip("peft")
    base = build(class_name)
    with pytest.raises(CheckpointError) as caught:
        adapted(_layers_of(base), _ours(**fields))
    assert caught.value.findings[0].code == ("V132" if fields else "V133")
    with pytest.raises(ValueError, match="target"):
        peft.get_peft_model(base, peft.VeraConfig(r=2, **fields))


@pytest.mark.parametrize("class_name", list(MODELS))
def test_headers_give_the_same_layers_as_the_model(
    class_name: str, build: Callable[[str], Any]
) -> None:
    base = build(class_name)
    shapes = {name: tuple(tensor.shape) for name, tensor in base.state_dict().items()}
    assert layers_from_shapes(shapes, model_type=base.config.model_type).linear == (
        _layers_of(base).linear
    )
    assert layers_from_shapes(shapes, model_type=base.config.model_type).output_heads == (
        _layers_of(base).output_heads
    )


def test_default_targets_equal_peft_s() -> None:
    constants = pytest.importorskip("peft.utils.constants")
    theirs = constants.TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
    assert {
        kind: list(names) if isinstance(names, tuple) else names
        for kind, names in default_targets().items()
    } == theirs


# --- names, compared with PEFT -------------------------------------------------------------------

_PARTS = ["layers", "h", "0", "1", "12", "q", "v", "mlp", "experts"]
_NAMES = st.lists(st.sampled_from(_PARTS), min_size=1, max_size=7).map(".".join)
_TARGETS = st.lists(st.lists(st.sampled_from(_PARTS), min_size=1, max_size=3).map(".".join))
_LIMITS = st.none() | st.integers(0, 1) | st.lists(st.sampled_from([0, 1, 12]), max_size=2)


def _pefts_choice(names: list[str], fields: dict[str, Any]) -> list[str]:
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    config = pytest.importorskip("peft").VeraConfig(**fields)
    return [name for name in names if tuners.check_target_module_exists(config, name)]


@settings(max_examples=300, deadline=None)
@given(
    names=st.lists(_NAMES, max_size=20),
    targets=_TARGETS,
    limit=_LIMITS,
    pattern=st.sampled_from([None, "", "layers", "h", ["h", "experts"], ["0"], []]),
    saved=st.none() | st.lists(st.sampled_from(["q", "mlp", "h", "lay"]), max_size=2),
)
def test_plain_names_match_as_in_peft(
    names: list[str],
    targets: list[str],
    limit: int | list[int] | None,
    pattern: str | list[str] | None,
    saved: list[str] | None,
) -> None:
    fields: dict[str, Any] = {
        "target_modules": targets,
        "layers_to_transform": limit,
        "layers_pattern": None if limit is None else pattern,
        "modules_to_save": saved,
    }
    assert matching(names, _ours(**fields)) == _pefts_choice(names, fields)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    names=st.lists(_NAMES, min_size=1, max_size=20),
    targets=_TARGETS | st.sampled_from([r".*q", r"(layers|h)\.\d+.*", r"(?i)LAYERS.*", ""]),
    limit=st.sampled_from([0, [1, 12]]),
    pattern=st.sampled_from(["lay.rs", "(layers|h)", "h|layers", ["x.*", r"\w+"], "(?:q|h)?"]),
    saved=st.sampled_from([None, ["mlp.q"], ["q|v"], [r"experts\.\d"]]),
)
def test_patterns_match_as_in_peft(
    names: list[str],
    targets: list[str] | str,
    limit: int | list[int],
    pattern: str | list[str],
    saved: list[str] | None,
) -> None:
    fields: dict[str, Any] = {
        "target_modules": targets,
        "layers_to_transform": limit,
        "layers_pattern": pattern,
        "modules_to_save": saved,
    }
    assert matching(names, _ours(**fields)) == _pefts_choice(names, fields)


# --- older versions ------------------------------------------------------------------------------

EXPERT = "model.layers.1.mlp.experts.0.w1"
HEADLESS = "layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("peft", "limit", "pattern", "name", "chosen"),
    [
        # PEFT 0.20 takes the first number, earlier versions the last
        ((0, 20), 1, None, EXPERT, True),
        ((0, 20), 0, None, EXPERT, False),
        ((0, 19), 1, None, EXPERT, False),
        ((0, 19), 0, None, EXPERT, True),
        ((0, 19), 1, ("layers", "experts"), EXPERT, True),
        ((0, 19), 0, ("experts", "layers"), EXPERT, True),
        # only PEFT 0.21 finds the number of a list module at the start of the path, if the pattern
        # names it
        ((0, 21), 0, None, HEADLESS, False),
        ((0, 21), 0, "layers", HEADLESS, True),
        ((0, 20), 0, "layers", HEADLESS, False),
        ((0, 20), 0, "layer.", HEADLESS, False),
        ((0, 21), 0, "layer.", HEADLESS, True),
        ((0, 19), 0, "layer.", "a.layers.0.b.layers.1.q_proj", False),
        ((0, 19), 1, "layer.", "a.layers.0.b.layers.1.q_proj", True),
        ((0, 20), 0, "layer.", "a.layers.0.b.layers.1.q_proj", True),
        # a path without a number, and a path with an absurdly large number
        ((0, 21), 0, None, "model.q_proj", False),
        ((0, 21), 0, None, f"model.layers.{'9' * 5000}.q_proj", False),
    ],
)
def test_the_number_of_a_layer_depends_on_the_version(
    peft: Version, limit: int, pattern: str | tuple[str, ...] | None, name: str, *, chosen: bool
) -> None:
    config = _ours(
        target_modules=("q_proj", "w1"), layers_to_transform=limit, layers_pattern=pattern
    )
    assert matching([name], config, peft=peft) == [name] * chosen


def test_modules_to_save_are_targets_before_0_16() -> None:
    names = ["classifier", "classifier.dense", "a.query", "my_classifier"]
    config = VeraConfig(target_modules=("query", "dense"), modules_to_save=("classifier",))
    assert matching(names, config, peft=(0, 16)) == ["a.query"]
    assert matching(names, config, peft=(0, 15)) == ["classifier.dense", "a.query"]


def _classifier_model() -> ModelLayers:
    names = ("bert.query", "bert.dense", "classifier", "nested.classifier")
    return ModelLayers("a model", "bert", dict.fromkeys(names, Linear(4, 4)))


@pytest.mark.parametrize(
    ("peft", "task_type", "expected"),
    [
        ((0, 12), "SEQ_CLS", ("query", "dense", "classifier")),
        ((0, 13), "SEQ_CLS", ("query", "dense")),
        ((0, 14), None, ("query", "dense", "classifier")),
        ((0, 15), "SEQ_CLS", ("bert.query", "bert.dense", "nested.classifier")),
        ((0, 15), None, ("bert.query", "bert.dense", "classifier", "nested.classifier")),
    ],
)
def test_all_linear_matches_as_in_older_versions(
    peft: Version, task_type: str | None, expected: tuple[str, ...]
) -> None:
    config = VeraConfig(target_modules="all-linear", task_type=task_type)
    assert resolve(_classifier_model(), config, peft=peft) == expected


def test_a_nested_head_is_adapted_by_all_linear_before_0_15() -> None:
    layers = {"bert.query": Linear(4, 4), "cls.predictions.decoder": Linear(9, 4)}
    model = ModelLayers("a model", "bert", layers, frozenset({"cls.predictions.decoder"}))
    config = VeraConfig(target_modules="all-linear")
    assert adapted(model, config, peft=(0, 14)).max_out == 9
    assert adapted(model, config, peft=(0, 15)).max_out == 4


def test_layers_before_0_21_with_a_group_in_the_pattern_are_refused() -> None:
    config = _ours(target_modules=["q"], layers_to_transform=[0], layers_pattern="(layers|h)")
    with pytest.raises(CheckpointError, match="V130"):
        matching(["a.layers.0.q"], config, peft=(0, 20))


def test_no_list_is_condensed_before_0_13() -> None:
    names = [f"model.layers.{at}.q" for at in range(25)]
    model = ModelLayers("a model", None, {name: Linear(4 + at, 3) for at, name in enumerate(names)})
    config = _ours(target_modules=names, layers_to_transform=[1])
    assert set(adapted(model, config, peft=(0, 12)).layers) == set(names)
    condensed = adapted(model, config, peft=(0, 13))
    assert set(condensed.layers) == {"model.layers.1.q"}
    assert condensed.max_out == 28  # the refused size of B comes before


# --- patterns under a time limit -----------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r".(a+)+x"},
        {"target_modules": ["q"], "modules_to_save": [r"(a+)+x"]},
        {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": r"(?:a+)+x"},
    ],
)
def test_a_slow_pattern_is_stopped(fields: dict[str, Any]) -> None:
    before = _seconds_of_children()
    with pytest.raises(CheckpointError) as caught:
        matching(["." + "a" * 40 + ".q"], _ours(**fields))
    assert _seconds_of_children() - before < patterns.LIMIT_SECONDS + 2
    assert [finding.code for finding in caught.value.findings] == ["V131"]


def _seconds_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


@pytest.mark.skipif(os.name != "posix", reason="Windows counts no time of a processor")
def test_a_good_pattern_is_not_refused_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the process for longer than the limit, like a process that gets no processor time."""
    start = subprocess.Popen.__init__

    def stopped_for_a_while(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        os.kill(self.pid, signal.SIGSTOP)
        threading.Timer(patterns.LIMIT_SECONDS + 1, os.kill, (self.pid, signal.SIGCONT)).start()

    monkeypatch.setattr(subprocess.Popen, "__init__", stopped_for_a_while)
    assert matching(["a.q", "a.k"], VeraConfig(target_modules=r".*\.q")) == ["a.q"]


def test_too_many_patterns_and_names_are_refused() -> None:
    names = [str(number) for number in range(2_001)]
    many = [Pattern("target_modules", str(number)) for number in range(2_000)]
    with pytest.raises(CheckpointError, match="2,000 expressions") as caught:
        search(many, names)
    assert [finding.code for finding in caught.value.findings] == ["V131"]


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        "*",
        "(?P<a>",
        "[z-a]",
        "a{2,1}",
        pytest.param("(" * 9000, id="nested"),
        "(?<=a*)b",
        "(?P<idx>x)(?P<idx>",
    ],
)
def test_an_invalid_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        matching(["q"], VeraConfig(target_modules=pattern))
    assert [finding.code for finding in caught.value.findings] == ["V130"]
    assert "target_modules" in str(caught.value)


def test_every_invalid_pattern_is_named() -> None:
    config = _ours(target_modules=["q"], modules_to_save=["(", "[", "fine.*"])
    with pytest.raises(CheckpointError) as caught:
        matching(["a.q"], config)
    assert len(caught.value.findings) == 2


def test_names_reach_the_pattern_unchanged() -> None:
    names = ["ünï.q", "a\ud800.q", "line\n.q", 'quote".q', "plain"]
    assert matching(names, VeraConfig(target_modules=r"[\s\S]*\.q")) == names[:4]


def test_a_missing_python_is_no_fault_of_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(SurroundingsError, match="/nowhere/python"):
        matching(["q"], VeraConfig(target_modules=".*"))


@pytest.mark.skipif(sys.platform == "win32", reason="asks ps")
def test_a_killed_parent_leaves_no_child_process() -> None:
    """The child ends itself, so no process is left even if the parent cannot stop the child."""
    text = """
import os, subprocess, threading
from vera_convert.targets.patterns import Pattern, search

class Popen(subprocess.Popen):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        print(self.pid, flush=True)
        threading.Timer(1, os.kill, (os.getpid(), 9)).start()

subprocess.Popen = Popen
search([Pattern("target_modules", "(a+)+x", full=True)], ["a" * 40])
"""
    done = subprocess.run([sys.executable, "-c", text], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr
    child = done.stdout.decode().strip()
    assert _is_running(child)
    deadline = time.monotonic() + patterns.LIMIT_SECONDS + 60
    while time.monotonic() < deadline and _is_running(child):
        time.sleep(0.1)
    assert not _is_running(child)


def _is_running(process: str) -> bool:
    command = ["ps", "-o", "stat=", "-p", process]
    state = subprocess.run(command, check=False, capture_output=True).stdout.strip()
    return bool(state) and not state.startswith(b"Z")


# --- headers -------------------------------------------------------------------------------------


def test_embeddings_and_heads_are_recognized_by_name() -> None:
    two = (8, 4)
    shapes = {
        "model.embed_tokens.weight": two,
        "wte.weight": two,
        "bert.embeddings.word_embeddings.weight": two,
        "tokens_embed.weight": two,
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": two,
        "model.embed_tokens_per_layer.weight": two,
        "electra.embeddings_project.weight": two,
        "encoder.embedding_hidden_mapping_in.weight": two,
        "patch_embeddings.projection.weight": (8, 3, 4, 4),
        "norm.weight": (4,),
        "model.q_proj.weight": two,
        "model.q_proj.bias": (8,),
        "embed_out.weight": two,
        "cls.predictions.decoder.weight": two,
        "experts.gate_up_proj": two,
    }
    layers = layers_from_shapes(shapes, model_type=None)
    assert len(layers.embeddings) == 6
    assert list(layers.linear) == [
        "electra.embeddings_project",
        "encoder.embedding_hidden_mapping_in",
        "model.q_proj",
        "embed_out",
        "cls.predictions.decoder",
    ]
    assert layers.output_heads == {"embed_out", "cls.predictions.decoder"}


def test_some_heads_are_recognized_only_by_the_model_type() -> None:
    shapes = {"proj_out.weight": (8, 4)}
    assert layers_from_shapes(shapes, model_type="whisper").output_heads == {"proj_out"}
    assert not layers_from_shapes(shapes, model_type=None).output_heads


def test_adapters_of_peft_0_21_have_the_layers_of_the_rules(fixtures: Path) -> None:
    """The lambdas of every real adapter belong to the layers that the adapter's config matches."""

    def read(path: Path) -> dict[str, tuple[int, ...]]:
        with safe_open(path, "np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    folders = sorted(fixtures.glob("*/*_proj"))
    assert folders
    for folder in folders:
        text = (folder / "adapter_config.json").read_bytes()
        config = parse_config(text, place=folder.name).config
        base = fixtures / str(config.base_model_name_or_path)
        stored = read(folder / "adapter_model.safetensors")
        chosen = adapted(
            layers_from_shapes(
                read(base / "model.safetensors"), model_type=base.name.partition("-")[0]
            ),
            config,
            peft=peft_release(folder.parent.name) or NEWEST_PEFT,
        )
        assert {
            f"base_model.model.{name}.vera_lambda_b": (layer.out_features,)
            for name, layer in chosen.layers.items()
        } == {name: shape for name, shape in stored.items() if name.endswith("lambda_b")}
        assert stored["base_model.vera_A"] == (config.r, chosen.max_in)
        assert stored["base_model.vera_B"] == (chosen.max_out, config.r)
