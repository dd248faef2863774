"""The classes with the heads of PEFT's tasks, as the installed transformers names them."""

from __future__ import annotations

import pytest

from vera_convert.base.task_classes import class_of_task, has_head_of

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MAPPINGS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}


@pytest.mark.parametrize("task", MAPPINGS)
def test_every_class_of_transformers_is_known(task: str) -> None:
    """A release that adds a model type fails here, with the types that the table lacks."""
    from transformers.models.auto import modeling_auto

    named = dict(getattr(modeling_auto, MAPPINGS[task]))
    wrong = {
        kind: name
        for kind, name in named.items()
        if class_of_task(kind, task) != name or not has_head_of(name, task)
    }
    assert wrong == {}


def test_what_has_no_such_head_is_none() -> None:
    assert class_of_task("llama", "CAUSAL_LM") is None
    assert class_of_task("llama", None) is None
    assert class_of_task(None, "SEQ_CLS") is None
    assert class_of_task("vit", "SEQ_CLS") is None
    assert not has_head_of("LlamaForCausalLM", "SEQ_CLS")
    assert not has_head_of("LlamaForCausalLM", None)
