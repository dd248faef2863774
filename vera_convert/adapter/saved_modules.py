"""Tensors that replace tensors of the base: modules saved whole, biases, resized embeddings."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from vera_convert.adapter.config import SAVED_BY_TASK, VeraConfig, peft_release
from vera_convert.adapter.names import PREFIX
from vera_convert.adapter.tensors import WEIGHTS_NAME, AdaptedLayer
from vera_convert.embeddings import may_be_resized
from vera_convert.files.tensorfile import TensorData
from vera_convert.rules import (
    BIAS_NOT_STORED,
    MODULE_TO_SAVE_MISSING,
    TOKEN_ROWS,
    UNDECLARED_TENSOR,
    UNKNOWN_TENSOR,
    Finding,
)
from vera_convert.text import printable

_BASE_BIAS = ".base_layer.bias"
_OTHER_HEAD = re.compile(r"classification_head|logits")
"""Names of heads that PEFT does not know."""


def _is_token_rows(name: str) -> bool:
    """Say whether a tensor holds rows of an embedding, as PEFT's trainable tokens do."""
    elements = name.split(".")
    return "token_adapter" in elements or any(
        element.startswith("trainable_tokens_") for element in elements
    )


def replaced_name(name: str) -> str:
    """Return the name of a replacement in the base: no prefix, no ``base_layer``."""
    module, _, parameter = name.removeprefix(PREFIX).rpartition(".")
    return f"{module.removesuffix('.base_layer')}.{parameter}" if module else parameter


class SavedModules:
    """The names of modules_to_save; the cost does not grow with the number of names.

    PEFT compares each name with the end of a module's path, even inside an element of the path.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(filter(None, names))
        self._lengths = sorted({len(name) for name in self._names})

    def of(self, module: str) -> frozenset[str]:
        """Return the names that save a module, or a module around it."""
        ends = (found.start() for found in re.finditer(r"\.|\Z", module))
        endings = {
            module[end - length : end]
            for end in ends
            for length in self._lengths[: bisect_right(self._lengths, end)]
        }
        return self._names & endings


def replacement_findings(
    others: Sequence[TensorData],
    layers: Mapping[str, AdaptedLayer],
    config: VeraConfig,
    *,
    renamed: bool,
) -> Iterator[Finding]:
    """Yield a finding for each tensor that replaces a tensor of the base without being declared.

    Args:
        others: the tensors that replace tensors of the base.
        layers: the adapted layers.
        config: the adapter's config.
        renamed: whether tensors have names that PEFT does not write, so that some can be missing.
    """
    declared = frozenset(config.modules_to_save or ())
    heads = frozenset(SAVED_BY_TASK.get(config.task_type or "", ()))
    # If several heads are named, the model has one of the heads.
    either = frozenset(name for names in SAVED_BY_TASK.values() for name in names)
    expected, saved = declared | heads, SavedModules(declared | either)
    stored: set[str] = set()
    bias_stored = False
    for tensor in others:
        if _is_token_rows(tensor.name):
            rows = f"{tensor.shape[0]:,} rows" if tensor.shape else "a value"
            reason = f"it holds {rows} of an embedding, trained with trainable_token_indices."
            yield TOKEN_ROWS.in_tensor(tensor.name, reason)
            continue
        module, _, parameter = replaced_name(tensor.name).rpartition(".")
        names = saved.of(module)
        stored |= names
        if not names.isdisjoint(expected):
            continue
        bias_stored |= parameter == "bias"
        if parameter == "bias" and module in layers and not tensor.name.endswith(_BASE_BIAS):
            reason = f"PEFT looks for {printable(PREFIX + module)}{_BASE_BIAS}, not this name."
            yield UNKNOWN_TENSOR.in_tensor(tensor.name, reason)
            continue
        if parameter == "bias" and (
            config.bias == "all" or (config.bias != "none" and module in layers)
        ):
            continue
        if parameter in ("weight", "bias") and may_be_resized(module):
            continue
        yield UNDECLARED_TENSOR.in_tensor(
            tensor.name,
            f"it replaces {printable(replaced_name(tensor.name))} of the base model.",
        )
    if not renamed:
        yield from _incomplete_modules(stored, expected, either, layers)
        if config.bias != "none" and not bias_stored:
            rule = BIAS_NOT_STORED
            rule = rule.as_note() if _saves_biases(config.peft_version) else rule
            reason = f'bias is "{printable(config.bias)}", and the file holds no bias.'
            yield rule.in_file(WEIGHTS_NAME, reason)


def _saves_biases(peft_version: str | None) -> bool:
    """Say whether the PEFT that wrote a file stores trained biases."""
    release = peft_release(peft_version)
    return release is not None and release >= (0, 21)


def _incomplete_modules(
    stored: Collection[str],
    declared: frozenset[str],
    heads: frozenset[str],
    layers: Iterable[str],
) -> Iterator[Finding]:
    for name in sorted(declared - heads):
        if name not in stored:
            yield MODULE_TO_SAVE_MISSING.at(
                printable(name), "the file stores no tensor of this module."
            )
    # PEFT declares the usual heads even if the model's own head has another name.
    others = (name for name in stored if name in declared and _OTHER_HEAD.search(name))
    if declared & heads and heads.isdisjoint(stored) and not any(others):
        names = " or ".join(sorted(declared & heads))
        rule, reason = MODULE_TO_SAVE_MISSING, "the file stores no tensor of this module."
        if _is_encoder_decoder(layers):
            rule = rule.as_warning()
            reason += " This is right only if the model uses the base's own classification_head."
        yield rule.at(printable(names), reason)


def _is_encoder_decoder(layers: Iterable[str]) -> bool:
    """Say whether the paths of adapted layers show an encoder and a decoder, as BART and T5 have.

    In transformers the head of such a classifier is named classification_head.
    """
    elements = {element for layer in layers for element in layer.split(".")}
    return {"encoder", "decoder"} <= elements
