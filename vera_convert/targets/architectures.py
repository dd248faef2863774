"""The linear layers of well-known models, from their ``config.json`` alone.

Nine types are known: llama, mistral, qwen2, gemma, gpt2, bert, roberta, t5 and vit. Module paths
are those of the tensors on disk (transformers 5 renames the modules of vit in memory). A missing
field has the default of transformers' config class; an absurd value is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vera_convert.dtypes import HEADER_NAMES, float_name
from vera_convert.errors import CheckpointError
from vera_convert.rules import MODEL_FIELD_INVALID, MODEL_TYPE_UNKNOWN
from vera_convert.targets.linear import Linear, ModelLayers
from vera_convert.text import printable

CLASSES_FILE = Path(__file__).with_suffix(".txt")
_PLACE = "config.json"
MAX_LAYERS = 10_000
LARGEST_SIZE = 1 << 24
"""Far above any model; a larger size would only exhaust memory."""

Layers = Iterator[tuple[str, Linear]]


def layers_from_config(document: Mapping[str, object]) -> ModelLayers:
    """Return the linear layers of the model that a ``config.json`` describes.

    The class is the first of ``architectures``; without that field it is the causal model (llama,
    mistral, qwen2, gemma, gpt2), the one for conditional generation (t5), or the bare encoder.

    Raises:
        CheckpointError: the type or class is unknown, or a field has the wrong type or an absurd
            value.
    """
    fields = _Fields(document)
    name = _class_name(fields)
    model_class = _CLASSES[name]
    family = _FAMILIES[model_class.model_type]
    rows = {"hidden": fields.size(*family.hidden), "labels": fields.labels(), "two": 2, "one": 1}
    if family.vocabulary:
        rows["vocabulary"] = fields.size("vocab_size", family.vocabulary)
    body = {model_class.prefix + path: layer for path, layer in family.layers(fields, model_class)}
    heads = {
        path: Linear(rows[out], rows["hidden"])
        for path, out in model_class.heads.items()
        if rows[out]  # a classifier without labels has no layer
    }
    return ModelLayers(
        source=name,
        model_type=model_class.model_type,
        linear={**body, **heads},
        output_heads=frozenset(
            path for path, out in model_class.heads.items() if out == "vocabulary"
        ),
        embeddings=tuple(model_class.prefix + path for path in family.embeddings),
        dtype=fields.dtype(),
    )


def _class_name(fields: _Fields) -> str:
    named = fields.document.get("architectures")
    model_type = fields.document.get("model_type")
    if isinstance(named, list) and named:
        name = named[0]
    elif isinstance(model_type, str) and model_type in _FAMILIES:
        return _FAMILIES[model_type].default_class
    else:
        name = None
    known = _CLASSES.get(name) if isinstance(name, str) else None
    if known is None or model_type not in (None, known.model_type):
        raise CheckpointError(
            MODEL_TYPE_UNKNOWN.at(
                _PLACE,
                f"model_type is {printable(repr(model_type))}, the class {printable(repr(name))}; "
                f"known types are {', '.join(_FAMILIES)}.",
            )
        )
    return str(name)


# --- the fields of a config ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Fields:
    """A model's config, whose fields are checked when read."""

    document: Mapping[str, object]

    def size(self, name: str, default: int, alias: str = "") -> int:
        """Return a whole number from 1 up; `alias` is the other name that transformers takes."""
        name = alias if alias in self.document and name not in self.document else name
        value = self.document.get(name, default)
        most = MAX_LAYERS if name.endswith(("layers", "layer")) else LARGEST_SIZE
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.invalid(
                f"{name} is {printable(repr(value))}; a whole number from 1 to {most} is expected."
            )
        return value

    def size_or_none(self, name: str, default: int | None) -> int | None:
        """Return a size, or None for null."""
        if self.document.get(name, default) is None:
            return None
        return self.size(name, default or 0)

    def flag(self, name: str) -> bool:
        """Return a field that is false by default."""
        value = self.document.get(name, False)
        if not isinstance(value, bool):
            raise self.invalid(f"{name} is {printable(repr(value))}; true or false is expected.")
        return value

    def share(self, whole: int, parts: int) -> int:
        """Return the width of one head."""
        if whole % parts:
            raise self.invalid(f"a width of {whole} does not divide into {parts} heads.")
        return whole // parts

    def labels(self) -> int:
        """Return the number of classes, as transformers counts them."""
        named = self.document.get("id2label")
        if isinstance(named, dict):
            return len(named)
        return self.size("num_labels", 2)

    def dtype(self) -> str:
        """Return the dtype of the weights; float32 if the config has none."""
        value = self.document.get("dtype", self.document.get("torch_dtype"))
        return HEADER_NAMES[float_name(str(value)) or "float32"]

    def invalid(self, reason: str) -> CheckpointError:
        """Return the error for an unusable field."""
        return CheckpointError(MODEL_FIELD_INVALID.at(_PLACE, reason))


