"""Decide whether a merged model computes the same as the base with the adapters.

Each limit is computed for this model and these samples, from the outputs of our own merge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vera_convert.verification.model_comparison import ModelComparison
from vera_convert.with_torch.samples import Outputs

_ORDER_NOISE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""How much the order of summation can change an output, relative to the largest output.

Random Llama, GPT-2, BERT and ViT models and a trained MiniLM reach 5e-7 in float32. A random T5
with weights four times as large as usual, which amplifies all noise, reaches 2e-5.
"""
_MERGES_TO_BRANCHES = 8
"""Two merges can differ by this many times the difference between wrapped and merged, unrounded."""
_UNITS = 16
"""Two merges can also differ by this many units in the last place of the largest output."""
_STRAYS = 8
"""How many weights two correct merges can round to different sides in any model, however small."""


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """The outputs to compare a merged model with.

    Attributes:
        base: the outputs of the base alone.
        wrapped: the outputs of the base with the adapters.
        unrounded: the outputs of our own merge before rounding.
        remerged: the outputs of our own merge after rounding.
        rounding: the coarsest dtype of a rounded, adapted weight.
        wide: the dtype of all computation.
        weights: how many adapted weights there are.
        branches: the largest difference between wrapped and merged, unrounded.
        calls_layers: whether the model calls the adapted layers.
        wrapped_is_merged: whether `wrapped` holds the outputs of our own merge instead.
    """

    base: Outputs
    wrapped: Outputs
    unrounded: Outputs
    remerged: Outputs
    rounding: torch.dtype
    wide: torch.dtype
    weights: int
    branches: float
    calls_layers: bool = True
    wrapped_is_merged: bool = False


@dataclass(frozen=True, slots=True)
class Words:
    """The words for the compared model, in the reasons of a verdict.

    Attributes:
        found: the compared model, at the beginning of a sentence.
        own: our own result, made without the compared files or without PEFT.
        loss: the cause of a correct model's differences; ``{}`` stands for the dtype.
        result: the compared result, after "a".
    """

    found: str = "The merged model"
    own: str = "our own merge of this base and these adapters"
    loss: str = "rounding to {}"
    result: str = "merge"


MERGED = Words()
LORA = Words(
    "The base with the LoRA in PEFT",
    "the base with the LoRA's factors",
    "the LoRA's own error",
    "LoRA",
)


def verdict(
    name: str,
    reference: Reference,
    merged: Outputs | None,
    failure: str = "",
    *,
    words: Words = MERGED,
) -> ModelComparison:
    """Compare the outputs of the merged model with the reference.

    Args:
        name: the class of both models.
        reference: the outputs to compare with.
        merged: the outputs of the merged model; None if the model could not be run.
        failure: why the model could not be run.
        words: the words for the compared model.
    """
    wrapped = reference.wrapped
    are_logits = wrapped.are_logits
    order = _limit_of_order(reference)
    found = ModelComparison(
        model_class=name,
        dtype=str(reference.rounding).removeprefix("torch."),
        samples=len(wrapped.values),
        tokens=wrapped.positions,
        largest_difference=difference(wrapped, merged),
        remerged_difference=difference(reference.remerged, merged),
        kl=_divergence(wrapped, merged) if are_logits else None,
        top1=_agreement(wrapped, merged) if are_logits else None,
        effect=difference(wrapped, reference.base),
        threshold_difference=_finite(difference(wrapped, reference.remerged) + order),
        threshold_remerged=order,
        threshold_kl=_limit_of_divergence(reference, order) if are_logits else None,
        threshold_top1=_limit_of_agreement(reference, order) if are_logits else None,
        wrapped=not reference.wrapped_is_merged,
        conclusive=True,
        passed=False,
        reason="",
    )
    wrong = failure or next(_errors(found, words, is_finite=wrapped.are_finite), "")
    doubt = "" if wrong else next(_doubts(found, reference, words), "")
    reason = wrong or doubt
    return replace(found, conclusive=not doubt, passed=not reason, reason=reason)


# --- limits --------------------------------------------------------------------------------------


def order_noise(outputs: Outputs, wide: torch.dtype) -> float:
    """Return how much the order of summation alone can change the outputs."""
    return _ORDER_NOISE[wide] * (outputs.largest if outputs.are_finite else 0.0)


def _limit_of_order(reference: Reference) -> float:
    """Return how much two correct merges can differ.

    The last bits of their sums differ. A share of the weights is then rounded to the other side and
    changes by a whole unit; rounding changes every weight by 0.29 units on average.
    """
    wide, rounding = (torch.finfo(each).eps for each in (reference.wide, reference.rounding))
    largest = reference.wrapped.largest if reference.wrapped.are_finite else 0.0
    share = wide / rounding + _STRAYS / reference.weights
    return _finite(
        _UNITS * wide * largest
        + _MERGES_TO_BRANCHES * reference.branches
        + min(1.0, 4 * share**0.5) * difference(reference.unrounded, reference.remerged)
    )


