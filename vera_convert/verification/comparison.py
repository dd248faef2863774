"""What running two whole models beside each other showed. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """The merged model beside its base that is wrapped with the adapters.

    All differences are of logits; a model that gives none is compared by its last hidden states,
    and has no `kl` and no `top1`. What the merged model gives is infinitely far off where it is not
    finite or the model cannot be loaded.

    Attributes:
        model_class: the class of transformers that both are loaded as.
        dtype: what the merged weights are rounded to, as torch calls it; all is computed wider.
        samples: how many sequences, or images, were run.
        tokens: at how many positions the two were compared.
        largest_difference: the largest difference between the two.
        remerged_difference: the largest difference between the merged model and one that torch
            merged and rounded anew, which sees what rounding hides from the one above.
        kl: the largest mean Kullback-Leibler divergence of a sample, in nats.
        top1: the share of positions at which both hold the same token the likeliest.
        effect: the largest difference between the base alone and the base with the adapters: what a
            merge without effect would be off by.
        threshold_difference: what `largest_difference` may be.
        threshold_remerged: what `remerged_difference` may be.
        threshold_kl: what `kl` may be.
        threshold_top1: what `top1` must be at least.
        wrapped: whether the first comparison is with the wrapped model. It is not, but
            with the model merged here before it was rounded, where a head's delta goes to the
            embedding as well, which no branch does, or the model does not call its layers.
        conclusive: whether a failure means that the model is wrong; else nothing can be said.
        passed: whether the merged model does as the wrapped one.
        reason: why it does not; empty if it does.
    """

    model_class: str
    dtype: str
    samples: int
    tokens: int
    largest_difference: float
    remerged_difference: float
    kl: float | None
    top1: float | None
    effect: float
    threshold_difference: float
    threshold_remerged: float
    threshold_kl: float | None
    threshold_top1: float | None
    wrapped: bool
    conclusive: bool
    passed: bool
    reason: str
