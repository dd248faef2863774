"""Name the class of transformers that has the head of a task, for each type of model.

The table is that of transformers 5.24; a test compares the table with the installed transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from vera_convert.adapter.config import VeraConfig
from vera_convert.base.model import BaseModel

_TABLE = """
    albert Albert STQ, apertus Apertus T, arcee Arcee STQ, axk1 AXK1 ST, axk2 AXK2 ST,
    bart Bart SQ, beam Beam T, bert Bert STQ, big_bird BigBird STQ,
    bigbird_pegasus BigBirdPegasus SQ, biogpt BioGpt ST, bloom Bloom STQ, bros Bros T,
    camembert Camembert STQ, canine Canine STQ, cohere_compass_text CohereCompassText S,
    convbert ConvBert STQ, ctrl CTRL S, data2vec-text Data2VecText STQ, deberta Deberta STQ,
    deberta-v2 DebertaV2 STQ, deepseek_v2 DeepseekV2 S, deepseek_v3 DeepseekV3 ST,
    diffllama DiffLlama STQ, distilbert DistilBert STQ, doge Doge S, electra Electra STQ,
    ernie Ernie STQ, esm Esm ST, esmc Esmc ST, eurobert EuroBert ST, exaone4 Exaone4 STQ,
    falcon Falcon STQ, flaubert Flaubert STq, fnet FNet STQ, funnel Funnel STQ, gemma Gemma ST,
    gemma2 Gemma2 ST, gemma3 Gemma3 S, gemma3_text Gemma3Text S, glm Glm ST, glm4 Glm4 ST,
    gpt-sw3 GPT2 ST, gpt2 GPT2 STQ, gpt_bigcode GPTBigCode ST, gpt_neo GPTNeo STQ,
    gpt_neox GPTNeoX STQ, gpt_oss GptOss ST, gptj GPTJ SQ, gte Gte ST, helium Helium ST,
    hunyuan_v1_dense HunYuanDenseV1 S, hunyuan_v1_moe HunYuanMoEV1 S, ibert IBert STQ,
    jamba Jamba S, jetmoe JetMoe S, jina_embeddings_v3 JinaEmbeddingsV3 STQ, layoutlm LayoutLM ST,
    layoutlmv2 LayoutLMv2 STQ, layoutlmv3 LayoutLMv3 STQ, led LED Q, lilt Lilt STQ,
    llama Llama STQ, longformer Longformer STQ, luke Luke STQ, lxmert Lxmert Q,
    markuplm MarkupLM STQ, mbart MBart SQ, megatron-bert MegatronBert STQ, minicpm3 MiniCPM3 S,
    minimax MiniMax STQ, ministral Ministral STQ, ministral3 Ministral3 STQ, mistral Mistral STQ,
    mistral4 Mistral4 ST, mixtral Mixtral STQ, mobilebert MobileBert STQ,
    modernbert ModernBert STQ, modernbert-decoder ModernBertDecoder S, modernvbert ModernVBert ST,
    mpnet MPNet STQ, mpt Mpt STQ, mra Mra STQ, mt5 MT5 STQ, mvp Mvp SQ, nemotron Nemotron STQ,
    nomic_bert NomicBert ST, nystromformer Nystromformer STQ, olmo Olmo S, olmo2 Olmo2 S,
    olmo3 Olmo3 S, openai-gpt OpenAIGPT S, openai_privacy_filter OpenAIPrivacyFilter T, opt OPT SQ,
    perceiver Perceiver S, persimmon Persimmon ST, phi Phi ST, phi3 Phi3 ST, phimoe Phimoe S,
    plbart PLBart S, qwen2 Qwen2 STQ, qwen2_moe Qwen2Moe STQ, qwen3 Qwen3 STQ, qwen3_5 Qwen3_5 ST,
    qwen3_5_text Qwen3_5Text S, qwen3_asr Qwen3ASR T, qwen3_moe Qwen3Moe STQ,
    qwen3_next Qwen3Next STQ, reformer Reformer SQ, rembert RemBert STQ, roberta Roberta STQ,
    roberta-prelayernorm RobertaPreLayerNorm STQ, roc_bert RoCBert STQ, roformer RoFormer STQ,
    seed_oss SeedOss STQ, smollm3 SmolLM3 STQ, splinter Splinter Q, squeezebert SqueezeBert STQ,
    stablelm StableLm ST, starcoder2 Starcoder2 ST, t5 T5 STQ, t5gemma T5Gemma ST,
    t5gemma2 T5Gemma2 ST, tapas Tapas S, ultrabert Ultrabert STQ, ultravbert UltraVBert ST,
    umt5 UMT5 STQ, xlm XLM STq, xlm-roberta XLMRoberta STQ, xlm-roberta-xl XLMRobertaXL STQ,
    xlnet XLNet STq, xmod Xmod STQ, yoso Yoso STQ, zamba Zamba S, zamba2 Zamba2 S