# --- classes -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Class:
    """A class of transformers.

    Attributes:
        model_type: its family.
        prefix: the text before the paths of the body's modules.
        heads: linear layers beside the body, each with the name of its number of rows; the columns
            are the hidden size. The head with "vocabulary" rows is the output embedding.
        pooler: whether the body ends in a pooler (encoders).
        decoder: whether the body has a decoder beside the encoder (t5).
    """

    model_type: str
    prefix: str
    heads: Mapping[str, str]
    pooler: bool = False
    decoder: bool = True


def _read_classes() -> Iterator[tuple[str, _Class]]:
    """Yield each class of the table, by name."""
    for line in CLASSES_FILE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            model_type, name, prefix, *more = line.split()
            yield (
                name,
                _Class(
                    model_type,
                    "" if prefix == "-" else f"{prefix}.",
                    dict(each.split("=") for each in more if "=" in each),
                    pooler="pooler" in more,
                    decoder="encoder" not in more,
                ),
            )


_CLASSES: Mapping[str, _Class] = dict(_read_classes())


# --- families ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Causal:
    """Llama-like models: the defaults of the config's class.

    Attributes:
        groups: key and value heads; None means the number of query heads.
        head: width of a head; None means the hidden size divided by the query heads.
    """

    inner: int
    vocabulary: int
    hidden: int = 4096
    depth: int = 32
    heads: int = 32
    groups: int | None = None
    head: int | None = None

    def layers(self, fields: _Fields, _: _Class) -> Layers:
        width = fields.size("hidden_size", self.hidden)
        wide = fields.size("intermediate_size", self.inner)
        queries = fields.size("num_attention_heads", self.heads)
        keys = fields.size_or_none("num_key_value_heads", self.groups) or queries
        if self.head is None:
            each = fields.size_or_none("head_dim", None) or fields.share(width, queries)
        else:
            each = fields.size("head_dim", self.head)
        for at in range(fields.size("num_hidden_layers", self.depth)):
            attention = f"layers.{at}.self_attn"
            yield f"{attention}.q_proj", Linear(queries * each, width)
            yield f"{attention}.k_proj", Linear(keys * each, width)
            yield f"{attention}.v_proj", Linear(keys * each, width)
            yield f"{attention}.o_proj", Linear(width, queries * each)
            yield f"layers.{at}.mlp.gate_proj", Linear(wide, width)
            yield f"layers.{at}.mlp.up_proj", Linear(wide, width)
            yield f"layers.{at}.mlp.down_proj", Linear(width, wide)


def _gpt2_layers(fields: _Fields, _: _Class) -> Layers:
    width = fields.size("n_embd", 768, "hidden_size")
    fields.share(width, fields.size("n_head", 12, "num_attention_heads"))
    wide = fields.size_or_none("n_inner", None) or 4 * width
    for at in range(fields.size("n_layer", 12, "num_hidden_layers")):
        block = f"h.{at}"
        yield f"{block}.attn.c_attn", Linear(3 * width, width, conv1d=True)
        yield f"{block}.attn.c_proj", Linear(width, width, conv1d=True)
        if fields.flag("add_cross_attention"):
            yield f"{block}.crossattention.c_attn", Linear(2 * width, width, conv1d=True)
            yield f"{block}.crossattention.q_attn", Linear(width, width, conv1d=True)
            yield f"{block}.crossattention.c_proj", Linear(width, width, conv1d=True)
        yield f"{block}.mlp.c_fc", Linear(wide, width, conv1d=True)
        yield f"{block}.mlp.c_proj", Linear(width, wide, conv1d=True)


def _encoder_layers(attention: str) -> Callable[[_Fields, _Class], Layers]:
    """Return the layers of bert-like models; `attention` is the module of query, key and value."""

    def layers(fields: _Fields, model_class: _Class) -> Layers:
        width = fields.size("hidden_size", 768)
        wide = fields.size("intermediate_size", 3072)
        fields.share(width, fields.size("num_attention_heads", 12))
        crossed = fields.flag("add_cross_attention")
        for at in range(fields.size("num_hidden_layers", 12)):
            block = f"encoder.layer.{at}"
            for kind in ("attention", "crossattention") if crossed else ("attention",):
                for part in ("query", "key", "value"):
                    yield f"{block}.{kind}.{attention}.{part}", Linear(width, width)
                yield f"{block}.{kind}.output.dense", Linear(width, width)
            yield f"{block}.intermediate.dense", Linear(wide, width)
            yield f"{block}.output.dense", Linear(width, wide)
        if model_class.pooler:
            named = model_class.model_type == "vit" and fields.size_or_none(
                "pooler_output_size", None
            )
            yield "pooler.dense", Linear(named or width, width)

    return layers


