"""Part an output head from the embedding: the tensors, and the config that a loader reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from vera_convert.base.side_files import TEXT_MODELS
from vera_convert.base.tied import (
    SCALE,
    SCALED_BY_A_FIELD,
    SCALED_WHILE_TIED,
    UDOP_STAYS_TIED,
)
from vera_convert.errors import UsageError
from vera_convert.with_torch.layer import VeraLinear

_SCALED_BY_TRANSFORMERS_4 = SCALED_WHILE_TIED | {"mt5"}


def untie(model: nn.Module, layers: Iterable[VeraLinear]) -> None:
    """Give each layer its own weight. The config stays as it is until `settle_parted_head`.

    Raises:
        UsageError: the model is a UDOP, which transformers 5 always loads as scaled.
    """
    if getattr(getattr(model, "config", None), "model_type", None) == "udop":
        raise UsageError(f"Tied.UNTIE: {UDOP_STAYS_TIED} Choose Tied.ADD to change both.")
    for layer in layers:
        layer.base_layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


def has_tied_head(model: nn.Module) -> bool:
    """Say whether the output head shares its weight with another module of a model."""
    head = _head(model)
    weight = getattr(head, "weight", None)
    if weight is None:
        return False
    owners = {id(part) for part in model.modules() if part._parameters.get("weight") is weight}  # noqa: SLF001 -- `named_parameters` shows no owners
    return len(owners) > 1


def settle_parted_head(model: nn.Module) -> None:
    """Make each release of transformers load a saved model with the head that it computes with.

    - The config says that head and embedding are two tensors; else transformers 4 ties the head
      again.
    - The head's weight takes over the factor of the decoder's output. transformers 4 reads from the
      same field of the config whether to multiply by this factor.
    - Each other module gets a weight of its own, because transformers 5 ties the embeddings of
      encoder and decoder by the same field.

    Args:
        model: a model without wrappers, whose head was tied and is no longer.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        return
    if scales_logits_here(config):
        weight = _head(model).weight.detach()
        weight.mul_(weight.shape[1] ** -0.5)
        if hasattr(config, SCALE):
            setattr(config, SCALE, False)
    for part in (config, *(getattr(config, name, None) for name in TEXT_MODELS)):
        if hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = False
    _part_others(model)


def scales_logits_here(config: Any) -> bool:  # noqa: ANN401 -- the config of any model
    """Say whether the installed transformers multiplies the decoder's output by d_model^-0.5."""
    kind = getattr(config, "model_type", None)
    if kind in SCALED_BY_A_FIELD and hasattr(config, SCALE):
        return bool(getattr(config, SCALE))
    kinds = SCALED_WHILE_TIED if _is_transformers_5() else _SCALED_BY_TRANSFORMERS_4
    return kind in kinds and bool(getattr(config, "tie_word_embeddings", False))


def _is_transformers_5() -> bool:
    import transformers

    return int(transformers.__version__.partition(".")[0]) >= 5


def _head(model: nn.Module) -> Any:  # noqa: ANN401 -- a layer, or None
    try:
        return getattr(model, "get_output_embeddings", lambda: None)()
    except NotImplementedError:  # a model without embeddings
        return None


def _part_others(model: nn.Module) -> None:
    """Give each module a copy of a parameter that it shares with another module."""
    taken: set[int] = set()
    for part in model.modules():
        for name, tensor in [*part.named_parameters(recurse=False)]:
            if id(tensor) in taken:
                own = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
                setattr(part, name, own)
            taken.add(id(tensor))
