"""The names of embeddings and heads, compared with the modules that transformers' classes
return.
"""

from __future__ import annotations

from typing import Any

import pytest

from vera_convert.base.identity import MORE_ROWS
from vera_convert.embeddings import is_embedding, is_output_head, may_be_resized, output_head_of

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

SMALL = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 11,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN = """
    LlamaForCausalLM Qwen2ForCausalLM GemmaForCausalLM GPTNeoXForCausalLM BertForMaskedLM
    RobertaForMaskedLM ElectraForMaskedLM MambaForCausalLM FalconForCausalLM
    PhiForCausalLM BioGptForCausalLM ModernBertForMaskedLM EsmForMaskedLM MptForCausalLM
    BloomForCausalLM
""".split()  # noqa: SIM905 -- words read best as a text
CLASSES: dict[str, dict[str, int]] = {
    **dict.fromkeys(PLAIN, SMALL),
    "RwkvForCausalLM": {**SMALL, "num_hidden_layers": 2},
    "GPT2LMHeadModel": {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11},
    "OpenAIGPTLMHeadModel": {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11},
    "CTRLLMHeadModel": {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11, "dff": 8},
    "DistilBertForMaskedLM": {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8},
    "T5ForConditionalGeneration": {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1},
    "OPTForCausalLM": {**SMALL, "ffn_dim": 8, "word_embed_proj_dim": 8},
    "XLNetLMHeadModel": {"d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 8, "vocab_size": 11},
    "XLMWithLMHeadModel": {"emb_dim": 8, "n_layers": 1, "n_heads": 2, "n_words": 11},
    "BertGenerationDecoder": SMALL,
    "BlipTextLMHeadModel": {**SMALL, "encoder_hidden_size": 8},
    "ViltForMaskedLM": SMALL,
    "Blip2ForConditionalGeneration": {},
    "Blip2Model": {},
    "InstructBlipForConditionalGeneration": {},
    "Kosmos2_5ForConditionalGeneration": {},
    **{
        name: {
            "d_model": 8,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 8,
            "decoder_ffn_dim": 8,
            "vocab_size": 11,
            "pad_token_id": 0,
        }
        for name in (
            *("BartForConditionalGeneration", "WhisperForConditionalGeneration"),
            "MarianMTModel",
        )
    },
}

IN_FILES = {"GPTNeoXForCausalLM": "embed_out"}
"""Heads that transformers 5 renames in memory."""


def model_of(name: str) -> Any:
    model_class = getattr(transformers, name)
    with torch.device("meta"):
        return model_class(model_class.config_class(**CLASSES[name]))


@pytest.mark.parametrize("name", CLASSES)
def test_embeddings_are_recognized_by_their_names_only(name: str) -> None:
    model = model_of(name)
    kind = model.config.model_type
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [path for path, module in modules.items() if module is embedding]
    heads = [path for path, module in modules.items() if module is head]
    assert names
    assert heads
    assert any(map(is_embedding, names))
    assert any(is_output_head(path, kind) for path in heads)
    assert any(map(may_be_resized, heads))
    assert output_head_of(kind, name) in (*heads, IN_FILES.get(name, heads[0]))
    for path, module in modules.items():
        if isinstance(module, torch.nn.Linear) and path not in heads:
            assert not is_output_head(path, kind), path


@pytest.mark.parametrize("name", ["LlamaModel", "BertForSequenceClassification", "ViTModel"])
def test_a_class_without_an_output_head_has_no_path_of_a_head(name: str) -> None:
    assert output_head_of(getattr(transformers, name).config_class.model_type, name) is None


MORE_ROWS_IN = {
    "csm_depth_decoder_model": "CsmDepthDecoderModel",
    "kyutai_speech_to_text": "KyutaiSpeechToTextForConditionalGeneration",
    "mllama_text_model": "MllamaTextModel",
    "molmo2_text": "Molmo2TextModel",
    "moshi": "MoshiModel",
}


@pytest.mark.parametrize("kind", sorted(MORE_ROWS))
def test_an_embedding_that_the_table_calls_taller_is_taller(kind: str) -> None:
    found = getattr(transformers, MORE_ROWS_IN[kind], None)
    if found is None:
        pytest.skip("this release of transformers does not have the class")
    config = found.config_class(num_hidden_layers=1)
    with torch.device("meta"):
        model = found(config)
    rows = {
        tensor.shape[0]
        for name, tensor in model.state_dict().items()
        if is_embedding(name.rpartition(".")[0])
    }
    assert max(rows) > config.vocab_size
    assert found.config_class.model_type == kind
