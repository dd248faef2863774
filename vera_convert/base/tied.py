"""Find an output head and an embedding with a shared tensor, and heads that share none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert import rules
from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.saved_modules import SavedModules, replaced_name
from vera_convert.adapter.sorting import same_tensor
from vera_convert.base.match import Match
from vera_convert.base.model import BaseModel
from vera_convert.base.quantized.unpack import unpacked
from vera_convert.base.replacements import used_replacements
from vera_convert.base.saved_places import ORIGINAL
from vera_convert.base.task_classes import class_of_head
from vera_convert.base.vocabulary import shared_embedding
from vera_convert.embeddings import is_embedding, is_output_head, output_head_of
from vera_convert.errors import SurroundingsError, UsageError
from vera_convert.files.tensorfile import NUMPY_DTYPE, TensorData
from vera_convert.hub.lookup import HubAccess, open_file
from vera_convert.rules import Finding

_TASKS_OF_WORDS = frozenset(("CAUSAL_LM", "SEQ_2_SEQ_LM"))
"""The tasks of PEFT whose classes have an output head."""
_SAMPLES = 4
"""The rows of a head to compare with the embedding."""
SCALED_WHILE_TIED = frozenset(("t5", "umt5", "longt5", "pop2piano", "switch_transformers"))
"""The model types that multiply the decoder's output by d_model^-0.5 while the head is tied."""
SCALED_BY_A_FIELD = SCALED_WHILE_TIED - {"switch_transformers"}
"""The model types of which transformers 5 reads `SCALE` before ``tie_word_embeddings``."""
SCALE = "scale_decoder_outputs"
"""The field of transformers 5 that says whether the decoder's output is multiplied."""
UDOP_STAYS_TIED = (
    "transformers 5 always multiplies the decoder's output of UDOP by d_model^-0.5, and "
    "transformers 4 only if head and embedding are tied, so no merged model would be right in both."
)
_TIES_STACKS = frozenset(("t5", "umt5", "mt5"))
"""The model types whose stacks transformers 5 ties, whatever ``tie_word_embeddings`` says."""


def is_head(target: str, base: BaseModel) -> bool:
    """Say whether a tensor is the weight of an output head."""
    module, _, parameter = target.rpartition(".")
    return is_output_head(module, base.model_type) and parameter == "weight"


def is_tied_head(target: str, base: BaseModel) -> bool:
    """Say whether a tensor is the weight of a head, and a loader uses the embedding instead.

    If the config's field for tied embeddings is absent, the stored tensors decide.
    """
    tied = base.tie_word_embeddings
    return is_head(target, base) and bool(tied if target in base.tensors else tied is not False)


def scales_tied_logits(base: BaseModel) -> bool:
    """Say whether a model multiplies the decoder's output by d_model^-0.5 while the head is tied.

    transformers 4, and SwitchTransformers, read ``tie_word_embeddings`` alone.
    """
    return base.model_type in SCALED_WHILE_TIED and base.config.get(SCALE) is not False


def scales_logits(model: BaseModel) -> bool:
    """Say whether transformers 5 multiplies the decoder's output of a model by d_model^-0.5."""
    tied = model.tie_word_embeddings is not False
    field = model.config.get(SCALE, tied) if model.model_type in SCALED_BY_A_FIELD else tied
    return model.model_type in SCALED_WHILE_TIED and field is not False


def scale_findings(base: BaseModel) -> Iterator[Finding]:
    """Yield a warning if the releases of transformers scale a model with an untied head otherwise.

    Raises:
        UsageError: the base is a UDOP, of which no merged model with an untied head is right.
    """
    tied = base.tie_word_embeddings
    if base.model_type == "udop":
        raise UsageError(f"--tied untie: {UDOP_STAYS_TIED} Give --tied add to change both.")
    by_4 = base.model_type in SCALED_WHILE_TIED and tied is not False
    by_4 = by_4 or (base.model_type == "mt5" and tied is True)
    if by_4 and not scales_logits(base):
        reason = "transformers 4 multiplies the decoder's output of the base by d_model^-0.5. "
        reason += "transformers 5 does not, nor does the merged model in any release."
        yield rules.SCALE_BY_RELEASE.at(base.location.label, reason)
    elif base.model_type == "umt5" and scales_logits(base):
        reason = "transformers 5.0 to 5.23 multiply the decoder's output of a UMT5 by d_model^-0.5 "
        reason += "also with an untied head, and the merged model's head has this factor already."
        remedy = "Load the merged model with transformers 4, or with transformers 5.24 or later."
        yield rules.SCALE_BY_RELEASE.at(base.location.label, reason).with_remedy(remedy)


def always_ties_stacks(model: BaseModel) -> bool:
    """Say whether transformers 5 gives both stacks the shared embedding, tied head or not.

    Releases that write `SCALE` for LongT5 and Pop2Piano do so for these, too.
    """
    kind = model.model_type
    return kind in _TIES_STACKS or (kind in SCALED_BY_A_FIELD and SCALE in model.config)


