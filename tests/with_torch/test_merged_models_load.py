"""Load merged models with the class that a user takes, and compare with the trained model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from merges import merged_with
from releases import has, needs, of_transformers, resize_vocabulary
from safetensors.torch import load_file, save_file
from smallmodels import T5
from theirwarnings import OF_PEFT
from trainedmodels import randomized

from vera_convert.errors import CheckpointError, UsageError
from vera_convert.merging.merge import Merge
from vera_convert.verification.options import VerifyOptions
from vera_convert.verification.verify import verify

pytestmark = [OF_PEFT, pytest.mark.usefixtures("models_here")]


DECODER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32}
SIGHT = {**ENCODER, "image_size": 8, "patch_size": 4}
XLNET = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "vocab_size": 40}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "vocab_size": 40,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "forced_eos_token_id": None,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
DISTIL = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "vocab_size": 40}

TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


@dataclass(frozen=True)
class Trained:
    """A base that was saved as one class, and an adapter that was trained in another class.

    Attributes:
    base: the class that saved the base.
    config: the class of the base's config, and the fields of the config.
    task: PEFT's name of the task; None for a head that PEFT does not know.
    auto: the Auto class in which the adapter was trained, if the task does not name the class.
    targets: the adapted layers.
    labels: the number of labels; None for question answering.
    saved: further modules in modules_to_save.
    """

    base: str
    config: tuple[str, Mapping[str, Any]]
    task: str | None
    targets: tuple[str, ...]
    labels: int | None = None
    auto: str = ""
    saved: tuple[str, ...] = ()
    base_fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def loader(self) -> Any:
        return of_transformers(self.auto or TASKS[self.task or ""])


LLAMA, QWEN3 = ("LlamaConfig", DECODER), ("Qwen3Config", DECODER)
BERT, ROBERTA = ("BertConfig", ENCODER), ("RobertaConfig", ENCODER)
QV, ATTENTION = ("q_proj", "v_proj"), ("query", "value")
KINDS = {
    "a reward model": Trained("Qwen3ForCausalLM", QWEN3, "SEQ_CLS", QV, 1),
    "two labels on a decoder": Trained("Qwen3ForCausalLM", QWEN3, "SEQ_CLS", QV, 2),
    "three labels on a decoder": Trained("LlamaForCausalLM", LLAMA, "SEQ_CLS", QV, 3),
    "three labels on a bare decoder": Trained("LlamaModel", LLAMA, "SEQ_CLS", QV, 3),
    "words on a bare decoder": Trained(
        "LlamaModel", LLAMA, None, QV, auto="AutoModelForCausalLM", saved=("lm_head",)
    ),
    "tokens on a decoder": Trained("LlamaForCausalLM", LLAMA, "TOKEN_CLS", QV, 5),
    "three labels on GPT-2": Trained(
        "GPT2LMHeadModel", ("GPT2Config", GPT2), "SEQ_CLS", ("c_attn",), 3
    ),
    "tokens on GPT-2": Trained(
        "GPT2LMHeadModel", ("GPT2Config", GPT2), "TOKEN_CLS", ("c_attn",), 4
    ),
    "questions on GPT-2": Trained(
        "GPT2LMHeadModel", ("GPT2Config", GPT2), "QUESTION_ANS", ("c_attn",)
    ),
    "three labels on BERT": Trained("BertForPreTraining", BERT, "SEQ_CLS", ATTENTION, 3),
    "three labels on a bare BERT": Trained("BertModel", BERT, "SEQ_CLS", ATTENTION, 3),
    "tokens on BERT": Trained("BertForMaskedLM", BERT, "TOKEN_CLS", ATTENTION, 7),
    "questions on BERT": Trained("BertForMaskedLM", BERT, "QUESTION_ANS", ATTENTION),
    "three labels on RoBERTa": Trained("RobertaForMaskedLM", ROBERTA, "SEQ_CLS", ATTENTION, 3),
    "other labels than the base's": Trained(
        "BertForSequenceClassification",
        BERT,
        "SEQ_CLS",
        ATTENTION,
        5,
        base_fields={"num_labels": 3},
    ),
    "tokens on a classifier of texts": Trained(
        "BertForSequenceClassification",
        BERT,
        "TOKEN_CLS",
        ATTENTION,
        3,
        base_fields={"num_labels": 3},
    ),
    "images with a teacher": Trained(
        "DeiTForImageClassification",
        ("DeiTConfig", SIGHT),
        None,
        ("q_proj", "v_proj"),
        3,
        "DeiTForImageClassificationWithTeacher",
        saved=("cls_classifier", "distillation_classifier"),
    ),
    "images on a distilled model": Trained(
        "DeiTForImageClassificationWithTeacher",
        ("DeiTConfig", SIGHT),
        None,
        ("q_proj", "v_proj"),
        5,
        "DeiTForImageClassification",
        saved=("classifier",),
        base_fields={"num_labels": 3},
    ),
    "DistilBERT with all that it needs": Trained(
        "DistilBertForMaskedLM",
        ("DistilBertConfig", DISTIL),
        "SEQ_CLS",
        ("q_lin", "v_lin"),
        3,
        saved=("pre_classifier",),
    ),
    "T5 with its head named": Trained(
        "T5ForConditionalGeneration",
        ("T5Config", T5),
        "SEQ_CLS",
        ("q", "v"),
        3,
        saved=("classification_head",),
    ),
    "XLNet, whose head PEFT does not save": Trained(
        *("XLNetForSequenceClassification", ("XLNetConfig", XLNET), "SEQ_CLS", ("layer_1",), 3),
        base_fields={"num_labels": 3},
    ),
    "BART, whose head PEFT does not save": Trained(
        *("BartForSequenceClassification", ("BartConfig", BART), "SEQ_CLS", QV, 3),
        base_fields={"num_labels": 3},
    ),
    "images": Trained(
        "ViTModel",
        ("ViTConfig", SIGHT),
        None,
        (*QV, *ATTENTION),
        4,
        auto="AutoModelForImageClassification",
        saved=("classifier",),
    ),
}


def trained(folder: Path, kind: Trained) -> tuple[Path, Path]:
    """Save a base and an adapter with random values; return both folders."""
    torch.manual_seed(0)
    name, fields = kind.config
    config = of_transformers(name)(**fields, **kind.base_fields)
    base = folder / "base"
    of_transformers(kind.base)(config).save_pretrained(base)
    labels = {} if kind.labels is None else {"num_labels": kind.labels}
    model = kind.loader.from_pretrained(base, **labels, ignore_mismatched_sizes=True)
    wanted = peft.VeraConfig(
        r=6,
        task_type=kind.task,
        target_modules=[*kind.targets],
        modules_to_save=[*kind.saved] or None,
        projection_prng_key=11,
    )
    adapted = peft.get_peft_model(model, wanted)
    for key, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) * (0.3 if "lambda" in key else 0.1)
    adapted.save_pretrained(folder / "adapter")
    return base, folder / "adapter"


def outputs_of(model: Any, kind: Trained) -> Any:
    """Return the outputs of a model."""
    torch.manual_seed(1)
    model.eval()
    if "Image" in kind.auto:
        given = {"pixel_values": torch.randn(2, 3, 8, 8)}
    else:
        # One text at a time, because a decoder without a padding token accepts no batch.
        given = {"input_ids": torch.cat([torch.randint(3, 40, (1, 9)), torch.ones(1, 1).long()], 1)}
    with torch.no_grad():
        out = model(**given)
    return out.start_logits if kind.task == "QUESTION_ANS" else out.logits


def by_peft(base: Path, adapter: Path, kind: Trained) -> Any:
    labels = {} if kind.labels is None else {"num_labels": kind.labels}
    model = kind.loader.from_pretrained(base, **labels, ignore_mismatched_sizes=True)
    return outputs_of(peft.PeftModel.from_pretrained(model, adapter), kind)


def loaded(folder: Path, kind: Trained) -> Any:
    """Load a merged model, and check that no tensor is new or has another shape."""
    model, info = kind.loader.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return model


def codes(done: Merge) -> set[str]:
    return {finding.code for finding in done.findings}


LATER = {
    **dict.fromkeys(("a reward model", "two labels on a decoder"), "earlier ones lack Qwen3"),
    **dict.fromkeys(
        (
            "three labels on a bare decoder",
            "three labels on a bare BERT",
            "words on a bare decoder",
            "T5 with its head named",
        ),
        "earlier ones refuse a head beside names without the prefix of its class",
    ),
    **dict.fromkeys(
        ("images", "images with a teacher", "images on a distilled model"),
        "earlier ones name the layers of ViT otherwise",
    ),
}
"""Cases that no release before transformers 5.0 can load, with the reasons."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs("transformers", "5.0", LATER[name]) if name in LATER else ())
        for name in KINDS
    ],
)
def test_a_merged_model_loads_as_it_was_trained(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    base, adapter = trained(tmp_path, kind)
    done = merged_with(adapter, base, tmp_path / "out")
    assert not {"V533", "V571"} & codes(done)
    model = loaded(tmp_path / "out", kind)
    assert model.config.architectures == [type(model).__name__]
    if kind.labels is not None:
        assert model.config.num_labels == kind.labels
    apart = (outputs_of(model, kind) - by_peft(base, adapter, kind)).abs().max()
    assert apart <= 1e-5
    options = VerifyOptions(layers_only=True)
    assert verify(adapter, base=str(base), merged=tmp_path / "out", options=options).passed


@pytest.mark.parametrize("name", ["three labels on a decoder", "other labels than the base's"])
def test_verify_runs_a_classifier_beside_the_base(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    base, adapter = trained(tmp_path, kind)
    merged_with(adapter, base, tmp_path / "out")
    result = verify(adapter, base=str(base), merged=tmp_path / "out")
    assert result.passed, [str(each) for each in result.findings]
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    del config["id2label"], config["label2id"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    result = verify(
        adapter, base=str(base), merged=tmp_path / "out", options=VerifyOptions(layers_only=True)
    )
    assert "V615" in {finding.code for finding in result.findings}


def test_labels_are_named_by_the_caller(tmp_path: Path) -> None:
    kind = KINDS["three labels on a decoder"]
    base, adapter = trained(tmp_path, kind)
    done = merged_with(adapter, base, tmp_path / "out", labels=["bad", "fair", "good"])
    config = loaded(tmp_path / "out", kind).config
    assert "V570" in codes(done)
    assert config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert config.label2id == {"bad": 0, "fair": 1, "good": 2}
    with pytest.raises(UsageError, match="a classifier of 3 labels"):
        merged_with(adapter, base, tmp_path / "two", labels=["bad", "good"])
    options = VerifyOptions(layers_only=True)
    assert verify(adapter, base=str(base), merged=tmp_path / "out", options=options).passed


def test_labels_of_the_config_beside_the_adapter_are_taken(tmp_path: Path) -> None:
    kind = KINDS["three labels on a decoder"]
    base, adapter = trained(tmp_path, kind)
    labels = {"0": "bad", "1": "fair", "2": "good"}
    (adapter / "config.json").write_text(json.dumps({"model_type": "llama", "id2label": labels}))
    merged_with(adapter, base, tmp_path / "out")
    assert loaded(tmp_path / "out", kind).config.id2label[1] == "fair"


@pytest.mark.parametrize(
    "files",
    [
        {
            "tokenizer_config.json": {
                "pad_token": "<pad>",
                "added_tokens_decoder": {"7": {"content": "<pad>"}},
            }
        },
        {
            "special_tokens_map.json": {"pad_token": {"content": "<pad>"}},
            "tokenizer.json": {"added_tokens": [{"id": 7, "content": "<pad>"}]},
        },
        {
            "tokenizer_config.json": {"pad_token": "<pad>"},
            "tokenizer.json": {"model": {"vocab": {"<s>": 1, "<pad>": 7}}},
        },
        {
            "tokenizer_config.json": {"pad_token": "b"},
            "tokenizer.json": {"model": {"vocab": [["<s>", 0.0]] * 7 + [["b", -1.0]]}},
        },
    ],
)
def test_the_padding_token_comes_from_the_adapters_tokenizer(
    tmp_path: Path, files: Mapping[str, object]
) -> None:
    kind = KINDS["three labels on a decoder"]
    base, adapter = trained(tmp_path, kind)
    done = merged_with(adapter, base, tmp_path / "without")
    assert "V572" in codes(done)
    for name, value in files.items():
        (adapter / name).write_text(json.dumps(value))
    done = merged_with(adapter, base, tmp_path / "out")
    assert "V572" not in codes(done)
    model = loaded(tmp_path / "out", kind)
    assert model.config.pad_token_id == 7
    texts = torch.tensor([[3, 4, 5, 6], [3, 4, 7, 7]])
    with torch.no_grad():
        both, second = model(texts).logits, model(texts[1:, :2]).logits
    assert (both[1] - second[0]).abs().max() <= 1e-5


def test_a_head_of_an_unknown_class_needs_the_name_of_the_class(tmp_path: Path) -> None:
    kind = KINDS["three labels on a decoder"]
    base, adapter = trained(tmp_path, kind)
    config = json.loads((adapter / "adapter_config.json").read_bytes()) | {"task_type": None}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert "V533" in codes(merged_with(adapter, base, tmp_path / "unknown"))
    done = merged_with(
        adapter, base, tmp_path / "out", architecture="LlamaForSequenceClassification"
    )
    assert "V533" not in codes(done)
    apart = (
        (outputs_of(loaded(tmp_path / "out", kind), kind) - by_peft(base, adapter, kind))
        .abs()
        .max()
    )
    assert apart <= 1e-5
    options = VerifyOptions(layers_only=True)
    assert verify(adapter, base=str(base), merged=tmp_path / "out", options=options).passed


def test_modules_that_a_class_needs_and_no_file_stores_are_named(tmp_path: Path) -> None:
    kind = Trained("BertForMaskedLM", BERT, "SEQ_CLS", ATTENTION, 3)
    base, adapter = trained(tmp_path, kind)
    done = merged_with(adapter, base, tmp_path / "out")
    (finding,) = [each for each in done.findings if each.code == "V571"]
    assert finding.place == "pooler.dense.weight"
    _, info = kind.loader.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {*info["missing_keys"]} == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}


@needs("transformers", "5.0", "earlier releases name the body of this class otherwise")
def test_a_class_of_questions_that_loads_no_tensor_of_the_base_is_refused(tmp_path: Path) -> None:
    kind = Trained("LlamaForCausalLM", LLAMA, "QUESTION_ANS", QV)
    base, adapter = trained(tmp_path, kind)
    _, info = kind.loader.from_pretrained(base, output_loading_info=True)
    assert "transformer.layers.0.self_attn.q_proj.weight" in info["missing_keys"]
    with pytest.raises(CheckpointError, match=r"V528 .*LlamaForQuestionAnswering"):
        merged_with(adapter, base, tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_loads_as_it_was_trained(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**DECODER, tie_word_embeddings=tied)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")

    def resized() -> Any:
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        resize_vocabulary(model, 46)
        return model

    wanted = peft.VeraConfig(
        r=6, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], projection_prng_key=11
    )
    adapted = peft.get_peft_model(resized(), wanted)
    for key, parameter in adapted.named_parameters():
        if "lambda" in key:
            parameter.data = torch.randn(parameter.shape) * 0.3
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    done = merged_with(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert "V536" not in codes(done)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert model.config.vocab_size == 46
    text = torch.tensor([[3, 41, 45, 6]])
    with torch.no_grad():
        apart = (model.eval()(text).logits - adapted.eval()(text).logits).abs().max()
    assert apart <= 1e-5
    result = verify(tmp_path / "adapter", base=str(tmp_path / "base"), merged=tmp_path / "out")
    assert result.passed, [str(each) for each in result.findings]


HEADS_WITH_BIAS: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "RoFormerForMaskedLM": ("RoFormerConfig", {**ENCODER, "embedding_size": 16}, "query"),
    "BertForMaskedLM": ("BertConfig", ENCODER, "query"),
    "AlbertForMaskedLM": ("AlbertConfig", {**ENCODER, "embedding_size": 16}, "query"),
    "RobertaForMaskedLM": ("RobertaConfig", ENCODER, "query"),
    "ModernBertForMaskedLM": ("ModernBertConfig", {**ENCODER, "decoder_bias": True}, "Wo"),
}


LOGITS_WITH_BIAS: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "BartForConditionalGeneration": ("BartConfig", BART, "q_proj"),
    "MBartForConditionalGeneration": ("MBartConfig", BART, "q_proj"),
    "PegasusForConditionalGeneration": ("PegasusConfig", BART, "q_proj"),
    "MarianMTModel": ("MarianConfig", BART, "q_proj"),
}
"""Classes with a buffer ``final_logits_bias``, which PEFT does not save."""
LOST_BIASES = ("AlbertForMaskedLM", "RobertaForMaskedLM")


def merged_by_peft(name: str, folder: Path, rows: int, **options: Any) -> Mapping[str, Any]:
    """Save a base and an adapter with a resized vocabulary; return PEFT's merged model."""
    config, fields, target = {**HEADS_WITH_BIAS, **LOGITS_WITH_BIAS}[name]
    torch.manual_seed(0)
    kind = of_transformers(name)
    fields = {**fields, "pad_token_id": 0}
    model = kind(of_transformers(config)(**fields))
    if name in LOGITS_WITH_BIAS:
        model.final_logits_bias.normal_()
    model.save_pretrained(folder / "base")
    model = kind.from_pretrained(folder / "base")
    resize_vocabulary(model, rows)
    adapted = peft.get_peft_model(model, peft.VeraConfig(r=6, target_modules=[target], **options))
    randomized(adapted).save_pretrained(folder / "adapter", save_embedding_layers=True)
    merged: Mapping[str, Any] = adapted.merge_and_unload().state_dict()
    return merged


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("rows", [48, 36])
@pytest.mark.parametrize("name", [*HEADS_WITH_BIAS, *LOGITS_WITH_BIAS])
def test_the_bias_of_a_resized_head_is_resized_with_the_head(
    name: str, rows: int, bias: str, tmp_path: Path
) -> None:
    if bias == "all" and name in LOST_BIASES and not has("transformers", "5.0"):
        pytest.skip("needs transformers 5.0: 4.48 loses the bias of this head, saved by itself too")
    theirs = merged_by_peft(name, tmp_path, rows, bias=bias)
    merged_with(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    loader = of_transformers(name)
    model, info = loader.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    ours = model.state_dict()
    assert ours.keys() == theirs.keys()
    for key, values in theirs.items():
        torch.testing.assert_close(ours[key], values, msg=key)
    options = VerifyOptions(layers_only=True)
    result = verify(
        tmp_path / "adapter", base=tmp_path / "base", merged=tmp_path / "out", options=options
    )
    assert result.passed, [str(each) for each in result.findings]


def test_a_partly_resized_vocabulary_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**DECODER, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    wanted = peft.VeraConfig(r=6, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    peft.get_peft_model(model, wanted).save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = "base_model.model.model.embed_tokens.weight"
    tensors[name] = torch.cat([tensors[name], torch.randn(4, 16)])
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"V531 .*44 by 16.*40 by 16, and lm_head\.weight"):
        merged_with(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")


# --- sentence-transformers -----------------------------------------------------------------------


class Encoder:
    """A folder of sentence-transformers, whose modules are run in the order of the library.

    The modules are Transformer, mean pooling, and a trained Dense with tanh. The prompt precedes
    each text.
    """

    def __init__(self, folder: Path, model: Any = None) -> None:
        listed = json.loads((folder / "modules.json").read_bytes())
        assert [each["path"] for each in listed] == ["", "1_Pooling", "2_Dense"]
        settings = json.loads((folder / "config_sentence_transformers.json").read_bytes())
        self.prompt = settings["prompts"][settings["default_prompt_name"]]
        self.limit = json.loads((folder / "sentence_bert_config.json").read_bytes())[
            "max_seq_length"
        ]
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = model or transformers.AutoModel.from_pretrained(folder)
        assert json.loads((folder / "1_Pooling/config.json").read_bytes())[
            "pooling_mode_mean_tokens"
        ]
        self.dense = load_file(folder / "2_Dense" / "model.safetensors")

    def __call__(self, texts: Sequence[str]) -> Any:
        given = self.tokenizer(
            [self.prompt + text for text in texts],
            padding=True,
            truncation=True,
            max_length=self.limit,
            return_tensors="pt",
        )
        with torch.no_grad():
            states = self.model.eval()(**given)[0]
        mask = given["attention_mask"].unsqueeze(-1).float()
        pooled = (states * mask).sum(1) / mask.sum(1)
        return torch.tanh(pooled @ self.dense["linear.weight"].T + self.dense["linear.bias"])


@needs("transformers", "5.0", "its tokenizers are made of a vocabulary")
def test_a_sentence_transformers_adapter_encodes_as_it_was_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    letters = [chr(97 + n) for n in range(26)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    vocabulary = {word: number for number, word in enumerate(words + [f"##{x}" for x in letters])}
    config = transformers.BertConfig(**{**ENCODER, "vocab_size": len(vocabulary)})
    transformers.BertModel(config).save_pretrained(base)
    tokenizer = transformers.BertTokenizer(vocab=vocabulary)
    tokenizer.save_pretrained(base)
    wanted = peft.VeraConfig(r=6, task_type="FEATURE_EXTRACTION", target_modules=["query", "value"])
    adapted = peft.get_peft_model(transformers.AutoModel.from_pretrained(base), wanted)
    for key, parameter in adapted.named_parameters():
        if "lambda" in key:
            parameter.data = torch.randn(parameter.shape) * 0.3
    adapted.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    kinds = ("Transformer", "Pooling", "Dense")
    paths = ("", "1_Pooling", "2_Dense")
    listed = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    files: Mapping[str, object] = {
        "modules.json": listed,
        "config_sentence_transformers.json": {
            "prompts": {"query": "ab "},
            "default_prompt_name": "query",
        },
        "sentence_bert_config.json": {"max_seq_length": 8, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True},
        "2_Dense/config.json": {"in_features": 16, "out_features": 4, "bias": True},
    }
    for name, value in files.items():
        (adapter / name).parent.mkdir(exist_ok=True)
        (adapter / name).write_text(json.dumps(value))
    dense = {"linear.weight": torch.randn(4, 16), "linear.bias": torch.randn(4)}
    save_file(dense, adapter / "2_Dense" / "model.safetensors")
    done = merged_with(adapter, base, tmp_path / "out")
    assert not done.findings
    texts = ["ab cd", "hello my world of letters", "x"]
    trained_model = peft.PeftModel.from_pretrained(
        transformers.AutoModel.from_pretrained(base), adapter
    )
    expected = Encoder(adapter, trained_model)(texts)
    assert (Encoder(tmp_path / "out")(texts) - expected).abs().max() <= 1e-5
    plain = Encoder(adapter, transformers.AutoModel.from_pretrained(base))(texts)
    assert (plain - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    "name", ["three labels on a decoder", "tokens on BERT", "questions on BERT", "a reward model"]
)
def test_verify_accepts_a_classifier_that_peft_merged(name: str, tmp_path: Path) -> None:
    """PEFT saves the model without the head of the base, and without a provenance."""
    kind = KINDS[name]
    base, adapter = trained(tmp_path, kind)
    labels = {} if kind.labels is None else {"num_labels": kind.labels}
    model = kind.loader.from_pretrained(base, **labels)
    adapted = peft.PeftModel.from_pretrained(model, adapter)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    options = VerifyOptions(layers_only=True)
    result = verify(adapter, base=str(base), merged=tmp_path / "merged", options=options)
    assert result.passed, [str(each) for each in result.findings]
    weights = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(weights)
    lost = next(key for key in tensors if "embed" in key)
    del tensors[lost]
    save_file(tensors, weights, {"format": "pt"})
    result = verify(adapter, base=str(base), merged=tmp_path / "merged", options=options)
    assert "V603" in {finding.code for finding in result.findings}