def _t5_layers(fields: _Fields, model_class: _Class) -> Layers:
    width = fields.size("d_model", 512, "hidden_size")
    depth = fields.size("num_layers", 6, "num_hidden_layers")
    encoder = ("SelfAttention", "DenseReluDense")
    yield from _t5_stack(fields, "encoder", encoder, depth=depth, width=width)
    if model_class.decoder:
        depth = fields.size_or_none("num_decoder_layers", None) or depth
        decoder = ("SelfAttention", "EncDecAttention", "DenseReluDense")
        yield from _t5_stack(fields, "decoder", decoder, depth=depth, width=width)


def _t5_stack(
    fields: _Fields, stack: str, parts: tuple[str, ...], *, depth: int, width: int
) -> Layers:
    inside = fields.size("num_heads", 8, "num_attention_heads") * fields.size(
        "d_kv", 64, "head_dim"
    )
    wide = fields.size("d_ff", 2048)
    entries = ("wi_0", "wi_1") if _t5_is_gated(fields) else ("wi",)
    for at in range(depth):
        for place, part in enumerate(parts):
            module = f"{stack}.block.{at}.layer.{place}.{part}"
            if part == "DenseReluDense":
                yield from ((f"{module}.{entry}", Linear(wide, width)) for entry in entries)
                yield f"{module}.wo", Linear(width, wide)
            else:
                yield from ((f"{module}.{name}", Linear(inside, width)) for name in "qkv")
                yield f"{module}.o", Linear(width, inside)


def _t5_is_gated(fields: _Fields) -> bool:
    kind = fields.document.get("feed_forward_proj", "relu")
    words = kind.split("-") if isinstance(kind, str) else []
    if len(words) == 1 or (len(words) == 2 and words[0] == "gated"):
        return len(words) == 2
    raise fields.invalid(
        f"feed_forward_proj is {printable(repr(kind))}; a text like relu or gated-gelu is expected."
    )


@dataclass(frozen=True, slots=True)
class _Family:
    """The common facts of the classes of one model_type.

    Attributes:
        default_class: the class if the config names no class.
        hidden: the field of the hidden size, its default, and its other name.
        vocabulary: default size of the vocabulary; 0 without a vocabulary.
        embeddings: modules that are tables.
        layers: the body's linear layers.
    """

    default_class: str
    hidden: tuple[str, int] | tuple[str, int, str]
    vocabulary: int
    embeddings: tuple[str, ...]
    layers: Callable[[_Fields, _Class], Layers]


def _causal_family(name: str, causal: _Causal) -> _Family:
    return _Family(
        default_class=f"{name}ForCausalLM",
        hidden=("hidden_size", causal.hidden),
        vocabulary=causal.vocabulary,
        embeddings=("embed_tokens",),
        layers=causal.layers,
    )


_BERT_TABLES = tuple(f"embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type"))

_FAMILIES: Mapping[str, _Family] = {
    "llama": _causal_family("Llama", _Causal(11_008, 32_000)),
    "mistral": _causal_family("Mistral", _Causal(14_336, 32_000, groups=8)),
    "qwen2": _causal_family("Qwen2", _Causal(22_016, 151_936, groups=32)),
    "gemma": _causal_family(
        "Gemma", _Causal(24_576, 256_000, hidden=3072, depth=28, heads=16, groups=16, head=256)
    ),
    "gpt2": _Family(
        "GPT2LMHeadModel", ("n_embd", 768, "hidden_size"), 50_257, ("wte", "wpe"), _gpt2_layers
    ),
    "bert": _Family(
        "BertModel", ("hidden_size", 768), 30_522, _BERT_TABLES, _encoder_layers("self")
    ),
    "roberta": _Family(
        "RobertaModel", ("hidden_size", 768), 50_265, _BERT_TABLES, _encoder_layers("self")
    ),
    "t5": _Family(
        "T5ForConditionalGeneration",
        ("d_model", 512, "hidden_size"),
        32_128,
        ("shared", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
        _t5_layers,
    ),
    "vit": _Family("ViTModel", ("hidden_size", 768), 0, (), _encoder_layers("attention")),
}
