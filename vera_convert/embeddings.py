"""Which modules are embeddings and output heads, by their paths.

The names belong to the modules that ``get_input_embeddings`` and ``get_output_embeddings`` of
transformers return, and to models with code beside the weights. PEFT saves exactly these
two modules after a resize of the vocabulary. The two lie outside a model's numbered layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from vera_convert.tables import table

_HEAD = re.compile(
    r"(.*\.)?(lm_head(\.(decoder|out_proj))?|embed_out|generator_lm_head|lm_loss|vocab_projector"
    r"|output_projection|codec_head|(predictions|mlm_score|head)\.decoder|pred_layer\.proj)"
)
_HEADS_WITHOUT_TYPE = frozenset(("proj_out", "output", "transformer.output_layer"))
"""Heads of some types, which also count if the type is not known."""
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


@cache
def _heads() -> Mapping[str, str]:
    """Return the path of the output head in files, by model type."""
    by_path = table(__file__, "embeddings.toml")
    return {kind: path for path, kinds in by_path.items() for kind in kinds.split()}


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
    return _HEAD.fullmatch(module) is not None or _heads().get(model_type or "") == module


def output_head_of(model_type: str | None, class_name: str | None) -> str | None:
    """Return the path of the output head of a class of transformers; None without such a head.

    Args:
        model_type: of the model's config; None if it is not known.
        class_name: the class; None if it is not known, for the language model of the type.
    """
    if class_name is not None and _WITH_HEAD.fullmatch(class_name) is None:
        return None
    return _heads().get(model_type or "", "lm_head")


def is_embedding(module: str) -> bool:
    """Say whether a module is the input embedding, the table of the vocabulary."""
    return _EMBEDDING.fullmatch(module) is not None and not _NUMBER.search(module)


def may_be_resized(module: str) -> bool:
    """Say whether PEFT may have saved a module because the vocabulary was resized."""
    return is_embedding(module) or is_output_head(module) or module in _heads().values()


def is_table(module: str) -> bool:
    """Say whether a module is a table that is looked up, of words, positions or distances.

    A table has a two-dimensional weight as a linear layer has, and is none.
    """
    last = module.rpartition(".")[2]
    return last in _OTHER_TABLES or _TABLE.fullmatch(last) is not None or is_embedding(module)