"""
"""For each model type the beginning of its class names, and its tasks by a letter each."""

_LETTERS = {"SEQ_CLS": "S", "TOKEN_CLS": "T", "QUESTION_ANS": "Qq"}
_ENDINGS = {
    "S": "ForSequenceClassification",
    "T": "ForTokenClassification",
    "Q": "ForQuestionAnswering",
    "q": "ForQuestionAnsweringSimple",
}

_POOLER = ("pooler.dense",)
_CLASSIFICATION_HEAD = ("classification_head.dense", "classification_head.out_proj")
_NEEDED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ["bert", "megatron-bert", "deberta", "deberta-v2", "ernie", "mobilebert"], _POOLER
    ),
    **dict.fromkeys(["nomic_bert", "rembert", "roc_bert"], _POOLER),
    **dict.fromkeys(["bart", "bigbird_pegasus", "mbart", "mvp", "plbart"], _CLASSIFICATION_HEAD),
    **dict.fromkeys(["mt5", "t5", "umt5"], _CLASSIFICATION_HEAD),
    "albert": ("pooler",),
    "distilbert": ("pre_classifier",),
    "eurobert": ("dense",),
    "flaubert": ("sequence_summary.summary",),
    "modernbert-decoder": ("head.dense",),
    "xlm": ("sequence_summary.summary",),
    "xlnet": ("sequence_summary.summary", "logits_proj"),
}
"""Modules of text classifiers that PEFT does not save by itself.

A base without the head may lack these modules too; the class then fills them with random values.
"""


def class_of_task(model_type: str | None, task: str | None) -> str | None:
    """Return the class of transformers for a task of PEFT; None if there is none.

    Args:
        model_type: the field of the model's config.
        task: PEFT's name of the task, such as ``SEQ_CLS``.
    """
    stem, letters = _CLASSES.get(model_type or "", ("", ""))
    found = next((each for each in letters if each in _LETTERS.get(task or "", "")), None)
    return f"{stem}{_ENDINGS[found]}" if found else None


def has_head_of(name: str, task: str | None) -> bool:
    """Say whether a class of this name has the head of a task of PEFT, by its ending."""
    return name.endswith(tuple(_ENDINGS[each] for each in _LETTERS.get(task or "", ())) or ("?",))


def needed_modules(model_type: str | None, name: str) -> tuple[str, ...]:
    """Return the modules of a class that both the base and the adapter may lack.

    Args:
        model_type: the field of the model's config.
        name: the class.
    """
    return _NEEDED.get(model_type or "", ()) if has_head_of(name, "SEQ_CLS") else ()


def class_of_head(config: VeraConfig, base: BaseModel) -> str | None:
    """Return the class of transformers that has an adapter's head; None if no class is named.

    Args:
        config: the adapter's.
        base: the base.
    """
    named = base.config.get("architectures")
    own = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    found = next((name for name in own if has_head_of(name, config.task_type)), None)
    if found is None and config.task_type is None:
        found = _described(config)
    return found or class_of_task(base.model_type, config.task_type)


def _described(config: VeraConfig) -> str | None:
    """Return the class that PEFT recorded of the model, if transformers has that class."""
    described = config.auto_mapping or {}
    name, library = (described.get(key) for key in ("base_model_class", "parent_library"))
    is_known = isinstance(library, str) and re.match(r"transformers(\.|\Z)", library)
    return name if is_known and isinstance(name, str) and name.isidentifier() else None


def _parsed(table: str) -> dict[str, tuple[str, str]]:
    rows = (row.split() for row in table.split(","))
    return {kind: (stem, letters) for kind, stem, letters in rows}


_CLASSES = _parsed(_TABLE)
