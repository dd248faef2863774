"""Sort the files beside a base's weights into copied and left out, and edit configs as text."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from vera_convert import rules
from vera_convert.base.model import BaseModel
from vera_convert.files.file_names import CARD_NAME, is_strange, is_training_state
from vera_convert.files.json_edit import edited_member
from vera_convert.files.shards import PIPELINE
from vera_convert.rules import Finding
from vera_convert.text import printable

PROVENANCE_NAME = "merge-provenance.json"

_OTHER_WEIGHTS = re.compile(
    r".*\.(bin|ckpt|pt|pth|pkl|h5|msgpack|onnx|onnx_data|ot|gguf|npz|tflite|pte|mlmodel"
    r"|safetensors)(\.index\.json)?",
    re.IGNORECASE,
)
"""Weights in another form, perhaps preferred by a loader, and the indexes of the weights."""
_OTHER_FOLDERS = frozenset(("onnx", "openvino", "original", "coreml", "onnxruntime", "flax"))
"""Folders of repos for the same weights in another form."""
_ADAPTER = re.compile(r"adapter_config\.json|adapter_model\..*")

_TOKENIZER = re.compile(
    r"tokenizer(_config)?\.json|tokenizer\..*model.*|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\..*|merges\.txt|.*\.(spm|tiktoken)|spiece\.model|sentencepiece.*\.model|source\.spm"
    r"|target\.spm|tekken\.json|chat_template\.(jinja|json)|additional_chat_templates/.*"
)
_TOKENIZER_ITSELF = re.compile(
    r"tokenizer\.json|tokenizer\..*model.*|vocab\..*|.*\.(spm|tiktoken)|spiece\.model"
    r"|sentencepiece.*\.model|tekken\.json"
)
"""The main files of a tokenizer; a complete tokenizer has at least one main file."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of a base's folder, copied or left out by a merge; names are relative, with `/`.

    Attributes:
        copied: files copied byte for byte; config and index are listed apart.
        config: the model's ``config.json``, if present.
        other_weights: the same weights in other forms, left out.
        adapter: files of an adapter beside the base, left out.
        unneeded: files of a training run or a download, left out.
    """

    copied: tuple[str, ...]
    config: str | None
    other_weights: tuple[str, ...]
    adapter: tuple[str, ...]
    unneeded: tuple[str, ...] = ()

    def findings(self, place: str) -> Iterator[Finding]:
        """Yield a warning for each left-out kind of files, except unneeded files."""
        for rule, names in (
            (rules.WEIGHTS_LEFT_OUT, self.other_weights),
            (rules.ADAPTER_IN_BASE, self.adapter),
        ):
            if names:
                yield rule.at(place, f"{', '.join(map(printable, names))}.")


def sort_files(names: Collection[str], base: BaseModel) -> ModelFiles:
    """Sort the files of a base by their names.

    Args:
        names: the names of all visible files.
        base: the base; the base's weight files, index and config stay unsorted.
    """
    own = {*base.files, *base.strays, base.index, base.prefix + "config.json"}
    own |= {CARD_NAME, PROVENANCE_NAME}
    components = _components(names, base)
    kinds = {name: _kind(name, base.prefix, components) for name in sorted(set(names) - own)}
    copied, other_weights, adapter, unneeded = (
        tuple(name for name, kind in kinds.items() if kind == wanted)
        for wanted in ("copied", "weights", "adapter", "unneeded")
    )
    config = base.prefix + "config.json"
    return ModelFiles(copied, config if config in names else None, other_weights, adapter, unneeded)


def _components(names: Collection[str], base: BaseModel) -> frozenset[str]:
    """Return the folders of other models; a merge copies the folders whole.

    The result holds the other components of a pipeline, and every folder with a ``config.json``.
    """
    folders = {
        str(PurePosixPath(name).parent) for name in names if name.endswith(("/config.json",))
    }
    if PIPELINE in names:
        folders |= {name.partition("/")[0] for name in names if "/" in name}
    return frozenset(folders - {base.prefix.rstrip("/")})


def _kind(name: str, prefix: str, components: Collection[str]) -> str:
    path = PurePosixPath(name)
    folders = [str(folder) for folder in path.parents if str(folder) != "."]
    inside = PurePosixPath(name.removeprefix(prefix))
    if _OTHER_FOLDERS & {part.lower() for part in inside.parts[:-1]}:
        return "weights"
    is_unneeded = is_strange(name) or is_training_state(name)
    if is_unneeded and not is_other_weights(name):
        return "unneeded"
    if any(folder in components for folder in folders):
        return "copied"
    if _ADAPTER.fullmatch(path.name):
        return "adapter"
    return "weights" if is_other_weights(name) else "copied"


def is_other_weights(name: str) -> bool:
    """Say whether a file has the name of weights in any form, or of an index of weights."""
    return _OTHER_WEIGHTS.fullmatch(PurePosixPath(name).name) is not None


def tokenizer_files(names: Collection[str]) -> tuple[str, ...]:
    """Return the files of a tokenizer; empty if the tokenizer is incomplete."""
    found = [name for name in sorted(names) if _TOKENIZER.fullmatch(name)]
    is_whole = any(_TOKENIZER_ITSELF.fullmatch(name) for name in found)
    return tuple(found) if is_whole else ()


# --- the config ----------------------------------------------------------------------------------


TEXT_MODELS = ("text_config", "decoder", "generator")
"""Parts of a config: transformers 4 reads the part's ``tie_word_embeddings``, not the whole's."""


def untied(text: bytes, config: Mapping[str, object]) -> bytes:
    """Return a config's text with ``tie_word_embeddings`` false, also in each part that decides.

    For a part without the field, such as the ``text_config`` of Gemma 3, the default of the part's
    class decides.
    """
    field = "tie_word_embeddings"
    for name, part in config.items():
        if isinstance(part, Mapping) and (name in TEXT_MODELS or part.get(field) is not None):
            text = edited_member(text, (name, field), value=False)
    return edited_member(text, (field,), value=False)


def of_dtype(text: bytes, config: Mapping[str, object], dtype: str) -> bytes:
    """Return a config's text with `dtype` in each field for a dtype of the model.

    Args:
        text: the config's bytes.
        config: the config's value.
        dtype: torch's name, for example ``bfloat16``.
    """
    for field in ("torch_dtype", "dtype"):
        if isinstance(config.get(field), str):
            text = edited_member(text, (field,), dtype)
        for name, part in config.items():
            if isinstance(part, Mapping) and isinstance(part.get(field), str):
                text = edited_member(text, (name, field), dtype)
    return text
