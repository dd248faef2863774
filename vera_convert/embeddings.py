"""Which modules are embeddings and output heads, by their paths.

The names belong to the modules that ``get_input_embeddings`` and ``get_output_embeddings`` of
transformers return, and to models with code beside the weights. PEFT saves exactly these
two modules after a resize of the vocabulary. The two lie outside a model's numbered layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_HEAD = re.compile(
    r"(.*\.)?(lm_head(\.(decoder|out_proj))?|embed_out|generator_lm_head|lm_loss|vocab_projector"
    r"|output_projection|codec_head|(predictions|mlm_score|head)\.decoder|pred_layer\.proj)"
)
_HEADS_BY_TYPE: Mapping[str, str] = {
    **dict.fromkeys(
        ("canary", "cohere_asr", "moonshine", "moonshine_streaming", "whisper"), "proj_out"
    ),
    **dict.fromkeys(("git", "internlm2"), "output"),
    **dict.fromkeys(("modernbert", "modernbert-decoder"), "decoder"),
    "chatglm": "transformer.output_layer",
    "rwkv": "head",
}
"""Heads whose names mean something else in other models, by model type."""
_HEADS_WITHOUT_TYPE = frozenset(("proj_out", "output", "transformer.output_layer"))
_POSSIBLE_HEADS = frozenset(_HEADS_BY_TYPE.values())

_PATHS_BY_TYPE: Mapping[str, str] = {
    model_type: path
    for path, types in {
        "cls.predictions.decoder": """
            bert big_bird blip_text_model deberta deberta-v2 ernie fnet layoutlm lxmert
            megatron-bert mobilebert mra nomic_bert nystromformer roc_bert roformer squeezebert
            tapas visual_bert yoso
            """,
        "decoder": "modernbert modernbert-decoder",
        "decoder.output_projection": "fsmt",
        "embed_out": "gpt_neox gpt_neox_japanese",
        "generator_lm_head": "convbert electra",
        "head": "rwkv",
        "head.decoder": "ultrabert",
        "language_model.lm_head": "blip-2 instructblip instructblipvideo",
        "lm_head.decoder": """
            bert-generation camembert data2vec-text esm gte ibert jina_embeddings_v3 longformer
            luke mpnet roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod
            """,
        "lm_head.out_proj": "t5gemma t5gemma2",
        "lm_loss": "xlnet",
        "mlm_score.decoder": "bridgetower vilt",
        "output": "git internlm2",
        "output_projection": "biogpt trocr",
        "pred_layer.proj": "flaubert xlm",
        "predictions.decoder": "albert",
        "proj_out": "canary cohere_asr moonshine moonshine_streaming whisper",
        "text_decoder.cls.predictions.decoder": "blip",
        "text_decoder_postnet.lm_head": "speecht5",
        "text_model.lm_head": "kosmos-2 kosmos-2.5",
        "transformer.output_layer": "chatglm",
        "vocab_projector": "distilbert",
    }.items()
    for model_type in types.split()
}
"""The path of the output head by model type, as transformers 5.24 names the head in files."""
_WITH_HEAD = re.compile(
    r".*(LMHead|MaskedLM|CausalLM|ForConditionalGeneration|ForPreTraining|DoubleHeads|ForSpeechTo"
    r"|ForTextTo|MarianMTModel|BertGenerationDecoder|Blip2Model).*"
)
"""The classes of transformers that have an output head."""

_EMBEDDING = re.compile(
    r"(.*\.)?(shared|embed_tokens|embed_in|wte|word_embeddings?|tokens_embed|tok_embeddings"
    r"|token_embedding|input_embeds_layer|codec_embedding)"
    r"|((rwkv|backbone|transformer|model)\.)?embeddings|(model\.)?embed|(transformer\.)?w"
)
_TABLE = re.compile(r"(.*[._])?embed(s|dings?)?|embed_(tokens|positions|in)\w*")
_OTHER_TABLES = frozenset(("wpe", "relative_attention_bias"))
_NUMBER = re.compile(r"(?:^|\.)\d+\.")


def is_output_head(module: str, model_type: str | None = None) -> bool:
    """Say whether a module is the output head, which maps the last layer to the vocabulary.

    Args:
        module: the module's path.
        model_type: of the model's config; None if it is not known.
    """
    if _NUMBER.search(module):
        return False
    if model_type is None and module in _HEADS_WITHOUT_TYPE:
        return True
    return _HEADS_BY_TYPE.get(model_type or "") == module or _HEAD.fullmatch(module) is not None


def output_head_of(model_type: str | None, class_name: str | None) -> str | None:
    """Return the path of the output head of a class of transformers; None without such a head.

    Args:
        model_type: of the model's config; None if it is not known.
        class_name: the class; None if it is not known, for the language model of the type.
    """
    if class_name is not None and _WITH_HEAD.fullmatch(class_name) is None:
        return None
    return _PATHS_BY_TYPE.get(model_type or "", "lm_head")


def is_embedding(module: str) -> bool:
    """Say whether a module is the input embedding, the table of the vocabulary."""
    return _EMBEDDING.fullmatch(module) is not None and not _NUMBER.search(module)


def may_be_resized(module: str) -> bool:
    """Say whether PEFT may have saved a module because the vocabulary was resized."""
    return is_embedding(module) or is_output_head(module) or module in _POSSIBLE_HEADS


def is_table(module: str) -> bool:
    """Say whether a module is a table that is looked up, of words, positions or distances.

    A table has a two-dimensional weight as a linear layer has, and is none.
    """
    last = module.rpartition(".")[2]
    return last in _OTHER_TABLES or _TABLE.fullmatch(last) is not None or is_embedding(module)
