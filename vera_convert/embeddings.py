"""Which modules are embeddings and output heads, by their paths.

The names are those of the modules that ``get_input_embeddings`` and ``get_output_embeddings`` of
transformers return, and of models whose code lies beside their weights. PEFT saves exactly these
two modules when the vocabulary was resized. Neither of them lies in a numbered layer of a model.
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
