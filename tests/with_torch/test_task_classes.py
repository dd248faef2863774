"""The classes with the heads of PEFT's tasks, as in the installed transformers."""

from __future__ import annotations

from typing import Any

import pytest
from releases import needs

from vera_convert.base.task_classes import class_of_task, has_head_of, needed_modules

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = needs("transformers", "5.24", "the table lists the classes of this release")

MAPPINGS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}


@pytest.mark.parametrize("task", MAPPINGS)
def test_every_class_of_transformers_is_known(task: str) -> None:
    """If a release adds a model type, this test fails and lists the types that the table lacks."""
    from transformers.models.auto import modeling_auto

    named = dict(getattr(modeling_auto, MAPPINGS[task]))
    wrong = {
        kind: name
        for kind, name in named.items()
        if class_of_task(kind, task) != name or not has_head_of(name, task)
    }
    assert wrong == {}


SMALL = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 1),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
}
NOT_SAVED = {
    "BertForSequenceClassification": "BertForMaskedLM",
    "BertForMultipleChoice": "BertForMaskedLM",
    "BertForNextSentencePrediction": "BertForMaskedLM",
    "RobertaForMultipleChoice": "RobertaForMaskedLM",
    "DebertaV2ForSequenceClassification": "DebertaV2Model",
    "ElectraForMultipleChoice": "ElectraForPreTraining",
    "BartForSequenceClassification": "BartModel",
    "T5ForSequenceClassification": "T5ForConditionalGeneration",
    "XLMForSequenceClassification": "XLMWithLMHeadModel",
    "XLNetForSequenceClassification": "XLNetLMHeadModel",
    "ModernBertForQuestionAnswering": "ModernBertModel",
    "BertForTokenClassification": "BertForMaskedLM",
    "LlamaForSequenceClassification": "LlamaForCausalLM",
}
"""For each class, the class of a base that lacks modules."""


@pytest.mark.parametrize("name", NOT_SAVED)
def test_a_module_that_peft_does_not_save_and_the_base_lacks_is_in_the_table(name: str) -> None:
    peft_saves = {
        "ForSequenceClassification": ("classifier", "score"),
        "ForTokenClassification": ("classifier", "score"),
        "ForQuestionAnswering": ("qa_outputs",),
    }
    saved = next((heads for end, heads in peft_saves.items() if name.endswith(end)), ())
    kind, modules = _modules(name)
    lacking = {
        path
        for path in modules - _modules(NOT_SAVED[name])[1]
        if not any(element.endswith(saved) for element in path.split(".") if saved)
    }
    assert lacking == {*needed_modules(kind, name)}


def _modules(name: str) -> tuple[str, set[str]]:
    """Return the type of a class, and the modules with weights, without the body's prefix."""
    import torch

    built: Any = getattr(transformers, name)
    config = built.config_class()
    for field in SMALL.keys() & vars(config).keys():
        setattr(config, field, SMALL[field])
    with torch.device("meta"):
        model = built(config)
    prefix = f"{model.base_model_prefix}."
    weights = (path for path, _ in model.named_parameters() if path.endswith(".weight"))
    paths = {path.removeprefix(prefix).removesuffix(".weight") for path in weights}
    return config.model_type, paths


def test_a_type_without_a_head_for_the_task_has_no_class() -> None:
    assert class_of_task("llama", "CAUSAL_LM") is None
    assert class_of_task("llama", None) is None
    assert class_of_task(None, "SEQ_CLS") is None
    assert class_of_task("vit", "SEQ_CLS") is None
    assert not has_head_of("LlamaForCausalLM", "SEQ_CLS")
    assert not has_head_of("LlamaForCausalLM", None)