def _finite(limit: float) -> float:
    return limit if math.isfinite(limit) else 0.0


def _limit_of_divergence(reference: Reference, order: float) -> float:
    """Return how far a correct merge can diverge from the wrapped base, in nats.

    Our own merge diverges by the effect of rounding. Logits that differ by at most t diverge by at
    most t * t / 2, and the square roots of divergences nearly add up.
    """
    rounding = _finite(_divergence(reference.wrapped, reference.remerged))
    roots = math.sqrt(rounding) + order / math.sqrt(2)
    return 2 * roots * roots + float(torch.finfo(reference.wide).eps)


def _limit_of_agreement(reference: Reference, order: float) -> float:
    """Return at how many of the positions a correct merge gives the same largest logit, at least.

    That is as many as for our own merge, without the positions at which the order of summation can
    decide.
    """
    undecided = 0
    for values in reference.remerged.values:
        first, second = values.topk(2, -1).values.unbind(-1)
        undecided += int((first - second <= 2 * order).sum())
    agreement = _agreement(reference.wrapped, reference.remerged)
    return max(0.0, agreement - undecided / reference.remerged.positions)


# --- reasons -------------------------------------------------------------------------------------


def _doubts(found: ModelComparison, reference: Reference, words: Words) -> Iterator[str]:
    """Yield the reasons why a merged model without a known error is still not proven correct."""
    if not reference.calls_layers:
        yield (
            "This model reads the weights of its adapted layers instead of calling the layers, so "
            "the adapter has less effect than the merge. The merged model could therefore not be "
            "compared with the base and its adapter; it computes the same as our own merge."
        )
    if difference(reference.remerged, reference.base) <= found.threshold_remerged:
        yield (
            f"The adapters change the outputs for these samples by at most {found.effect:.3g}, so "
            f"a {words.result} without effect would pass too."
        )


def _errors(found: ModelComparison, words: Words, *, is_finite: bool) -> Iterator[str]:
    """Yield why the merged model differs from the base with its adapters, most telling first."""
    loss = words.loss.format(found.dtype)
    if not is_finite:
        yield "The base with the adapters gives infinite values or NaN, which proves nothing."
    if math.isinf(found.largest_difference):
        yield f"{words.found} gives infinite values or NaN, or values of another shape."
    if found.remerged_difference > found.threshold_remerged:
        yield (
            f"{words.found} differs from {words.own} by "
            f"{found.remerged_difference:.1e} (limit {found.threshold_remerged:.1e}: order of "
            f"summation; the adapters change the outputs by {found.effect:.1e})."
        )
    if found.largest_difference > found.threshold_difference:
        yield (
            f"{words.found} differs from the base with its adapters by "
            f"{found.largest_difference:.1e} (limit {found.threshold_difference:.1e}: "
            f"{loss})."
        )
    if found.kl is not None and found.threshold_kl is not None and found.kl > found.threshold_kl:
        yield (
            f"{words.found} gives distributions that diverge from those of the base with its "
            "adapters by "
            f"{found.kl:.1e} nats (limit {found.threshold_kl:.1e}: {loss})."
        )
    top1, least = found.top1, found.threshold_top1
    if top1 is not None and least is not None and top1 < least:
        yield (
            f"{words.found} gives the same top token at {top1:.1%} of the positions (limit "
            f"{least:.1%}: {loss})."
        )


# --- differences ---------------------------------------------------------------------------------


def _pairs(one: Outputs, other: Outputs | None) -> list[tuple[Tensor, Tensor]] | None:
    """Return the outputs of each sample in pairs; None if the outputs cannot be compared."""
    if other is None or not (one.are_finite and other.are_finite):
        return None
    pairs = [*zip(one.values, other.values, strict=True)]
    return pairs if all(first.shape == second.shape for first, second in pairs) else None


def difference(one: Outputs, other: Outputs | None) -> float:
    """Return the largest difference of two values; infinity if the outputs cannot be compared."""
    pairs = _pairs(one, other)
    if pairs is None:
        return math.inf
    return max(float((first - second).abs().max()) for first, second in pairs)


def _divergence(one: Outputs, other: Outputs | None) -> float:
    """Return the largest mean Kullback-Leibler divergence of a sample, in nats."""
    pairs = _pairs(one, other)
    if pairs is None:
        return math.inf
    return max(_kl(first, second) for first, second in pairs)


def _kl(one: Tensor, other: Tensor) -> float:
    first, second = (values.double().log_softmax(-1) for values in (one, other))
    return max(0.0, float((first.exp() * (first - second)).sum(-1).mean()))


def _agreement(one: Outputs, other: Outputs | None) -> float:
    """Return the share of positions at which the largest value has the same index."""
    pairs = _pairs(one, other)
    if pairs is None:
        return 0.0
    same = sum(int((first.argmax(-1) == second.argmax(-1)).sum()) for first, second in pairs)
    return same / one.positions