def lone_embeddings(
    adapter: Adapter, match: Match, base: BaseModel, replaced: Mapping[str, TensorData]
) -> Iterator[tuple[str, str]]:
    """Yield each embedding replaced alone by the adapter, with the name of the tied head.

    PEFT trains a copy of each module in modules_to_save, and the head keeps the base's values. An
    embedding saved by PEFT for another reason is loaded into the tensor of embedding and head.

    Args:
        adapter: the adapter.
        match: the match of the adapter's layers.
        base: the base.
        replaced: the adapter's tensors, by the names of the base's tensors.
    """
    saved = SavedModules(adapter.config)
    heads: dict[tuple[int, ...], str | None] = {}
    for embedding, tensor in replaced.items():
        module = _module(tensor)
        if embedding not in base.tensors or not saved.of(module) or module.endswith(ORIGINAL):
            continue
        shape = base.tensors[embedding].info.shape
        if len(shape) != 2 or not is_embedding(embedding.removesuffix(".weight")):
            continue
        if shape not in heads:
            heads[shape] = tied_head(shape, adapter, match, base)
        head = heads[shape]
        if head is None or shared_embedding(base, head, *shape) != embedding:
            continue
        if head not in replaced and not is_saved_twice(tensor, adapter, base):
            yield embedding, head


def is_saved_twice(tensor: TensorData, adapter: Adapter, base: BaseModel) -> bool:
    """Say whether the adapter stores the same values as embedding and as output head.

    Args:
        tensor: the embedding, or the head.
        adapter: the adapter.
        base: the base.
    """
    is_of_head = is_output_head(_module(tensor), base.model_type)
    return any(
        is_output_head(_module(other), base.model_type) != is_of_head and same_tensor(tensor, other)
        for other in used_replacements(adapter)
    )


def _module(tensor: TensorData) -> str:
    return replaced_name(tensor.name).rpartition(".")[0]


def tied_head(
    shape: tuple[int, ...], adapter: Adapter, match: Match, base: BaseModel
) -> str | None:
    """Return the name of the head tied to an embedding; None without a tied head.

    Args:
        shape: the shape of the embedding in the base.
        adapter: the adapter.
        match: the match of the adapter's layers.
        base: the base.
    """
    if base.tie_word_embeddings is False:
        return None
    for name, tensor in base.tensors.items():
        if tensor.info.shape == shape and is_head(name, base):
            return name if base.tie_word_embeddings else None
    class_name = class_of_head(adapter.config, base) or next(iter(base.class_names), None)
    if adapter.config.task_type in _TASKS_OF_WORDS:
        class_name = None  # a base without a head is trained in a class with the head
    path = output_head_of(base.model_type, class_name)
    return None if path is None else f"{match.strategy.rename(path) or path}.weight"


def name_of_head(module: str, match: Match) -> str:
    """Return the name of an untied head's weight, with or without a tensor in the base."""
    if module in match.tied:
        return f"{match.strategy.rename(module) or module}.weight"
    return match.tensors[module]


# --- heads with values of their own --------------------------------------------------------------

# transformers 5 never ties a head whose values differ from the embedding's, even if the config
# says that the two are tied. The config of a T5 1.1 that transformers 5 saved is an example.


def stored_heads(base: BaseModel) -> Iterator[tuple[str, str]]:
    """Yield each stored output head, and the stored embedding of the same shape."""
    for name, tensor in base.tensors.items():
        shape = tensor.info.shape
        if len(shape) == 2 and is_head(name, base):
            embedding = shared_embedding(base, name, *shape)
            if embedding is not None and base.tensors[embedding].info.shape == shape:
                yield name, embedding


def shows_own_head(base: BaseModel, access: HubAccess) -> bool:
    """Say whether a few rows of a stored head differ from the embedding's.

    On the Hub, each row costs a request of some kilobytes. Without these rows, the answer is no.
    """
    whole = unpacked(base)
    for pair in stored_heads(whole.view):
        # A packed weight has tensors of its own.
        if not whole.weights.keys().isdisjoint(pair) or _rows_differ(base, *pair, access):
            return True
    return False


def _rows_differ(base: BaseModel, head: str, embedding: str, access: HubAccess) -> bool:
    try:
        rows, others = (_rows(base, name, access) for name in (embedding, head))
    except SurroundingsError:
        return False
    return others.astype(rows.dtype).tobytes() != rows.tobytes()


def _rows(base: BaseModel, name: str, access: HubAccess) -> NDArray[Any]:
    """Return some rows of a matrix, at equal distances."""
    tensor = base.tensors[name]
    (rows, columns), dtype = tensor.info.shape, NUMPY_DTYPE[tensor.info.dtype]
    start, size = base.files[tensor.file].data_start + tensor.info.start, columns * dtype.itemsize
    chosen = [(2 * n + 1) * rows // (2 * _SAMPLES) for n in range(_SAMPLES)]
    with open_file(base.location, tensor.file, access) as file:
        found = b"".join(file.read_at(start + row * size, size) for row in chosen)
    return np.frombuffer(found, dtype)
